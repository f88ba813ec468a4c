"""RaSA as a PEFT tuner: choice of the layers to adapt, and of those that share a pool."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from rasa_ext.base_layers.linear import (
    check_weight_is_stored,
    is_conv1d,
    stored_weight,
)
from rasa_ext.base_layers.quantized import forget_quantizer, format_of
from rasa_ext.base_layers.survey import Base, LinearBase, home_of, is_container, survey
from rasa_ext.checkpoint.files import check_finite
from rasa_ext.checkpoint.loading import own_names
from rasa_ext.checkpoint.official import official_name
from rasa_ext.methods.base import ALL_LINEAR, groups_to_json
from rasa_ext.methods.patterns import matches_whole
from rasa_ext.nn.adapter import LayerSpec
from rasa_ext.nn.packs import Decoding
from rasa_ext.patching.config_warnings import config_warnings, not_linear
from rasa_ext.patching.fold import Merging
from rasa_ext.patching.grouping import Group, as_saved, group_layers, resolve_groups
from rasa_ext.patching.merge import check_own_weights
from rasa_ext.patching.merge_quantized import model_dtype, warn_dequantized
from rasa_ext.patching.patch import start_from_weight
from rasa_ext.patching.resume import refuse_older
from rasa_ext.patching.swap import (
    Absent,
    link_layers,
    prepare_model,
    remove_children,
    replace_modules,
    undo,
)
from rasa_ext.patching.targets import INSTEAD, check_base, make_plan, resolve_config, suffixes
from rasa_ext.patching.tokens import check_rows_finite
from rasa_ext.peft.backends import backend_of
from rasa_ext.peft.callers import users_level
from rasa_ext.peft.config import RasaConfig
from rasa_ext.peft.experts import RasaPeftExperts, RasaPeftExpertWeight
from rasa_ext.peft.layer import RasaPeftLinear, SplitPeftLinear, keys_in_files, pools_in_files
from rasa_ext.peft.mixed import rows_through
from rasa_ext.peft.named import NamedAdapters, RowAdapters, Tensors
from rasa_ext.peft.targets import (
    bases_of,
    chosen_stacks,
    trained_in_full,
    untouched,
    unwrap_experts,
    wrap_experts,
)
from rasa_ext.peft.tokens import (
    cast_rows,
    copy_rows,
    make_rows_optional,
    rows_in_tables,
    settled_tokens,
)

REFERENCE, POLICY = "ref", "default"
"""TRL's adapter names. Its trainers add the reference as a copy of the policy."""


SAVES_LORAS = "save_lora_adapter"
"""A method of diffusers' models."""


