"""Saving and loading adapters in the package's own format.

For a layer at ``<path>``: ``base_model.model.<path>.rasa_A``, ``.rasa_B`` and ``.rasa_d``; a pool
stands once, as ``.rasa_pool_A`` and ``.rasa_pool_B`` of its group's first layer. Trained modules
stand under their own names. The configuration uses the field names of the published code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext._version import __version__
from rasa_ext.config import RasaConfig
from rasa_ext.files import (
    PREFIX,
    WEIGHTS,
    check_tensors,
    read_config,
    read_tensors,
    write_adapter,
)
from rasa_ext.modules import RasaLinear, RasaPool, is_conv1d
from rasa_ext.patch import apply_plan, refuse_patched
from rasa_ext.record import is_patched, rasa_layers, record_of, unwrap
from rasa_ext.sharding import CURE, is_dtensor, is_emptied, sharded_modules, what_is_here
from rasa_ext.targets import Plan, make_plan, settled


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of a patched model, and its ``modules_to_save``, into a directory.

    The files hold every trained number once, and nothing of the base. They appear together: a crash
    or a full disk on the way leaves what was there. A merged model saves the same adapter.
    """
    record = record_of(model)
    write_tensors(unwrap(model), directory, record.config, record.plan, adapter_tensors(model))


def write_tensors(
    model: nn.Module,
    directory: str | os.PathLike[str],
    config: RasaConfig,
    plan: Plan,
    tensors: Mapping[str, Tensor],
) -> None:
    """Write an adapter for ``model``, patched or not, whose tensors are named as in its file."""
    settings = config.to_dict()
    settings["modules_to_save"] = list(plan.saved) or None
    settings["base_model_name_or_path"] = base_name(model)
    settings["task_type"] = task_type(model)
    settings["fan_in_fan_out"] = any(_transposed(model, g.names[0]) for g in plan.groups)
    settings["inference_mode"] = True
    settings["rasa_ext_version"] = __version__
    write_adapter(directory, settings, tensors)


