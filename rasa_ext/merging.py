"""Folding adapters into the base weights, and taking them out again: W += dW = Bt Ap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rasa_ext.modules import RasaLinear
from rasa_ext.patch import remove_layers
from rasa_ext.record import rasa_layers, record_of, unwrap


def delta_weight(layer: RasaLinear) -> Tensor:
    """dW = [B | B_pool] diag(d) [A ; A_pool] of one layer: (out, in), float32, without grad."""
    if not isinstance(layer, RasaLinear):
        raise TypeError(f"layer: expected a RasaLinear, got {type(layer).__name__}.")
    return _delta(layer, torch.float32)


def merge(model: nn.Module) -> float:
    """Fold every adapter into its base weight, so that the model runs at its base's speed.

    The sum is taken in float32 (float64 for float64 weights) and rounded once. The weights as they
    were are kept beside the merged ones, so that ``unmerge`` restores them exactly; use
    ``merge_and_unload`` where that memory matters.

    Returns:
        max |dW| over all layers. Merging a merged model changes nothing and returns the same.

    Raises:
        ValueError: a merged weight would not be finite, or a weight is shared with another module.
            No layer is then merged.
    """
    return _merge(model, keep_base=True)


def unmerge(model: nn.Module) -> None:
    """Give every base weight back the exact values it had before ``merge``; else do nothing."""
    record = record_of(model)
    with torch.no_grad():
        for _, layer in rasa_layers(model):
            if layer.merged_base is not None:
                layer.base_layer.weight.copy_(layer.merged_base)
                layer.merged_base = None
    record.merged = None


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Fold every adapter into its base weight and take the adapters off: a plain model.

    Needs no second copy of the weights. Raises as ``merge`` does, and the model is then unchanged.
    Returns the model.
    """
    _merge(model, keep_base=False)
    for _, layer in rasa_layers(model):
        layer.merged_base = None
    return remove_layers(model)


def unpatch(model: nn.Module) -> nn.Module:
    """Take the adapters off: base weights, modules and ``requires_grad`` flags as before the patch.

    Modules of ``modules_to_save`` keep the values that training gave them. Returns the model.
    """
    unmerge(model)
    return remove_layers(model)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes what its base computes (``modules_to_save`` stay).

    Merged weights are unmerged for its duration.
    """
    merged = record_of(model).merged is not None
    layers = [layer for _, layer in rasa_layers(model)]
    before = [layer.disabled for layer in layers]
    unmerge(model)
    try:
        for layer in layers:
            layer.disabled = True
        yield model
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.disabled = value
        if merged:
            merge(model)


def _merge(model: nn.Module, keep_base: bool) -> float:
    record = record_of(model)
    if record.merged is not None:
        return record.merged
    layers = rasa_layers(model)
    _refuse_shared(model, layers)
    largest = 0.0
    with torch.no_grad():
        # One pass to look and one to write, rather than one that holds every new weight.
        for name, layer in layers:
            merged, change = _merged_weight(layer)
            if not torch.isfinite(merged).all():
                raise ValueError(
                    f"model: expected finite merged weights, but {name!r} would hold values that "
                    f"are not finite in {merged.dtype}; nothing was merged."
                )
            largest = max(largest, change)
        try:
            for _, layer in layers:
                weight = layer.base_layer.weight
                merged, _ = _merged_weight(layer)
                if keep_base:
                    layer.merged_base = weight.detach().clone()
                weight.copy_(merged)
        except BaseException:  # out of memory, or an interrupt: all layers or none
            unmerge(model)
            raise
    record.merged = largest
    return largest


def _merged_weight(layer: RasaLinear) -> tuple[Tensor, float]:
    """W + dW in W's dtype and orientation, and max |dW|."""
    weight = layer.base_layer.weight
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    delta = _delta(layer, wide)
    change = delta.abs().max().item()
    delta = delta.t() if layer.transposed else delta
    return delta.add_(weight).to(weight.dtype), change


def _delta(layer: RasaLinear, dtype: torch.dtype) -> Tensor:
    Ap, Bt = layer.factors(dtype)
    return Bt @ Ap


def _refuse_shared(model: nn.Module, layers: list[tuple[str, RasaLinear]]) -> None:
    """A weight that stands elsewhere too cannot take one layer's change."""
    root = unwrap(model)
    users: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        users.setdefault(parameter.data_ptr(), []).append(name)
    for name, layer in layers:
        # A module registered under several names is one layer; only other modules count.
        others = [
            other
            for other in users[layer.base_layer.weight.data_ptr()]
            if root.get_submodule(other.rpartition(".")[0]) is not layer.base_layer
        ]
        if others:
            raise ValueError(
                f"model: the weight of {name!r} is shared with {', '.join(others)}, which a merge "
                "would change as well; untie the weights, or export instead of merging."
            )
