"""Base layers that transformers' ``tp_plan`` splits over processes.

A "colwise" layer holds some rows of the weight (out, in) and returns these outputs. A "rowwise"
layer holds some columns, reads these inputs, and sums the products over the processes. The weight
is a DTensor of the whole shape, and ``forward`` is replaced by a function with the style in a
closure.
"""

from __future__ import annotations

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
    reads, gives = style.input_layouts, style.output_layouts
    name = type(style).__name__
    if name == "ColwiseParallel":
        dim, usual = 0, reads.is_replicate() and gives.is_shard()
    elif name == "RowwiseParallel":
        dim, usual = 1, reads.is_shard() and gives.is_replicate()
    else:
        return None
    if mesh.ndim != 1 or not (usual and style.use_local_output):
        return None
    if not placement.is_shard(dim) and not placement.is_shard(dim - 2):
        return None
    # DTensor splits like torch.chunk: the last processes may have less, or nothing.
    size, processes, rank = weight.shape[dim], mesh.size(), mesh.get_local_rank()
    each = -(-size // processes)
    start, stop = min(rank * each, size), min((rank + 1) * each, size)
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
                "has a weight that is sharded over processes, expected a whole one; patch first, "
                "then call rasa_ext.distributed.shard_model(model, mesh)"
            )
        return None
    if split_of(base) is None:
        return (
            f"runs in transformers' parallel style {type(style).__name__} with layouts or a weight "
            "that adapters do not support, expected 'colwise' or 'rowwise' of nn.Linear; leave it "
            "out with exclude_modules"
        )
    return None


def _style(base: nn.Module) -> Any:
    """Return the style of transformers' tensor parallelism of a module, or None."""
    forward: Any = base.__dict__.get("forward")
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    if "mesh" not in names or "self" not in names:
        return None
    return forward.__closure__[names.index("self")].cell_contents
