"""Pools in vLLM: one buffer for all layers of a kind, beside the LoRAs of their own ranks.

A layer adds B diag(d) A x, with d of the token's adapter: vLLM's shrink, a product by row, vLLM's
expand. It was never run on a GPU.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rasa_ext.patching.grouping import pattern
from rasa_ext.serving.expansion import Pool


def share_pools(k: int) -> None:
    """Make vLLM allocate pools for adapters of ``k``, and fill them as it activates an adapter.

    Raises ImportError or AttributeError if vLLM lacks the methods that this wraps.
    """
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager

    register, activate = LoRAModelManager.register_module, LoRAModelManager.activate_adapter
    _ = BaseLinearLayerWithLoRA._apply_lora_to_output

    @functools.wraps(register)
    def register_module(self: Any, module_name: str, module: Any) -> None:
        register(self, module_name, module)
        head = "ClassificationHead" in type(module).__name__  # vLLM 0.33 has two kinds
        if isinstance(module, BaseLinearLayerWithLoRA) and not head:
            if not hasattr(self, "rasa_pools"):
                self.rasa_pools = Pools(self, k)
            self.rasa_pools.add(module_name, module)

    @functools.wraps(activate)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        done: bool = activate(self, lora_id)
        if done and hasattr(self, "rasa_pools"):
            pools = getattr(self._registered_adapters[lora_id], "rasa_pools", {})
            self.rasa_pools.fill(self.lora_index_to_id.index(lora_id), pools)
        return done

    LoRAModelManager.register_module = register_module
    LoRAModelManager.activate_adapter = activate_adapter


class Pools:
    """The buffers of a model's pools, which vLLM's profile run counts and graphs may capture.

    Args:
        manager: vLLM's ``LoRAModelManager``.
        k: pooled ranks of a layer.

    Raises:
        ValueError: vLLM was started with an option that leaves out ``_apply_lora_to_output``.
    """

    def __init__(self, manager: Any, k: int) -> None:
        from vllm import envs

        if manager.lora_config.fully_sharded_loras or envs.VLLM_LORA_ENABLE_DUAL_STREAM:
            raise ValueError(
                "RASA_EXT_VLLM_POOLS: expected vLLM without --fully-sharded-loras and "
                "VLLM_LORA_ENABLE_DUAL_STREAM, whose layers add LoRAs in another way."
            )
        self.manager = manager
        self.layers: int = manager.model.config.get_text_config().num_hidden_layers
        self.width = math.ceil(self.layers * k / 8) * 8
        self.sites: dict[str, list[str]] = {}
        """The layers of files that a module computes, in order of its slices."""
        self.kinds: set[str] = set()
        self.buffers: dict[Any, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def add(self, name: str, module: Any) -> None:
        """Allocate a layer's d, and the pool of its kind with the first of these layers."""
        layers = layers_of(self.manager, name)
        if len(layers) not in (1, module.n_slices):
            return  # pools of such layers are expanded
        A, B = module.lora_a_stacked, module.lora_b_stacked
        shapes = tuple(tuple(each.shape) for each in (*A, *B))
        if (key := (pattern(name), shapes)) not in self.buffers:
            self.buffers[key] = (
                tuple(a.new_zeros(*a.shape[:2], self.width, a.shape[3]) for a in A),
                tuple(b.new_zeros(*b.shape[:3], self.width) for b in B),
            )
        module.rasa_pool = self.buffers[key]
        # The last row stays zero, for tokens without an adapter, whose slot is -1.
        slots = A[0].shape[0]
        module.rasa_d = torch.zeros(len(A), slots + 1, self.width, device=A[0].device)
        module._apply_lora_to_output = types.MethodType(_add_pools, module)
        self.sites[name] = layers
        self.kinds.update(map(pattern, layers))

    def keeps(self, name: str) -> bool:
        """Return whether there is a pool for a layer, given by its name in a file."""
        return pattern(self._name(name)) in self.kinds

    def ready(self, pools: Iterable[Pool], adapter: str) -> dict[str, Pool]:
        """Return an adapter's pools by vLLM's names of layers.

        Raises ValueError, naming the adapter, if one has more ranks than the buffers.
        """
        ready = {}
        for pool in pools:
            if (rank := len(pool.A)) > self.width:
                k = math.ceil(rank / self.layers)
                raise ValueError(
                    f"RASA_EXT_VLLM_POOLS: expected pools of at most {self.width} ranks, got "
                    f"{rank} in the adapter {adapter!r}; start vLLM with "
                    f"RASA_EXT_VLLM_POOLS=shared:{k}."
                )
            A, B = (side.to(self.manager.lora_config.lora_dtype) for side in (pool.A, pool.B))
            named = Pool(A, B, {self._name(name): d for name, d in pool.d.items()})
            ready.update(dict.fromkeys(named.d, named))
        return ready

    def fill(self, slot: int, pools: dict[str, Pool]) -> None:
        """Write an adapter's pools, if it has any, into a slot."""
        held: dict[int, tuple[Any, list[Pool | None]]] = {}
        for name, layers in self.sites.items():
            module = self.manager.modules[name]
            module.rasa_d[:, slot] = 0
            _, content = held.setdefault(id(module.rasa_pool), (module, [None] * len(layers)))
            for i, layer in enumerate(layers):
                if (pool := pools.get(layer)) is not None:
                    content[i] = pool
                    rows = slice(None) if len(layers) == 1 else i
                    module.rasa_d[rows, slot, : len(pool.A)] = pool.d[layer].to(module.rasa_d)
        for module, content in held.values():
            if any(content):
                A, B = ([each and each[side] for each in content] for side in (0, 1))
                own = module.lora_a_stacked, module.lora_b_stacked
                # vLLM's own method cuts them for tensor parallelism, and spreads them over slices.
                module.lora_a_stacked, module.lora_b_stacked = module.rasa_pool
                try:
                    module.set_lora(slot, *((A, B) if len(content) > 1 else (A[0], B[0])))
                finally:
                    module.lora_a_stacked, module.lora_b_stacked = own

    def _name(self, name: str) -> str:
        """Return vLLM's name of a layer of a file."""
        ours = vllm_name(self.manager, name)
        # Some models without a head lack this prefix in files.
        headless = self.manager.is_pooling_model and pattern(ours) not in self.kinds
        return f"model.{ours}" if headless else ours


