"""``save_pretrained`` of a patched model: writes the adapter or, while merged, the merged model.

transformers' own method would write wrapped layers under names that ``from_pretrained`` does not
know: every linear layer of the loaded model would be random. So it is refused for a model of which
only a part is patched.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from rasa_ext.base_layers.quantized import format_of
from rasa_ext.checkpoint.adapter import adapter_tensors, names_in_state, save_adapter, write_tensors
from rasa_ext.checkpoint.card import PLAIN
from rasa_ext.checkpoint.files import check_tensors
from rasa_ext.patching.state import (
    PatchState,
    adapted_experts,
    adapted_layers,
    check_merge_is_current,
    inner_name,
    owners,
    patch_state,
    unwrap,
)
from rasa_ext.patching.tokens import row_owners, trained_tokens
from rasa_ext.writing import new_folder


class SavePretrained:
    """``save_pretrained`` as an attribute of one patched model; a copied model gets a new one."""

    def __init__(self, model: nn.Module) -> None:
        # A strong reference would be a cycle, which holds the model's memory.
        self._model: Callable[[], Any] = weakref.ref(model)

    def __call__(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Write what ``save_pretrained`` below describes."""
        save_pretrained(self._model(), save_directory, *args, **options)

    def remove(self) -> None:
        """Restore the model's own method."""
        self._model().__dict__.pop("save_pretrained", None)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])


def let_it_save(model: nn.Module, state: PatchState) -> None:
    """Replace ``save_pretrained`` of a patched model, if it has one, until it is unpatched."""
    state.hooks.append(model.register_state_dict_pre_hook(_refuse_part))
    if hasattr(model, "save_pretrained"):
        replaced = model.__dict__["save_pretrained"] = SavePretrained(model)
        state.hooks += [replaced, model.register_load_state_dict_post_hook(_nothing_missing)]


def _refuse_part(model: nn.Module, prefix: str, _keep_vars: bool) -> None:
    """Refuse transformers' ``save_pretrained`` of a model around the patched one: a hook.

    Trainer's checkpoints are written with a warning: Trainer reads the same names again.
    """
    frame = sys._getframe() if prefix else None
    while frame is not None:
        variables = frame.f_locals if frame.f_code.co_name == "save_pretrained" else {}
        outer, part = variables.get("self"), prefix.rstrip(".")
        # PEFT writes only the adapters that it made.
        if (
            isinstance(outer, nn.Module)
            and outer is not model
            and not hasattr(outer, "peft_config")
        ):
            text = (
                f"model: expected a model patched as a whole, but only {part!r} of this "
                f"{type(outer).__name__} is patched, and from_pretrained would not know its "
                f"layers; call rasa_ext.save_adapter(model.{part}, directory) or, to save the "
                f"whole model, rasa_ext.merge_and_unload(model.{part}) first."
            )
            if not _is_checkpoint(variables.get("save_directory", "")):
                raise ValueError(text)
            warnings.warn(text, stacklevel=2)
            return
        frame = frame.f_back


