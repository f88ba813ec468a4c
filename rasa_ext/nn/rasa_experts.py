"""RasaExperts and RasaExpertWeight: the modules that own the adapters of stacked experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from rasa_ext.nn.adapted_experts import AdaptedExperts
from rasa_ext.nn.adapter import Adapter, LayerSpec, Method
from rasa_ext.nn.packs import PackSet
from rasa_ext.nn.rasa import AdapterOwner, RasaPool


class RasaExpertWeight(AdapterOwner):
    """The adapter of one stacked weight (E, out, in), with a dW[e] for every expert e.

    Under RaSA it owns A (E, r-k, in), B (E, out, r-k) and d (E, R), and reads the group's pool:
    A (L*k, in) and B (out, L*k), or (E, L*k, in) and (E, out, L*k) if each expert has a pool over
    the layers. It is a child of ``RasaExperts``, under the weight's name.

    Args:
        config: the method's config, which defines the adapter's tensors.
        spec: the weight's index in the group, shape and device.
        pool: the group's pool.
        packs: the group's packs.

    Example:
        >>> config = rasa_ext.RasaConfig(rank=4, k=1, experts="shared")
        >>> model = rasa_ext.patch_model(moe_model, config=config)
        >>> stack = model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
        >>> stack.A.shape[:2], stack.effective_rank  # four experts, two layers
        (torch.Size([4, 3]), 5)
    """

    def __init__(
        self, config: Method, spec: LayerSpec, pool: RasaPool | None, packs: PackSet
    ) -> None:
        super().__init__()
        self.own(config, spec, pool, packs)

    def extra_repr(self) -> str:
        """Return shapes and ranks, for ``repr``."""
        return (
            f"experts={self.spec.experts}, in_features={self.spec.in_features}, "
            f"out_features={self.spec.out_features}, effective_rank={self.effective_rank}"
        )


class RasaExperts(AdaptedExperts):
    """Frozen stacked experts with an adapter over one or each of the stacked weights.

    It replaces the experts: forward(hidden states (T, H), chosen experts (T, k), their weights
    (T, k)) returns (T, H). The adapters are children under the weights' names.

    Args:
        base_layer: the experts.
        stacks: the adapters by weight name.

    Raises:
        RuntimeError: in a forward, the adapter is sharded over processes; or it is merged, and the
            forward is for training, with grad.

    Example:
        >>> config = rasa_ext.RasaConfig(rank=4, k=1, experts="shared")
        >>> model = rasa_ext.patch_model(moe_model, config=config)
        >>> experts = model.get_submodule("model.layers.0.mlp.experts")
        >>> sorted(experts.stacks())
        ['down_proj', 'gate_up_proj']
    """

    def __init__(self, base_layer: nn.Module, stacks: Mapping[str, RasaExpertWeight]) -> None:
        super().__init__(base_layer)
        for name, stack in stacks.items():
            self._modules[name] = stack  # add_module refuses names of the base's attributes
        self._stacks = tuple(stacks)
        self.train(base_layer.training)

    def stacks(self) -> dict[str, RasaExpertWeight]:
        """Return the adapters by weight name."""
        return {name: self._modules[name] for name in self._stacks}  # type: ignore[misc]  # owners

    def live_adapters(self, name: str) -> list[Adapter]:
        """Return the adapters that a forward adds to a stacked weight."""
        stack: Any = self._modules.get(name)
        return [] if stack is None else [stack.adapter()]

    def adapters(self) -> Iterator[Adapter]:
        """Return every adapter of the experts."""
        for stack in self.stacks().values():
            yield stack.adapter()
