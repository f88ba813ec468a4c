"""Merging into a quantized base: the layer becomes dense, and the error is measured.

Most of an adapter's small change would be lost if the sum were quantized again. So the merged layer
is dense: the dequantized weight plus dW, rounded once. The quantized layer is stored beside it and
put back unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.layouts import Format
from rasa_ext.base_layers.linear import LinearLayer, stored_weight
from rasa_ext.base_layers.quantized import format_of, stored_bytes
from rasa_ext.nn.adapted_linear import AdaptedLinear
from rasa_ext.patching.parts import Part, check_finite

PROBES = 32
"""Number of random input rows on which a merged layer is compared with the original."""


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """Report on one layer that became dense."""

    format: str
    dtype: torch.dtype
    before: int
    """Bytes of the quantized weight, scales included."""
    after: int
    """Bytes of the dense weight."""
    error: float
    """Norm of the merged layer's output error, relative to the norm of the output."""


def dequantized_sum(part: Part, delta: Tensor, wanted: torch.dtype | None, argument: str) -> Tensor:
    """Compute a quantized layer's W + delta (out, in), rounded once, in the dtype for a dense base.

    The dtype is ``wanted``, else the layer's dtype before quantization. Raises ValueError, which
    begins with ``argument``, if the sum is not finite, and RuntimeError if the weight cannot be
    read.
    """
    fmt: Any = format_of(part.base)
    bias = part.base.bias
    try:
        dequantized = fmt.dequantize(part.base)
    except (NotImplementedError, RuntimeError) as error:
        raise RuntimeError(
            f"model: the weight of {part.name!r} ({fmt.name}) cannot be dequantized here, which a "
            f"merge needs: {error}; nothing was merged, export the adapter instead."
        ) from error
    before = fmt.original_dtype(part.base) if bias is None else bias.dtype
    merged: Tensor = (dequantized.to(delta.dtype) + delta).to(wanted or before or torch.float32)
    check_finite([part], [merged], argument)
    return merged


@torch.no_grad()
def dequantize_and_merge(
    part: Part, delta: Tensor, wanted: torch.dtype | None, argument: str
) -> Dequantized:
    """Replace a layer's quantized base by a dense one that holds ``dequantized_sum``.

    The quantized base becomes the layer's ``merged_base``. An error leaves the layer unchanged.
    """
    base, merged = part.base, dequantized_sum(part, delta, wanted, argument)
    fmt: Any = format_of(base)
    out_features, in_features = merged.shape
    dense = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=merged.dtype)
    dense.weight = nn.Parameter(merged, requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().to(merged.dtype), requires_grad=False)
    dense.train(base.training)
    done = Dequantized(
        fmt.name,
        merged.dtype,
        stored_bytes(base),
        merged.nbytes,
        _output_error(base, fmt, dense, delta),
    )
    part.owner.__dict__["merged_base"] = base  # stored, but not as a submodule
    part.owner.base_layer = dense
    return done


def restore_quantized(layer: AdaptedLinear) -> None:
    """Put the original quantized base back, on the device of the dense one."""
    base, device = layer.merged_base, layer.base_layer.weight.device
    layer.base_layer = base if stored_weight(base).device == device else base.to(device)
    layer.merged_base = None


def warn_dequantized(changes: Sequence[Dequantized], stacklevel: int) -> None:
    """Warn about layers that became dense, with the largest errors."""
    if not changes:
        return
    kinds = Counter((change.format, change.dtype) for change in changes)
    what = " and ".join(f"{n} of {fmt} in {dtype}" for (fmt, dtype), n in kinds.items())
    before, after = (sum(getattr(c, f) for c in changes) / 2**20 for f in ("before", "after"))
    warnings.warn(
        f"merging into a dequantized weight: relative error of a layer's output at most "
        f"{max(change.error for change in changes):.1e}. Layers made dense: {what}; "
        f"{after:.1f} MiB instead of {before:.1f}.",
        stacklevel=stacklevel + 1,
    )


def model_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first float parameter outside adapted layers and pools, or None.

    It is often the embedding's, and thus the dtype of a linear layer's input.
    """
    adapted = [layer for layer in model.modules() if isinstance(layer, AdaptedLinear)]
    mine: set[Tensor] = {p for layer in adapted for p in layer.parameters()}
    mine |= {t for layer in adapted for a in layer.adapters() for t in a.pool.values()}
    others = (p for p in model.parameters() if p not in mine)
    return next((p.dtype for p in others if p.is_floating_point()), None)


def _output_error(base: LinearLayer, fmt: Format, dense: nn.Linear, delta: Tensor) -> float:
    """Measure the output error of the dense layer against the quantized one plus the adapter."""
    device, dtype = dense.weight.device, dense.weight.dtype
    own = fmt.original_dtype(base) or dtype  # torchao's layers accept no other
    generator = torch.Generator().manual_seed(0)  # leaves torch's global generator alone
    x = torch.randn(PROBES, dense.in_features, generator=generator).to(device, own).to(dtype)
    before = _copy_to_run(base)(x.to(own)).to(delta.dtype) + x.to(delta.dtype) @ delta.t()
    scale = before.norm().item()
    return (dense(x).to(delta.dtype) - before).norm().item() / scale if scale else 0.0


def _copy_to_run(base: LinearLayer) -> LinearLayer:
    """Copy a layer to run it: Linear4bit stores the dtype of the first input and casts the bias."""
    probe = copy.copy(base)
    probe._parameters = dict(base._parameters)
    if base.bias is not None:
        probe._parameters["bias"] = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    return probe