class RasaModel(BaseTuner):
    """PEFT's tuner for RaSA, created by ``peft.get_peft_model``."""

    prefix = "rasa_"
    tuner_layer_cls = NamedAdapters
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 - as in PEFT; never needed here
    _inside = False
    """Whether the model has the adapters without a tuner, as ``model.add_adapter`` makes them."""
    _rows: RowAdapters | None = None
    _attributes_before: tuple[tuple[nn.Module, str, Any], ...] = ()
    _watching: Sequence[Any] = ()

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Adapt a model; PEFT calls this, for ``inject_adapter_in_model`` with a config alone."""
        self._inside = isinstance(peft_config, PeftConfig)
        super().__init__(model, peft_config, *args, **kwargs)
        register: Any = self.register_load_state_dict_pre_hook
        register(_refuse_older)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adapt the layers that the adapter's config names; see PEFT's ``inject_adapter``.

        Raises ValueError or TypeError, naming the layer, if one is not linear or cannot be adapted.
        The model's modules are then unchanged.
        """
        keys = kwargs.get("state_dict")
        self._groups: dict[str, tuple[Group, list[LayerSpec], Base]] | None = None
        self._given = None if keys is None else {_layer_of(key) for key in keys}
        self._frozen: list[nn.Parameter] = []
        own = self.peft_config[adapter_name]
        trains = isinstance(own, RasaConfig) and not own.inference_mode
        if trains and (why := own.why_not_trained()):
            raise ValueError(
                f"rasa_method: expected a method that PEFT can train, got {own.rasa_method!r}: "
                f"{why}; train it with rasa_ext.patch_model(model, config="
                f"{type(own.core()).__name__}(...)), after which PEFT reads the saved adapter."
            )
        if isinstance(own, RasaConfig) and own.trainable_token_indices:
            own.trainable_token_indices = settled_tokens(
                self.model, own.core(), lambda name: self._is_target(own, name)
            )
        if not self._watching:
            self._decoding = Decoding()
        self._homes: Counter[str] = Counter()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            self._forget(adapter_name)
            raise
        finally:
            unwrap_experts(model)
        self._watching = self._watching or self._decoding.watch(self.model)
        link_layers(model, RasaPeftLinear)
        peft_config = cast(RasaConfig, self.peft_config[adapter_name])
        if peft_config.modules_to_save:  # whole names, so that every reader matches equal modules
            peft_config.modules_to_save = list(trained_in_full(model, adapter_name))
        if peft_config.layers_to_transform is not None and self._groups:
            peft_config.target_modules = set(self._groups)
            peft_config.layers_to_transform = peft_config.layers_pattern = None
        make_rows_optional(model)
        self._cast_adapter_dtype(adapter_name, kwargs.get("autocast_adapter_dtype", True))
        if adapter_name == REFERENCE and peft_config is self.peft_config.get(POLICY):
            self._copy_policy()

    def _forget(self, adapter_name: str) -> None:
        """Delete what there is of an adapter that could not be added."""
        for owner in self.owners():
            if adapter_name in owner.configs:
                owner.delete_adapter(adapter_name)
        if not any(owner.configs for owner in self.owners()):
            self._restore_base()
            self._attributes_before, self._watching = (), []

    def _copy_policy(self) -> None:
        """Copy the policy's parameters to the reference.

        TRL adds the reference with the policy's config, then copies every parameter whose name
        contains ".default.". Our names end in the adapter's name, as PEFT has it for parameters
        that are no module's weight, and as the files and transformers' own loading need it. So TRL
        would copy nothing, and the reference would be the bare base.
        """
        for owner in self.owners():
            for part in (getattr(owner, name) for name in owner.adapter_layer_names):
                if POLICY in part:
                    part[REFERENCE].data.copy_(part[POLICY].data)
        copy_rows(self.model, POLICY, REFERENCE)

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        """Resolve 'all-linear' as ``patch_model`` does, which is stricter than PEFT."""
        own = cast(RasaConfig, peft_config)
        every = own.target_modules in (None, ALL_LINEAR)
        if own.rasa_experts is None and self._given is None and not own.inference_mode:
            _, stacks = bases_of(self.model)
            meant = {n: stack for n, stack in stacks.items() if every or self._is_target(own, n)}
            if meant:
                warnings.warn(untouched(meant), stacklevel=users_level())
        if every:
            core = dataclasses.replace(own.core(), trainable_token_indices=())  # PEFT handles these
            config = resolve_config(self.model, core)
            plan = make_plan(self.model, config, survey(self.model, *bases_of(self.model)))
            names = [name for group in plan.groups for name in group.names]
            own.target_modules = set(suffixes(names, self.model))
        return own

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Prepare the targeted stacked weights for adapters, under their names."""
        own = cast(RasaConfig, peft_config)
        chosen = chosen_stacks(self.model, own, lambda name: self._is_target(own, name))
        if chosen and not self.owners():
            # PEFT freezes the base with the first adapter. It would take this adapter for a second
            # one, since layers of its kind exist, and not freeze the base.
            self._frozen = [p for p in self.model.parameters() if p.requires_grad]
        wrap_experts(self.model, chosen)
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        own = cast(RasaConfig, peft_config)
        if self._groups is None:  # the adapter's first layer: PEFT has resolved the targets by now
            self._groups = self._find_groups(own)
        if current_key not in self._groups:  # stacked weights of another adapter
            return
        group, specs, base = self._groups[current_key]
        if isinstance(target, NamedAdapters):
            layer = target
        else:  # linear, as _find_groups checked
            assert isinstance(base, LinearBase)
            kind = RasaPeftLinear if base.split is None else SplitPeftLinear
            layer = kind(base.module, backend_of(base.module, self.model))
            layer.is_dense_head = current_key == self._dense_head
            replace_modules(self.model, {target: layer})  # a module may be registered twice
        first = cast(NamedAdapters, self.model.get_submodule(group.names[0]))
        index = group.names.index(current_key)
        home = None if index else self._home_of_pool(group.names)
        layer.update_layer(
            adapter_name, own.core(), specs, index, first, self._decoding, home, own.init_weights
        )
        if not own.inference_mode:
            start_from_weight(own.core(), layer.named(adapter_name), base)

    def _home_of_pool(self, names: Sequence[str]) -> tuple[nn.Module, str, str] | None:
        """Return where a pool of these layers belongs; None leaves the pool to the first layer.

        ``model.add_adapter`` reads files without the tuner, by the names that they have there. A
        container calls or lists its children, so none is added to it.
        """
        where = home_of(self.model, names, nn.Sequential)
        home = self.model.get_submodule(where)
        if self._inside or len(names) == 1 or is_container(home):
            return None
        self._homes[where] += 1
        return home, f"{where}.", f"rasa_pool_{self._homes[where] - 1}_"

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the base as PEFT does, which takes for adapters only what layers have."""
        trained = [p for p in self._pools() if p.requires_grad]
        super()._mark_only_adapters_as_trainable(model)
        for parameter in trained:
            parameter.requires_grad_(True)

    def _pools(self) -> Iterator[nn.Parameter]:
        for owner in self.owners():
            for pool in owner.pools.values():
                for part in pool.values():
                    yield from part.values()

    def _find_groups(
        self, peft_config: RasaConfig
    ) -> dict[str, tuple[Group, list[LayerSpec], Base]]:
        """Return group, specs and base of every layer that PEFT will adapt, by layer name."""
        (linears, stacks), config = bases_of(self.model), peft_config.core()
        stacks = stacks if config.grouping_of_experts else {}
        layers = survey(self.model, linears, stacks)
        reasons, self._dense_head = layers.refused, layers.dense_head
        inside: tuple[str, ...] = ()
        bases: dict[str, Base] = {}
        others: list[str] = []
        for name, module in self.model.named_modules():
            if not name or name.startswith(inside) or not self._is_target(peft_config, name):
                continue
            if isinstance(module, NamedAdapters):
                inside += (f"{name}.",)
            stacked = isinstance(module, RasaPeftExpertWeight)
            if name in reasons:
                why = reasons[name]
                raise ValueError(f"target_modules: cannot adapt {name!r}: {why}; {INSTEAD}.")
            if not (stacked or name in linears):
                others.append(name)
                continue
            if stacked:
                if name in stacks:
                    bases[name] = stacks[name]
                continue
            if not isinstance(module, RasaPeftLinear):
                check_base(name, linears[name])
            bases[name] = linears[name]
        if others and not bases:
            raise ValueError(
                f"target_modules: expected linear layers, but {others[0]!r} is none; {INSTEAD}."
            )
        rule = as_saved(config) if peft_config.is_from_file else config
        groups = group_layers(rule, bases, "rasa_groups")
        found: dict[str, tuple[Group, list[LayerSpec], Base]] = {}
        for group in groups:
            group.planned(config)  # the method's own checks, before anything changes
            specs = group.specs(*(bases[name].device for name in group.names))
            found |= {name: (group, specs, bases[name]) for name in group.names}
        chosen = {base.module for base in bases.values() if isinstance(base, LinearBase)}
        changed = prepare_model(self.model, chosen, hide_quantizer=False)
        self._attributes_before += tuple(changed)
        if hasattr(self.model, SAVES_LORAS) and SAVES_LORAS not in vars(self.model):
            self._attributes_before += ((self.model, SAVES_LORAS, Absent),)
            setattr(self.model, SAVES_LORAS, _refuse_to_save)
        peft_config.fan_in_fan_out = any(map(is_conv1d, chosen))
        peft_config.rasa_groups = groups_to_json(resolve_groups(config, groups).layer_groups)
        if not peft_config.inference_mode:
            for message in (*not_linear(others), *config_warnings(config, groups, "r", "rasa_")):
                warnings.warn(message, stacklevel=users_level())
        return found

    def _is_target(self, peft_config: PeftConfig, name: str) -> bool:
        if self._given is not None:
            return name in self._given
        return bool(self._check_target_module_exists(peft_config, name))

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        """Match as PEFT does, but run regular expressions in bounded time."""
        own = copy.copy(cast(RasaConfig, peft_config))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(own, name), str):
                setattr(own, name, {key} if matches_whole(pattern, key) else {""})
        return check_target_module_exists(own, key)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Apply ``adapter_names`` around a forward or ``generate``; PEFT calls this."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        modules = self.model.modules()
        wrappers = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
        beams = kwargs.get("num_beams") or 1
        with rows_through(self.owners(), wrappers, names, self.peft_config, beams) as self._rows:
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted model; its ``generate`` does not call this."""
        if self._rows is not None:
            self._rows.grad = torch.is_grad_enabled()
        return super().forward(*args, **kwargs)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Raise NotImplementedError: RaSA does not support it."""
        raise NotImplementedError(
            "add_weighted_adapter: not supported for RaSA; activate several adapters together "
            "with model.base_model.set_adapter([...]), or export each as a LoRA "
            "(rasa-ext export-lora DIR) and combine those."
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast to the config's dtype, or without ``autocast_adapter_dtype`` to the base's."""
        for owner in self.owners():
            owner.cast_adapter(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            own = cast(RasaConfig, self.peft_config[adapter_name])
            cast_rows(self.model, adapter_name, own.core().adapter_dtype)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge as PEFT does; with ``safe_merge`` check every layer before the first is merged."""
        self._check_merge(safe_merge, adapter_names)
        with self._merging(stacklevel=2):
            super().merge_adapter(adapter_names=adapter_names)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's returns the model, too
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(safe_merge, adapter_names)
        keep = any(owner.merged for owner in self.owners())  # to restore after an error
        with self._merging(stacklevel=3, keep=keep):
            super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, adapter_names=adapter_names
            )
        self._restore_base()
        return forget_quantizer(self.model)

    def _restore_base(self) -> None:
        """Put the base's modules back in place, and undo other changes."""
        kinds = RasaPeftLinear | RasaPeftExperts
        left = [module for module in self.model.modules() if isinstance(module, kinds)]
        replace_modules(self.model, {each: each.base_layer for each in left})  # aliases too
        remove_children(self.model, Tensors)
        undo(self._attributes_before)
        for hook in self._watching:
            hook.remove()

    @contextlib.contextmanager
    def _merging(self, stacklevel: int, keep: bool = True) -> Iterator[None]:
        """Within the context, merges make quantized bases dense in the model's dtype, and warn."""
        merging = Merging(model_dtype(self.model), keep)
        for owner in self.owners():
            owner.merging = merging
        try:
            yield
        finally:
            merging.keep = True
        warn_dequantized(merging.changes, stacklevel + 2)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        names = adapter_names or self.active_adapters
        weights = []
        for name, module in self.model.named_modules():
            if isinstance(module, RasaPeftLinear) and format_of(module.base_layer) is None:
                check_weight_is_stored(name, module.base_layer)
                if module.configs.keys() & set(names):
                    base = module.base_layer
                    weights.append((name, base, stored_weight(base)))
        check_own_weights(self.model, weights)
        if safe_merge:
            for owner in self.owners():
                owner.check_merge(adapter_names)
            check_rows_finite(rows_in_tables(self.model, names))

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Replace as PEFT does, which only supports modules of one weight, a Parameter."""
        if isinstance(child, RasaPeftExperts | TrainableTokensWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def owners(self) -> list[NamedAdapters]:
        """List all adapter owners, stacked weights included, in the model's order."""
        return [module for module in self.model.modules() if isinstance(module, NamedAdapters)]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Add the pools, which files name after the first layer of the group."""
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        names = pools_in_files(model, adapter_name).items()
        return found | {key: state_dict[name] for key, name in names if name in state_dict}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename a checkpoint's tensors, also the official code's, to the model's names.

        Raises ValueError if a tensor holds NaN, as ``rasa_ext.load_adapter`` does.
        """
        check_finite(state_dict, f"adapter {adapter_name!r}", "No tensor was loaded")
        expected = keys_in_files(model, adapter_name)
        state_dict = own_names(state_dict, expected, official_name, "the checkpoint")
        names = {
            cls._remove_adapter_name_from_key(key, adapter_name): name
            for key, name in pools_in_files(model, adapter_name).items()
        }
        state_dict = {names.get(key, key): tensor for key, tensor in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "save_lora_adapter: expected a LoRA, which is all that diffusers reads from such a file; "
        "adapt the model by peft.get_peft_model, and save it by save_pretrained."
    )


def _refuse_older(model: RasaModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raise ValueError for names of pools in older versions: a hook."""
    pools = [pools_in_files(model, adapter).items() for adapter in model.peft_config]
    older = (f"{prefix}{key}" for names in pools for key, name in names if key != name)
    refuse_older(state_dict, (f"{prefix}rasa_pools.", *older))


def _layer_of(key: str) -> str:
    """Return the name of the layer that a tensor belongs to, from the tensor's name."""
    return key.rsplit(f".{RasaModel.prefix}", 1)[0].removeprefix("_orig_mod.")