def _is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    return re.fullmatch(r"checkpoint-\d+", Path(folder).name) is not None


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write the adapter of a patched model, or the merged model if it is merged.

    In Trainer's folders ``checkpoint-N``, ``model.safetensors`` also has the trained tensors under
    the model's names: Trainer resumes from it.

    Args:
        model: a patched model, whose ``save_pretrained`` this is.
        save_directory: created if missing.
        is_main_process: False writes nothing.
        state_dict: the values to write, such as averages, by name in ``model.state_dict()``; by
            default the model's.
        push_to_hub: only for a merged model.
        options: arguments of the model's own method; an adapter ignores them.

    Raises:
        ValueError: an adapter is to be pushed, ``state_dict`` lacks a trained tensor, or the merged
            model cannot be written; the message has the call to use.
    """
    root = unwrap(model)
    state = patch_state(root)
    if state_dict is not None:
        known = root.state_dict()
        state_dict = {k if k in known else inner_name(k): t for k, t in state_dict.items()}
    if state.merged is not None:
        options.update(is_main_process=is_main_process, push_to_hub=push_to_hub)
        _save_merged(root, save_directory, state_dict, options)
        return
    if push_to_hub:
        raise ValueError(
            "push_to_hub: expected False for an adapter; call rasa_ext.save_adapter(model, folder) "
            "and rasa_ext.push_to_hub(folder, name), or merge first."
        )
    if not is_main_process:
        return
    if state_dict is None and not _is_checkpoint(Path(save_directory)):
        save_adapter(model, save_directory)
        return
    tensors = {key: tensor.detach() for key, tensor in adapter_tensors(root).items()}
    trained = trained_state(root)
    if state_dict is not None:
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        names = names_in_state(root, adapter_tensors(root))
        tensors = {key: state_dict[name] for key, name in names.items() if name in state_dict}
        check_tensors(tensors, shapes, "state_dict")
        trained = {name: state_dict.get(name, tensor) for name, tensor in trained.items()}
    folder = Path(save_directory)
    if not _is_checkpoint(folder):
        write_tensors(root, folder, state.plan, tensors, PLAIN)
        return
    with new_folder(folder) as unfinished:
        write_tensors(root, unfinished, state.plan, tensors)
        ready = {name: tensor.contiguous() for name, tensor in trained.items()}
        save_file(ready, unfinished / "model.safetensors", metadata={"format": "pt"})


def trained_state(root: nn.Module) -> dict[str, Tensor]:
    """Return the part of ``state_dict`` that training changes: adapters and trained modules.

    It includes frozen tensors of an adapter, buffers of modules trained in full, and parameters
    unfrozen by hand. Tied tensors have their first name, since safetensors refuses more.
    """
    mine = {id(module.rows) for _, module in row_owners(root)}
    for _, owner in owners(root):
        mine |= {id(tensor) for tensor in owner.adapter().sources()}
    saved = tuple(f"{name}." for name in patch_state(root).plan.modules_to_save)
    tensors = {
        id(tensor): (name, tensor.detach())
        for name, tensor in reversed(root.state_dict(keep_vars=True).items())
        if id(tensor) in mine or name.startswith(saved) or getattr(tensor, "requires_grad", False)
    }
    return dict(reversed(tensors.values()))


def _nothing_missing(model: nn.Module, keys: Any) -> None:
    """Accept a state dict of only the trained tensors, which leaves the base unchanged: a hook."""
    missing, state = set(keys.missing_keys), model.state_dict(keep_vars=True)
    given = {id(tensor) for name, tensor in state.items() if name not in missing}
    if missing and given == {id(state[name]) for name in trained_state(model)}:
        keys.missing_keys.clear()


def _save_merged(
    root: nn.Module,
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor] | None,
    options: dict[str, Any],
) -> None:
    kind: Any = type(root)
    write = kind.save_pretrained
    quantized = any(isinstance(layer.merged_base, nn.Module) for _, layer in adapted_layers(root))
    quantized = quantized or any(format_of(module) is not None for module in root.modules())
    if quantized or "state_dict" not in inspect.signature(write).parameters:
        raise ValueError(
            "model: expected a merged transformers model of dense layers; call model = "
            "rasa_ext.merge_and_unload(model) and save that."
        )
    check_merge_is_current(root)
    write(root, folder, state_dict=_plain_state(root, state), **options)


def _plain_state(root: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return a merged model's state under the names of the plain model."""
    adapted = (*adapted_layers(root), *adapted_experts(root), *trained_tokens(root))
    layers = [f"{name}." for name, _ in adapted]
    plain = {}
    for key, tensor in (root.state_dict() if state is None else state).items():
        if "rasa_pool_" in key:
            continue
        prefix = next((layer for layer in layers if key.startswith(layer)), None)
        if prefix is None:
            plain[key] = tensor
        elif key.startswith(f"{prefix}base_layer."):
            plain[prefix + key.removeprefix(f"{prefix}base_layer.")] = tensor
    return plain
