"""``save_pretrained`` of a patched model: writes the adapter or, while merged, the merged model.

transformers' own method would write wrapped layers under names that ``from_pretrained`` does not
know: every linear layer of the loaded model would be random.
"""

from __future__ import annotations

import inspect
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from rasa_ext.base_layers.quantized import format_of
from rasa_ext.checkpoint.adapter import save_adapter
from rasa_ext.patching.state import (
    AFTER_PATCHING,
    adapted_experts,
    adapted_layers,
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


def replace_save_pretrained(model: nn.Module) -> list[Any]:
    """Replace ``save_pretrained`` of a patched model, if it has one; return what to remove."""
    if not hasattr(model, "save_pretrained"):
        return []
    replaced = model.__dict__["save_pretrained"] = SavePretrained(model)
    return [replaced, model.register_load_state_dict_post_hook(_nothing_missing)]


AFTER_PATCHING.append(replace_save_pretrained)


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
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
        push_to_hub: only for a merged model.
        options: arguments of the model's own method; an adapter ignores them.

    Raises:
        ValueError: an adapter is to be pushed, or the merged model cannot be written; the message
            has the call to use.
    """
    root = unwrap(model)
    if patch_state(root).merged is not None:
        options.update(is_main_process=is_main_process, push_to_hub=push_to_hub)
        _save_merged(root, save_directory, options)
        return
    if push_to_hub:
        raise ValueError(
            "push_to_hub: expected False for an adapter; call rasa_ext.save_adapter(model, folder) "
            "and rasa_ext.push_to_hub(folder, name), or merge first."
        )
    if not is_main_process:
        return
    folder = Path(save_directory)
    if re.fullmatch(r"checkpoint-\d+", folder.name) is None:
        save_adapter(root, folder)
        return
    with new_folder(folder) as unfinished:
        save_adapter(root, unfinished, card=None)
        tensors = {key: tensor.contiguous() for key, tensor in trained_state(root).items()}
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})


def trained_state(root: nn.Module) -> dict[str, Tensor]:
    """Return the part of ``state_dict`` that training changes: adapters and trained modules.

    It includes frozen tensors of an adapter, buffers of modules trained in full, and parameters
    unfrozen by hand. Tied tensors have their first name, since safetensors refuses more.
    """
    mine = {id(module.rows) for _, module in row_owners(root)}
    for _, owner in owners(root):
        mine |= {id(tensor) for tensor in owner.adapter().sources()}
    saved = tuple(f"{name}." for name in patch_state(root).plan.modules_to_save)
    found = {
        id(tensor): (name, tensor.detach())
        for name, tensor in reversed(root.state_dict(keep_vars=True).items())
        if id(tensor) in mine or name.startswith(saved) or getattr(tensor, "requires_grad", False)
    }
    return dict(reversed(found.values()))


def _nothing_missing(model: nn.Module, keys: Any) -> None:
    """Accept a state of exactly the trained tensors, which leaves the base unchanged: a hook."""
    missing, state = set(keys.missing_keys), model.state_dict(keep_vars=True)
    given = {id(tensor) for name, tensor in state.items() if name not in missing}
    if missing and given == {id(state[name]) for name in trained_state(model)}:
        keys.missing_keys.clear()


def _save_merged(root: nn.Module, folder: str | os.PathLike[str], options: dict[str, Any]) -> None:
    kind: Any = type(root)
    write = kind.save_pretrained
    quantized = any(isinstance(layer.merged_base, nn.Module) for _, layer in adapted_layers(root))
    quantized = quantized or any(format_of(module) is not None for module in root.modules())
    if quantized or "state_dict" not in inspect.signature(write).parameters:
        raise ValueError(
            "model: expected a merged transformers model of dense layers; call model = "
            "rasa_ext.merge_and_unload(model) and save that."
        )
    options["state_dict"] = _plain_state(root, options.get("state_dict"))
    write(root, folder, **options)


def _plain_state(root: nn.Module, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return a merged model's state under the names of the plain model."""
    adapted = (*adapted_layers(root), *adapted_experts(root), *trained_tokens(root))
    layers = [f"{name}." for name, _ in adapted]
    plain = {}
    for key, tensor in (root.state_dict() if state is None else state).items():
        prefix = next((each for each in layers if key.startswith(each)), None)
        if prefix is None:
            plain[key] = tensor
        elif key.startswith(f"{prefix}base_layer."):
            plain[prefix + key.removeprefix(f"{prefix}base_layer.")] = tensor
    return plain