def layers_of(manager: Any, name: str) -> list[str]:
    """Return the names of the layers that a module of vLLM computes, such as q, k and v."""
    prefix, dot, last = name.rpartition(".")
    packed = manager.packed_modules_mapping.get(last, [])
    return [f"{prefix}{dot}{each}" for each in packed] if len(packed) > 1 else [name]


def vllm_name(manager: Any, name: str) -> str:
    """Return vLLM's name of a layer of a file, without the prefix of models without a head."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = mapper and mapper.get_rename_mapper()
    ours, _ = parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", mapper)
    return str(ours)


def _add_pools(self: Any, x: Tensor, output: Tensor) -> Tensor:
    """Return a layer's output with its LoRAs, as vLLM computes it, and with their pools."""
    output = type(self)._apply_lora_to_output(self, x, output)
    x, y = x.flatten(0, -2), output.view(-1, output.shape[-1])
    (A, B), wrapper = self.rasa_pool, self.punica_wrapper
    slots = wrapper._token_lora_indices[: len(x)].clamp(-1, len(A[0]) - 1)  # padding holds any
    ranks = torch.zeros(len(A), len(x), A[0].shape[2], device=x.device)
    wrapper.add_shrink(ranks, x, A, 1.0)
    ranks *= self.rasa_d[:, slots]
    wrapper.add_expand(y, ranks, B, self.output_slices, add_inputs=True)
    return output
