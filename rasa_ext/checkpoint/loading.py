"""Loading adapters in the package's own format."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.linear import device_of, is_linear, stored_weight
from rasa_ext.base_layers.sharded import fill, gathered
from rasa_ext.base_layers.survey import survey
from rasa_ext.checkpoint.adapter import (
    adapter_tensors,
    keyed,
    names_in_state,
    own_key,
    pool_key,
    saved_tensors,
    write_tensors,
)
from rasa_ext.checkpoint.card import PLAIN, Card
from rasa_ext.checkpoint.files import (
    CONFIG,
    PREFIX,
    check_finite,
    check_in_memory,
    check_tensors,
    file_in,
    located,
    read_adapter,
    read_tensors,
)
from rasa_ext.checkpoint.pretrained import let_it_save
from rasa_ext.methods import RasaConfig, read_method
from rasa_ext.methods.base import AdapterConfig
from rasa_ext.nn.adapter import Adapter
from rasa_ext.patching.grouping import as_saved, pattern
from rasa_ext.patching.patch import apply_plan, check_unpatched
from rasa_ext.patching.state import is_patched, patch_state, unwrap
from rasa_ext.patching.targets import Plan, make_plan, resolve_config
from rasa_ext.patching.tokens import rows_key


@dataclasses.dataclass(frozen=True)
class AdapterState:
    """An adapter that is neither in a model nor in a file.

    Example:
        >>> import copy
        >>> rasa_ext.export_lora(rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1), "lora")
        9
        >>> state = rasa_ext.import_lora(copy.deepcopy(model), "lora")
        >>> state.save(model, "adapter")
        >>> model = state.install(model)
    """

    plan: Plan
    tensors: dict[str, Tensor]
    """Tensors by key in an adapter file."""

    @property
    def config(self) -> RasaConfig:
        """The adapter's config."""
        return cast(RasaConfig, self.plan.config)

    def save(
        self, model: nn.Module, directory: str | os.PathLike[str], *, card: Card | None = PLAIN
    ) -> None:
        """Write an adapter directory for ``load_adapter``; of ``model`` only the names are used.

        ``card`` is as in ``save_adapter``.
        """
        write_tensors(model, directory, self.plan, self.tensors, card)

    def install(self, model: nn.Module) -> nn.Module:
        """Patch a model with the adapter, in place, and return it."""
        return load_tensors_into(model, self.config, self.tensors, "adapter")


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load an adapter that ``save_adapter`` wrote; patch the model first if needed.

    Args:
        model: the base that the adapter was trained on, or a model patched with an equal config.
            Tensors are cast to the dtype, and moved to the device, of the model's adapter.
        directory: what ``save_adapter`` wrote or, if there is no such path, an id on the Hub
            ("owner/name"). From a whole model that ``save_pretrained`` wrote after patching, the
            adapter is loaded if the model is patched with the config it was trained with.

    Returns:
        The same object.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or does not fit the model or
            the patch; the message names the keys or fields, and the model is unchanged.
        RuntimeError: the model is merged.

    Example:
        >>> import copy
        >>> trained = rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1)
        >>> rasa_ext.save_adapter(trained, "adapter")
        >>> model = rasa_ext.load_adapter(model, "adapter")
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> torch.equal(model(tokens).logits, trained(tokens).logits)
        True
    """
    directory = located(directory)
    shards = sorted(directory.glob("model*.safetensors"))
    if shards and not file_in(directory, CONFIG).exists():
        return _load_from_whole(model, shards, str(directory))
    config, tensors = read_adapter(directory)
    return load_tensors_into(model, read_method(config), tensors, str(directory))


def _load_from_whole(model: nn.Module, shards: list[Path], where: str) -> nn.Module:
    """Load the adapter from the files of a whole model that was saved while patched."""
    if not is_patched(model):
        raise ValueError(
            f"{where}: expected an adapter's directory, got a whole model's; if it was saved after "
            "patching, first patch the base as for training: rasa_ext.patch_model(model, ...)."
        )
    there = names_in_state(unwrap(model), adapter_tensors(model))
    # Once a group's first layer had the pool.
    older = {key: key.removeprefix(PREFIX).replace(".rasa_pool_", ".pool.") for key in there}
    stored: dict[str, Tensor] = {}
    for shard in shards:
        stored.update(read_tensors(shard, {*there.values(), *older.values()}))
    names = ((key, name) for either in (older, there) for key, name in either.items())
    tensors = {key: stored[name] for key, name in names if name in stored}
    return load_tensors_into(model, patch_state(model).config, tensors, where)


def load_tensors_into(
    model: nn.Module,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    shown: Callable[[str], str] = str,
) -> nn.Module:
    """Load tensors, named as in the package's files, into a model, and patch it if needed.

    ``shown`` maps a key to the name in another format; ``tensors`` may use either.
    """
    patched = is_patched(model)
    root = unwrap(model) if patched else model
    found = survey(root)
    config = resolve_config(root, config, found)
    if patched:
        state = patch_state(root)
        if state.merged is not None:
            raise RuntimeError(
                "model: an adapter cannot be loaded while one is merged into the base weights; "
                "call rasa_ext.unmerge(model) first."
            )
        if differences := resolve_config(root, state.config, found).differences(config):
            raise ValueError(
                f"{where}: the adapter's config differs from the model's patch in "
                f"{'; '.join(differences)} (patch, adapter); call rasa_ext.unpatch(model) first."
            )
        plan = state.plan
    else:
        check_unpatched(model)
        plan = make_plan(model, as_saved(config), found)
    check_in_memory(dict(_tensors_to_fill(root, plan)))
    planned = [group.planned(config) for group in plan.groups]
    expected = _expected(root, planned, plan)
    tensors = _with_ties(root, plan, own_names(tensors, expected, shown, where))
    by_hand = _by_hand(root, tensors.keys() - expected.keys())
    expected |= {key: tuple(parameter.shape) for key, parameter in by_hand.items()}
    named = {shown(key): tensor for key, tensor in tensors.items()}
    shapes = {shown(key): shape for key, shape in expected.items()}
    check_tensors(named, shapes, where, _other_base(tensors, expected))
    check_finite(named, where)
    _check_indices(planned, tensors, where)
    _check_ties(root, plan, tensors, where)
    if not patched:
        let_it_save(model, apply_plan(model, plan, new=False))
    replaced = patch_state(model).replaced
    earlier = replaced.keys() - set(by_hand.values())
    for parameter in earlier:
        parameter.requires_grad_(False)
    for parameter in by_hand.values():
        parameter.requires_grad_(True)
    live = {**adapter_tensors(model), **by_hand}
    with torch.no_grad(), gathered(model, (*live.values(), *earlier), write=True):
        for parameter in by_hand.values():
            replaced.setdefault(parameter, parameter.detach().clone())
        for parameter in earlier:
            parameter.copy_(replaced.pop(parameter))
        for key, tensor in live.items():
            if key in tensors:  # else unfrozen by hand, here only
                fill(tensor, tensors[key])
    return model


def _by_hand(root: nn.Module, keys: Collection[str]) -> dict[str, nn.Parameter]:
    """Return the model's parameters for keys of parameters that were unfrozen by hand."""
    named = root.named_parameters(remove_duplicate=False)
    frozen = {f"{PREFIX}{n}".replace(".base_layer.", "."): p for n, p in named}
    plain = {key: key.replace(".base_layer.", ".") for key in sorted(keys)}
    parameters = {key: frozen[name] for key, name in plain.items() if name in frozen}
    check_in_memory(parameters)
    return {key: p for key, p in parameters.items() if p.is_floating_point()}


