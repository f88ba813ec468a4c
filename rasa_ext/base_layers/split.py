"""Base layers that transformers' ``tp_plan`` or torch's ``parallelize_module`` splits.

A "colwise" layer holds some rows of the weight (out, in) and returns these outputs. A "rowwise"
layer holds some columns, reads these inputs, and sums the products over the processes. The weight
is a DTensor of the whole shape. The style is in a closure: of ``forward``, which transformers
replaces, or of torch's hooks.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.sharded import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Split(NamedTuple):
    """The part of a linear layer on this process."""

    dim: int
    """The dimension of the weight (out, in) that is cut: 0 for "colwise", 1 for "rowwise"."""
    start: int
    stop: int
    """The part's rows or columns, from ``start`` to before ``stop``."""
    processes: int
    group: ProcessGroup


def split_of(base: nn.Module) -> Split | None:
    """Return the part of a linear layer on this process, or None if no known style splits it."""
    weight: Any = base._parameters.get("weight")
    style = _style(base)
    if style is None or not is_dtensor(weight) or type(base) is not nn.Linear:
        return None
    mesh, (placement,) = weight.device_mesh, weight.placements
    if style.name == "ColwiseParallel":
        dim, usual = 0, style.reads.is_replicate() and style.gives.is_shard()
    elif style.name == "RowwiseParallel":
        dim, usual = 1, style.reads.is_shard() and style.gives.is_replicate()
    else:
        return None
    if mesh.ndim != 1 or not (usual and style.local):
        return None
    if not placement.is_shard(dim) and not placement.is_shard(dim - 2):
        return None
    # DTensor splits like torch.chunk: the last processes may have less, or nothing.
    size, processes, rank = weight.shape[dim], mesh.size(), mesh.get_local_rank()
    size_of_part = -(-size // processes)
    start, stop = min(rank * size_of_part, size), min((rank + 1) * size_of_part, size)
    return Split(dim, start, stop, processes, mesh.get_group())


def local_part(base: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return this process's part of a frozen layer's weight and bias, in ``dtype``."""
    parts: list[Tensor | None] = []
    for name in ("weight", "bias"):
        whole: Any = base._parameters.get(name)
        if whole is not None and whole.requires_grad:
            raise RuntimeError(
                f"expected a frozen base layer, but its {name}, which is split over processes, "
                "requires grad; only the adapter over such a layer can be trained."
            )
        here = whole.to_local() if whole is not None and is_dtensor(whole) else whole
        parts.append(None if here is None else here.detach().to(dtype))
    weight, bias = parts
    assert weight is not None
    return weight, bias


def refusal(base: nn.Module) -> str | None:
    """Return why a sharded or parallel layer cannot be adapted, or None if it can."""
    style = _style(base)
    if style is None:
        weight: Any = base._parameters.get("weight")
        if is_dtensor(weight):
            return (
                "has a weight that is sharded over processes, expected a whole one; patch the "
                "model first, then shard it"
            )
        return None
    if split_of(base) is None:
        return (
            f"runs in the parallel style {style.name} with layouts or a weight "
            "that adapters do not support, expected 'colwise' or 'rowwise' of nn.Linear; give it "
            "one of them"
        )
    return None


class _Style(NamedTuple):
    """A parallel style of transformers or torch, and what a layer reads and gives."""

    name: str
    reads: Any
    gives: Any
    local: bool
    """Whether the output is a plain tensor."""


def _style(base: nn.Module) -> _Style | None:
    """Return the style of a module's tensor parallelism, or None."""
    if (style := _from_closure(base.__dict__.get("forward"), "self", "mesh")) is not None:
        reads, gives = style.input_layouts, style.output_layouts
        return _Style(type(style).__name__, reads, gives, style.use_local_output)
    before = (_from_closure(hook, "input_fn") for hook in base._forward_pre_hooks.values())
    after = (_from_closure(hook, "output_fn") for hook in base._forward_hooks.values())
    reads, gives = (
        next((hook for hook in closures if isinstance(hook, partial)), None)
        for closures in (before, after)
    )
    if reads is None or gives is None:
        return None
    ((read,), _), ((given,), local) = reads.args, gives.args
    return _Style(gives.func.__qualname__.partition(".")[0], read, given, local)


def _from_closure(function: Any, name: str, *others: str) -> Any:
    """Return a variable of a function's closure, or None unless the closure has all the names."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    closes_over = {name, *others} <= set(names)
    return function.__closure__[names.index(name)].cell_contents if closes_over else None
