"""RaSA as a PEFT tuner: which layers it adapts, and which of them share a pool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from rasa_ext.base_layers.linear import is_conv1d, is_linear
from rasa_ext.base_layers.quantized import (
    check_not_repacked,
    disable_cpu_repacking,
    forget_quantizer,
    format_of,
)
from rasa_ext.methods.base import ALL_LINEAR, group_places
from rasa_ext.nn.fused_projections import link_fused_projections
from rasa_ext.patching.merge_quantized import model_dtype, warn_dequantized
from rasa_ext.patching.swap import disable_fused_encoder, registrations_of
from rasa_ext.patching.targets import (
    Group,
    grouped,
    make_plan,
    resolve_config,
    suffixes,
    unadaptable,
)
from rasa_ext.peft.backends import backend_of
from rasa_ext.peft.layer import RasaPeftLinear
from rasa_ext.peft.mixed import rows_through
from rasa_ext.peft.official import from_official, official_names_hook

REFERENCE, POLICY = "ref", "default"
"""TRL's names: its trainers add the first as a copy of the second, to hold the policy against."""


class RasaModel(BaseTuner):
    """PEFT's tuner for RaSA; ``peft.get_peft_model`` makes it, not its users."""

    prefix = "rasa_"
    tuner_layer_cls = RasaPeftLinear
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 - as in PEFT; never needed here
    _subtracts = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_attributes_before"]: list[tuple[nn.Module, str, Any]] = []
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(official_names_hook)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adapt the layers that the adapter's config names; see PEFT's ``inject_adapter``.

        Raises ValueError, naming the layer, where one is not linear or cannot be adapted; the
        modules of the model are then what they were.
        """
        keys = kwargs.get("state_dict")
        self._groups: dict[str, Group] | None = None
        self._given = None if keys is None else {_layer_of(key) for key in keys}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        link_fused_projections(model, RasaPeftLinear)
        peft_config = self.peft_config[adapter_name]
        if peft_config.modules_to_save:  # as they are, so that every reader finds the same ones
            peft_config.modules_to_save = [
                name
                for name, module in model.named_modules()
                if isinstance(module, ModulesToSaveWrapper)
                and adapter_name in module.modules_to_save
            ]
        if adapter_name == REFERENCE and peft_config is self.peft_config.get(POLICY):
            self._copy_policy()

    def _copy_policy(self) -> None:
        """Give the reference the policy's numbers.

        TRL adds the adapter with the policy's very config, and then copies every parameter whose
        name has ".default." in it. Ours end in the adapter's name, as PEFT has it for parameters
        that are no module's weight, and as the files and transformers' own loading need it; so
        nothing would be copied, and the reference would be the bare base.
        """
        for layer in self.layers():
            for part in (getattr(layer, name) for name in layer.adapter_layer_names):
                if POLICY in part:
                    part[REFERENCE].data.copy_(part[POLICY].data)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """Settle 'all-linear' as ``patch_model`` does, which is more careful than PEFT."""
        if peft_config.target_modules in (None, ALL_LINEAR):
            config = resolve_config(self.model, peft_config.core())
            plan = make_plan(self.model, config, _linears(self.model))
            names = [name for group in plan.groups for name in group.names]
            peft_config.target_modules = set(suffixes(names, self.model))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if self._groups is None:  # the adapter's first layer: PEFT has settled the targets by now
            self._groups = self._find_groups(peft_config)
        group = self._groups[current_key]
        if not isinstance(target, RasaPeftLinear):
            found = registrations_of(self.model, {target: None})
            target = RasaPeftLinear(target, backend_of(target, self.model))
            for holder, key in found:  # a module may be registered twice
                holder._modules[key] = target
        owner = self.model.get_submodule(group.names[0])
        places = group_places([self.model.get_submodule(name) for name in group.names])
        target.update_layer(
            adapter_name,
            peft_config.core(),
            places,
            group.names.index(current_key),
            owner,
            peft_config.init_weights,
        )

    def _find_groups(self, peft_config: PeftConfig) -> dict[str, Group]:
        """The group of every layer that PEFT is about to adapt, by the layer's name."""
        check_not_repacked(self.model)
        linears = _linears(self.model)
        hindered = unadaptable(self.model, linears)
        inside: tuple[str, ...] = ()
        names = []
        for name, module in self.model.named_modules():
            if not name or name.startswith(inside) or not self._is_target(peft_config, name):
                continue
            if name in hindered:
                raise ValueError(f"target_modules: cannot adapt {name!r}: {hindered[name]}.")
            if name not in linears:
                raise ValueError(
                    f"target_modules: expected linear layers, but {name!r} is a "
                    f"{type(module).__name__}; leave it out with exclude_modules."
                )
            if isinstance(module, RasaPeftLinear):
                inside += (f"{name}.",)
            elif (form := format_of(module)) is not None:
                form.check(name, module)
            names.append(name)
        bases = dict.fromkeys(linears[name] for name in names)
        self._attributes_before += disable_fused_encoder(self.model, bases)
        self._attributes_before += disable_cpu_repacking(self.model, mark=False)
        peft_config.fan_in_fan_out = any(map(is_conv1d, bases))
        return {name: group for group in grouped(names, linears) for name in group.names}

    def _is_target(self, peft_config: PeftConfig, name: str) -> bool:
        if self._given is not None:
            return name in self._given
        return bool(self._check_target_module_exists(peft_config, name))

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around a forward and ``generate``, which have their ``adapter_names``."""
        names = kwargs.get("adapter_names")
        beams = kwargs.get("num_beams") or 1
        with contextlib.nullcontext() if names is None else rows_through(self, names, beams):
            yield

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Not for RaSA: raises NotImplementedError."""
        raise NotImplementedError(
            "add_weighted_adapter: not supported for RaSA; activate several adapters together "
            "with model.base_model.set_adapter([...]), or export each as a LoRA "
            "(rasa-ext export-lora DIR) and combine those."
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The dtype of an adapter is its config's, whatever the base's and the file's."""
        for layer in self.layers():
            layer.cast_adapter(adapter_name)

    def unmerge_by_subtracting(self, enabled: bool = True) -> None:
        """Let later merges keep no copy of the base's weights: unmerging subtracts what was added.

        Whoever merges obeys it, such as a trainer that merges to hand the weights on. Unmerging
        still gives the exact weights back: entries that subtracting does not, which are few where
        dW is small beside W, are kept. An adapter that is merged must not be changed meanwhile;
        ``unmerge_adapter`` raises RuntimeError then. A quantized base needs no copy anyway.
        """
        self._subtracts = enabled

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """PEFT's, but ``safe_merge`` looks at every layer before it merges the first."""
        self._check_safe_merge(safe_merge, adapter_names)
        with self._telling(stacklevel=2):
            super().merge_adapter(adapter_names=adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_safe_merge(merge and safe_merge, adapter_names)
        with self._telling(stacklevel=3):
            model = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, adapter_names=adapter_names
            )
        bases = {layer: layer.get_base_layer() for layer in self.layers()}
        for holder, key in registrations_of(
            model, bases
        ):  # second names, which PEFT does not visit
            holder._modules[key] = bases[holder._modules[key]]
        for module, name, value in reversed(self._attributes_before):
            setattr(module, name, value)
        return forget_quantizer(model)

    @contextlib.contextmanager
    def _telling(self, stacklevel: int) -> Iterator[None]:
        """Merges within make quantized bases dense in the model's dtype; a warning tells of it."""
        layers, dtype = self.layers(), model_dtype(self.model)
        for layer in layers:
            layer.dense_dtype, layer.densified, layer.subtracts = dtype, None, self._subtracts
        yield
        warn_dequantized(
            [each.densified for each in layers if each.densified is not None], stacklevel + 2
        )

    def _check_safe_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        if safe_merge:
            for layer in self.layers():
                layer.merged_weight(adapter_names, safe_merge=True)

    def layers(self) -> list[RasaPeftLinear]:
        """The adapted layers, in the model's order."""
        return [module for module in self.model.modules() if isinstance(module, RasaPeftLinear)]

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT 0.21: from a checkpoint's names, the official code's too, to the model's."""
        state_dict = from_official(state_dict, model, adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _layer_of(key: str) -> str:
    """The layer that a tensor of an adapter belongs to, as PEFT reads it off its name."""
    return key.rsplit(f".{RasaModel.prefix}", 1)[0].removeprefix("_orig_mod.")


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name, those inside adapted layers under the latters' names.

    What PEFT trains in full is left out.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, RasaPeftLinear | AuxiliaryTrainingWrapper):
            inside += (f"{name}.",)
        if isinstance(module, RasaPeftLinear):
            found[name] = module.base_layer
        elif is_linear(module):
            found[name] = module
    return found
