"""Measure memory: sizes of tensors made, bytes alive, and storages that autograd saves."""

import contextlib
import functools
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """A mode that records the number of elements of every tensor made, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [
            t for t in tree_leaves(result) if isinstance(t, Tensor) and _storage(t) not in known
        ]
        self.sizes += [t.untyped_storage().nbytes() // t.element_size() for t in made]
        return result


class LiveBytes(TorchDispatchMode):
    """A mode that counts the bytes of live storages made inside the mode, and their peak.

    It works for any device, but does not see memory that an operator allocates and frees itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):  # older storages are not counted
            if isinstance(tensor, Tensor):
                self._note(tensor, new=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, new=True)
        return result

    def _note(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.ref(storage, functools.partial(self._gone, key, size))

    def _gone(self, key: int, size: int, _: object) -> None:
        self._known.pop(key, None)
        self.now -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def saved_storages() -> Iterator[dict[int, int]]:
    """Collect the storages that autograd saves within the context: {address: bytes}."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is reused

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found
    found.pop(0, None)  # tensors without elements
