"""Saving adapters in the package's own format.

A layer at ``<path>`` has ``base_model.model.<path>.rasa_A``, ``.rasa_B`` and ``.rasa_d``. A pool is
stored once, as ``.rasa_pool_A`` and ``.rasa_pool_B`` of the group's first layer. Trained modules
have their own names, trained embedding rows have PEFT's. The config uses the field names of the
official code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from rasa_ext._version import __version__
from rasa_ext.base_layers.linear import is_conv1d
from rasa_ext.base_layers.sharded import check_sharded_together, gathered, reshard, whole
from rasa_ext.checkpoint.card import PLAIN, Card, adapter_card, write_card
from rasa_ext.checkpoint.files import PREFIX, write_files
from rasa_ext.nn.adapter import Adapter
from rasa_ext.nn.rasa import AdapterOwner
from rasa_ext.patching.state import (
    check_merge_is_current,
    inner_name,
    owners,
    patch_state,
    trained_by_hand,
    unwrap,
)
from rasa_ext.patching.targets import Plan
from rasa_ext.patching.tokens import row_tensors
from rasa_ext.writing import new_folder


def own_key(name: str, field: str) -> str:
    """Return the key of a layer's tensor in an adapter file.

    Args:
        name: name of the layer.
        field: A, B, d, or another tensor of the method.

    Returns:
        The key.

    Example:
        >>> rasa_ext.checkpoint.own_key("layers.0", "A")
        'base_model.model.layers.0.rasa_A'
    """
    return f"{PREFIX}{name}.rasa_{field}"


def pool_key(first: str, field: str) -> str:
    """Return the key of a group's tensor in an adapter file.

    Args:
        first: name of the group's first layer.
        field: A, B, or another tensor of the method.

    Returns:
        The key.

    Example:
        >>> rasa_ext.checkpoint.pool_key("layers.0", "A")
        'base_model.model.layers.0.rasa_pool_A'
    """
    return f"{PREFIX}{first}.rasa_pool_{field}"


def keyed(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Return the layers' tensors by key in a file; the first layer of a group has the pool."""
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        pool = adapter.pool if adapter.spec.index == 0 else {}
        tensors.update((pool_key(name, field), tensor) for field, tensor in pool.items())
        tensors.update((own_key(name, field), tensor) for field, tensor in adapter.own.items())
    return tensors


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, card: Card | None = PLAIN
) -> None:
    """Write the adapter of a patched model, and ``modules_to_save``, into a directory.

    The files are ``adapter_config.json``, with the field names of the official code,
    ``adapter_model.safetensors``, with every trainable parameter in its own dtype and nothing else
    of the base, and ``README.md``, the model card. What was unfrozen after patching is trainable,
    too. A merged model saves an equal adapter.

    Args:
        model: a patched model, also inside ``torch.compile``, DDP, FSDP or ZeRO. Every process of
            an engine that shards must call this; the first writes.
        directory: created if missing. An adapter in it is replaced; an error, such as a full disk,
            leaves it unchanged. A README.md that was edited, or is not from this package, stays.
        card: additions to the model card; None writes no card.

    Raises:
        TypeError, ValueError: the model is not patched.
        OSError: the files cannot be written.

    Example:
        >>> import os
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> rasa_ext.save_adapter(model, "adapter")
        >>> sorted(os.listdir("adapter"))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    root, state = unwrap(model), patch_state(model)
    live = adapter_tensors(root)
    with gathered(model, live.values()) as writes:
        tensors = {key: whole(tensor.detach()) for key, tensor in live.items()}
        if writes:
            write_tensors(root, directory, state.plan, tensors, card)


def write_tensors(
    model: nn.Module,
    directory: str | os.PathLike[str],
    plan: Plan,
    tensors: Mapping[str, Tensor],
    card: Card | None = None,
) -> None:
    """Write an adapter for ``model``, patched or not; ``tensors`` has the keys of the file."""
    linears = (name for group in plan.groups if not group.experts for name in group.names[:1])
    bases = (getattr(m, "base_layer", m) for m in map(model.get_submodule, linears))
    settings = {
        **plan.config.to_dict(),
        "modules_to_save": list(plan.modules_to_save) or None,
        "base_model_name_or_path": base_name(model),
        "task_type": task_type(model),
        "fan_in_fan_out": any(map(is_conv1d, bases)),
        "inference_mode": True,
        "rasa_ext_version": __version__,
    }
    text = None if card is None else adapter_card(model, settings, plan, tensors, card)
    with new_folder(Path(directory)) as folder:
        write_files(folder, settings, tensors)
        write_card(folder, text, directory)


def names_in_state(root: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the name in ``state_dict`` of each of the ``adapter_tensors``, by key in a file."""
    named = (root.named_parameters, root.named_buffers)
    state = [(inner_name(n), t) for of_kind in named for n, t in of_kind(remove_duplicate=False)]
    names, known = {id(t): n for n, t in state}, {n for n, _ in state}
    plain = {key: key.removeprefix(PREFIX) for key in tensors}
    return {
        key: plain[key] if plain[key] in known else names.get(id(t), key)
        for key, t in tensors.items()
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that a file holds, by key: the adapter, and what else is trained.

    Parameters that were unfrozen by hand have their names in the patched model, as PEFT reads them.
    """
    root, state = unwrap(model), patch_state(model)
    plan, layers = state.plan, dict(owners(model))
    reshard(root)
    check_merge_is_current(root)
    _check_in_place(plan, layers)
    adapters = {name: layers[name].adapter() for group in plan.groups for name in group.names}
    for adapter in adapters.values():
        check_sharded_together(adapter.own.values(), adapter.pool.values())
    tensors, by_hand = keyed(adapters), trained_by_hand(root)
    if merged := [name for name in by_hand if state.merged is not None and ".base_layer." in name]:
        raise RuntimeError(
            f"model: {merged[0]} was unfrozen by hand, and an adapter is merged into its layer; "
            "call rasa_ext.unmerge(model) before saving."
        )
    others = {**row_tensors(root), **_saved_state(root, plan), **by_hand}
    tensors.update((f"{PREFIX}{key}", tensor) for key, tensor in others.items())
    return tensors


def _check_in_place(plan: Plan, layers: Mapping[str, AdapterOwner]) -> None:
    """Raise ValueError if the adapted layers are not the ones of the plan, or were moved."""
    for name in (name for group in plan.groups for name in group.names):
        if name not in layers:
            end = name.rpartition(".")[2]
            now = next((other for other in layers if other.endswith(end)), None)
            raise ValueError(
                f"model: expected the adapted layer {name!r} where patch_model put it, found none "
                f"there (a similar name is {now!r}); wrap the whole model, not parts of it."
            )
    first = {name: group.names[0] for group in plan.groups for name in group.names}
    for name, layer in layers.items():
        if name not in first or layer.pool is not layers[first[name]].pool:
            raise ValueError(
                f"model: expected the adapted layers that patch_model made, but {name!r} is a copy "
                "or was added later; copy or add blocks before patching, or use export_lora."
            )


def saved_tensors(root: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return the state of the modules that are trained in full.

    Args:
        root: the model.
        plan: the adapter's plan.

    Returns:
        The tensors by name in the model; tied ones under every name, as readers that copy need it.

    Example:
        >>> config = rasa_ext.RasaConfig(modules_to_save=["norm"])
        >>> plan = rasa_ext.patching.make_plan(model, config)
        >>> list(rasa_ext.checkpoint.saved_tensors(model, plan))
        ['model.norm.weight']
    """
    return {key: tensor.detach() for key, tensor in _saved_state(root, plan).items()}


def _saved_state(root: nn.Module, plan: Plan) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name in plan.modules_to_save
        for key, tensor in root.get_submodule(name).state_dict(keep_vars=True).items()
    }


def task_type(root: nn.Module) -> str | None:
    """Return PEFT's task type of the model, if it affects how PEFT loads the adapter."""
    return "CAUSAL_LM" if type(root).__name__.endswith("ForCausalLM") else None


def base_name(root: nn.Module) -> str | None:
    """Return the name or path of the base model, if known."""
    config = getattr(root, "config", None)
    return getattr(config, "_name_or_path", None) or None
