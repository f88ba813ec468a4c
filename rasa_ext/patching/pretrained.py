"""Replacement for ``save_pretrained`` of a patched transformers model."""

from __future__ import annotations

import weakref
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from rasa_ext.patching.state import owners, patch_state
from rasa_ext.patching.tokens import row_owners

_NAME = "save_pretrained"


class SavePretrained:
    """``save_pretrained`` as an attribute of one patched model; a copied model gets a new one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # a cycle would hold the model's memory

    def __call__(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Write what ``checkpoint.pretrained`` describes."""
        # Above this module, which must not need it to be imported.
        write = import_module("rasa_ext.checkpoint.pretrained").save_pretrained
        write(self._model(), save_directory, *args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])


def replace_save_pretrained(model: nn.Module) -> list[Any]:
    """Replace ``save_pretrained`` of a model, if it has one; return the hooks to remove."""
    if not hasattr(model, _NAME):
        return []
    model.__dict__[_NAME] = SavePretrained(model)
    return [model.register_load_state_dict_post_hook(_nothing_missing)]


def restore_save_pretrained(model: nn.Module) -> None:
    """Restore ``save_pretrained`` of a model that is no longer patched."""
    model.__dict__.pop(_NAME, None)


def trained_state(root: nn.Module) -> dict[str, Tensor]:
    """Return the part of ``state_dict`` that training changes: adapters and trained modules.

    It includes frozen tensors of an adapter, and buffers of modules trained in full.
    """
    mine = {id(module.rows) for _, module in row_owners(root)}
    for _, owner in owners(root):
        mine |= {id(tensor) for tensor in owner.adapter().sources()}
    saved = tuple(f"{name}." for name in patch_state(root).plan.modules_to_save)
    state = root.state_dict(keep_vars=True)
    return {k: t.detach() for k, t in state.items() if id(t) in mine or k.startswith(saved)}


def _nothing_missing(model: nn.Module, keys: Any) -> None:
    """Hook: accept a state of exactly the trained tensors, which leaves the base unchanged."""
    missing = set(keys.missing_keys)
    if missing and missing == set(model.state_dict()) - set(trained_state(model)):
        keys.missing_keys.clear()