def _transposed(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    return is_conv1d(getattr(module, "base_layer", module))


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load what ``save_adapter`` wrote; an unpatched model is patched from the saved config.

    Returns the model.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or does not fit the model or
            its present patch; the message names the keys or fields, and the model is unchanged.
        RuntimeError: the model is merged.
    """
    config = RasaConfig.from_dict(read_config(directory))
    tensors = read_tensors(Path(directory) / WEIGHTS)
    return install(model, config, tensors, str(directory))


def install(
    model: nn.Module,
    config: RasaConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    shown: Callable[[str], str] = str,
) -> nn.Module:
    """Put tensors named as in the package's files into a model, patching it if need be.

    ``shown`` gives the name that a tensor has in the file at hand, for what is said of it.
    """
    config = settled(unwrap(model), config)
    patched = is_patched(model)
    if patched:
        record = record_of(model)
        if record.merged is not None:
            raise RuntimeError(
                "model: an adapter cannot be loaded while one is merged into the base weights; "
                "call rasa_ext.unmerge(model) first."
            )
        if differences := settled(unwrap(model), record.config).differences(config):
            raise ValueError(
                f"{where}: the adapter's config differs from the model's patch in "
                f"{'; '.join(differences)} (patch, adapter); call rasa_ext.unpatch(model) first."
            )
        plan = record.plan
    else:
        refuse_patched(model)
        plan = make_plan(model, config)
    expected = _expected(unwrap(model), config, plan)
    check_tensors(_keyed(shown, tensors), _keyed(shown, expected), where)
    if not patched:
        apply_plan(model, config, plan)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model).items():
            tensor.copy_(tensors[key])
    return model


def _keyed(name: Callable[[str], str], things: Mapping[str, Any]) -> dict[str, Any]:
    return {name(key): thing for key, thing in things.items()}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of an adapter under the names they have in a file, each once."""
    root, record = unwrap(model), record_of(model)
    plan, layers = record.plan, dict(rasa_layers(model))
    _refuse_moved(plan, layers)
    tensors: dict[str, Tensor] = {}
    for group in plan.groups:
        pool = layers[group.names[0]].pool
        if pool is not None:
            tensors[f"{PREFIX}{group.names[0]}.rasa_pool_A"] = pool.A.detach()
            tensors[f"{PREFIX}{group.names[0]}.rasa_pool_B"] = pool.B.detach()
        for name in group.names:
            layer = layers[name]
            tensors[f"{PREFIX}{name}.rasa_A"] = layer.A.detach()
            tensors[f"{PREFIX}{name}.rasa_B"] = layer.B.detach()
            tensors[f"{PREFIX}{name}.rasa_d"] = layer.d.detach()
    for key, tensor in saved_tensors(root, plan).items():
        tensors[f"{PREFIX}{key}"] = tensor
    _refuse_sharded(root, plan, tensors, _expected(root, record.config, plan))
    return tensors


def _refuse_moved(plan: Plan, layers: Mapping[str, RasaLinear]) -> None:
    """ValueError where something was put between the model and its adapted layers."""
    for name in (name for group in plan.groups for name in group.names):
        if name not in layers:
            now = next((each for each in layers if each.endswith(name.rpartition(".")[2])), None)
            raise ValueError(
                f"model: expected the adapted layer {name!r} where patch_model put it, but it is "
                f"not there (one is {now!r}); wrap the whole model and no part of it, or, for "
                "FullyShardedDataParallel, use rasa_ext.distributed.shard_model(model, mesh)."
            )


def _refuse_sharded(
    root: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """ValueError where a tensor of the adapter, or of a saved module, is not whole here."""
    for key, tensor in tensors.items():
        if is_dtensor(tensor) or tuple(tensor.shape) != tuple(expected[key]):
            raise ValueError(
                f"model: expected an adapter of whole tensors, but {key} is "
                f"{what_is_here(tensor)}; {CURE}."
            )
    sharded = sharded_modules(root)
    for name, module in root.named_modules():
        saved = any(f"{name}.".startswith(f"{each}.") for each in plan.saved)
        emptied = saved and any(map(is_emptied, module.parameters(recurse=False)))
        if emptied or (
            id(module) in sharded and (saved or isinstance(module, (RasaLinear, RasaPool)))
        ):
            raise ValueError(
                f"model: expected trained modules that are whole on every process, but {name!r} is "
                f"sharded; {CURE}."
            )


def saved_tensors(root: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """State of the modules that are trained in full; tied tensors stand under one name."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple] = set()
    for name in plan.saved:
        for key, tensor in root.get_submodule(name).state_dict(keep_vars=True).items():
            where = id(tensor) if tensor.is_meta else tensor.data_ptr()
            mark = (where, tensor.shape, tensor.stride(), tensor.dtype)
            if mark not in seen or not tensor.numel():
                seen.add(mark)
                tensors[f"{name}.{key}"] = tensor.detach()
    return tensors


def _expected(root: nn.Module, config: RasaConfig, plan: Plan) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    own = config.rank - config.k
    for group in plan.groups:
        (out, width), pooled = group.shape, config.k * len(group.names)
        if pooled:
            expected[f"{PREFIX}{group.names[0]}.rasa_pool_A"] = (pooled, width)
            expected[f"{PREFIX}{group.names[0]}.rasa_pool_B"] = (out, pooled)
        for name in group.names:
            expected[f"{PREFIX}{name}.rasa_A"] = (own, width)
            expected[f"{PREFIX}{name}.rasa_B"] = (out, own)
            expected[f"{PREFIX}{name}.rasa_d"] = (own + pooled,)
    for key, tensor in saved_tensors(root, plan).items():
        expected[f"{PREFIX}{key}"] = tuple(tensor.shape)
    return expected


def task_type(model: nn.Module) -> str | None:
    """PEFT's word for what the model does, where that decides how PEFT loads the adapter."""
    return "CAUSAL_LM" if type(unwrap(model)).__name__.endswith("ForCausalLM") else None


def base_name(model: nn.Module) -> str | None:
    """Where the base model came from, as far as it knows."""
    config = getattr(unwrap(model), "config", None)
    return getattr(config, "_name_or_path", None) or None
