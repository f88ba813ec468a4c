"""What a patched model of transformers does in place of its own ``save_pretrained``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rasa_ext.patching.state import owners, patch_state
from rasa_ext.patching.tokens import row_owners

_NAME = "save_pretrained"
_write: Callable[..., None] | None = None


def writes_pretrained(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function of a model and a folder what ``save_pretrained`` calls."""
    global _write
    _write = function
    return function


class SavePretrained:
    """``save_pretrained`` as an attribute of one patched model, which a copy has of itself."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # no circle, which would keep the model's memory

    def __call__(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Write what ``checkpoint.pretrained`` says."""
        assert _write is not None
        _write(self._model(), save_directory, *args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])


def replace_save_pretrained(model: nn.Module) -> list[Any]:
    """Let a model that has ``save_pretrained`` write its adapter; give the hooks to remove."""
    if not hasattr(model, _NAME):
        return []
    model.__dict__[_NAME] = SavePretrained(model)
    return [model.register_load_state_dict_post_hook(_nothing_missing)]


def restore_save_pretrained(model: nn.Module) -> None:
    """Give a model that is no longer patched its own method again."""
    model.__dict__.pop(_NAME, None)


def trained_state(root: nn.Module) -> dict[str, Tensor]:
    """Give what training changes of a patched model's ``state_dict``: an adapter, trained modules.

    So are frozen tensors of an adapter, and buffers of modules that are trained in full.
    """
    mine = {id(module.rows) for _, module in row_owners(root)}
    for _, owner in owners(root):
        mine |= {id(tensor) for tensor in owner.adapter().sources()}
    saved = tuple(f"{name}." for name in patch_state(root).plan.modules_to_save)
    state = root.state_dict(keep_vars=True)
    return {k: t.detach() for k, t in state.items() if id(t) in mine or k.startswith(saved)}


def _nothing_missing(model: nn.Module, keys: Any) -> None:
    """Hook: a state of all that is trained, and nothing else, is whole: the base stays as it is."""
    missing = set(keys.missing_keys)
    if missing and missing == set(model.state_dict()) - set(trained_state(model)):
        keys.missing_keys.clear()