def own_names(
    tensors: Mapping[str, Tensor], expected: Iterable[str], shown: Callable[[str], str], where: str
) -> dict[str, Tensor]:
    """Rename tensors from ``shown(key)`` to the ``expected`` key; leave other names.

    Raises ValueError, beginning with ``where``, if two groups would share one pool.
    """
    ours: dict[str, str] = {}
    for key in expected:
        name = shown(key)
        if ours.setdefault(name, key) != key and name in tensors:
            raise ValueError(
                f"{where}: expected a pool for each group of layers, but {name} would be the pool "
                "of several groups: the model has layers of several shapes or paths of this name."
            )
    return {ours.get(key, key): tensor for key, tensor in tensors.items()}


def _tensors_to_fill(root: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the modules that an adapter is loaded into, patched or not.

    Weights of linear layers that accelerate moves to a device when they run are left out.
    """
    adapted = tuple(f"{name}." for group in plan.groups for name in group.names)
    others = (*plan.modules_to_save, *(name for rows in plan.tokens for name in rows.names))
    trained = tuple(f"{name}." for name in others)
    for name, module in root.named_modules():
        brought = is_linear(module) and stored_weight(module).is_meta
        brought = brought and device_of(module).type != "meta"
        for held in (module.named_parameters, module.named_buffers):
            for key, tensor in held(name, recurse=False):
                inside = f"{key}.".startswith(adapted) and not brought
                if inside or key.startswith(trained):
                    yield key, tensor


def _other_base(tensors: Mapping[str, Tensor], expected: Mapping[str, Any]) -> str:
    """Return a hint for an adapter that does not fit: which model it is for, and what to do."""
    if any(".rasa_mixing" in key or ".rasa_shared_" in key for key in tensors):
        return "It is a checkpoint of the official code, which rasa_ext.load_official reads."
    theirs, ours = (
        Counter(pattern(key) for key in keys if key.endswith(".rasa_A"))
        for keys in (tensors, expected)
    )
    kind = next((kind for kind in theirs if theirs[kind] != ours[kind]), "")
    layers = kind.removeprefix(PREFIX).removesuffix(".rasa_A")
    text = f"The adapter has {theirs[kind]} layers {layers}, and the model {ours[kind]}. "
    return (
        f"{text if kind else ''}Load it into the model that it was trained on, named in "
        "base_model_name_or_path of its adapter_config.json."
    )


def _expected(
    root: nn.Module, planned: list[dict[str, Adapter]], plan: Plan
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in an adapter file for ``root``, patched or not."""
    tensors = {key: tensor for group in planned for key, tensor in keyed(group).items()}
    tensors.update((f"{PREFIX}{key}", t) for key, t in saved_tensors(root, plan).items())
    expected = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for rows in plan.tokens:
        expected[f"{PREFIX}{rows_key(rows.names[0])}"] = (len(rows.ids), rows.width)
    return expected


def _check_indices(
    planned: list[dict[str, Adapter]], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raise ValueError if indices in a file, such as input features, exceed a layer's range."""
    for group in planned:
        first = next(iter(group))
        for name, adapter in group.items():
            if all(tensor.is_floating_point() for tensor in adapter.own.values()):
                break
            pool = {field: tensors[pool_key(first, field)] for field in adapter.pool}
            own = {key: tensors[own_key(name, key)].to(t.dtype) for key, t in adapter.own.items()}
            try:
                adapter.config.factors(own, pool, adapter.spec)
            except (IndexError, RuntimeError) as error:
                raise ValueError(
                    f"{where}: expected indices within the layer or its pool, but {name!r} has "
                    f"indices outside them ({error}). Nothing was changed."
                ) from None


def _tied(root: nn.Module, plan: Plan) -> list[tuple[str, str]]:
    """Return pairs of keys of tied weights in saved modules: the first key, and another."""
    saved = saved_tensors(root, plan)
    first: dict[nn.Parameter, str] = {}
    named = root.named_parameters(remove_duplicate=False)
    pairs = [(first.setdefault(live, name), name) for name, live in named if name in saved]
    return [(f"{PREFIX}{one}", f"{PREFIX}{other}") for one, other in pairs if one != other]


def _with_ties(root: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tied weights both names, of which older files hold one."""
    pairs = [pair for keys in _tied(root, plan) for pair in (keys, keys[::-1])]
    return {**{new: tensors[key] for key, new in pairs if key in tensors}, **tensors}


def _check_ties(root: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError if a file has different values for one weight of the model."""
    for one, other in _tied(root, plan):
        if not torch.equal(tensors[one], tensors[other].to(tensors[one].dtype)):
            raise ValueError(
                f"{where}: expected equal tensors for {one} and {other}, which are tied in the "
                "model, got different ones; untie them in the base. Nothing was changed."
            )
