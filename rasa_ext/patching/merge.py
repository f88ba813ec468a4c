"""Merging adapters into the base weights and unmerging them: W += dW = Bp^T Ap.

These calls take patched models. ``parts`` describes the matrices that an adapter changes, and
``fold`` merges them: equal shapes together, quantized layers one by one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.experts import is_transposed
from rasa_ext.base_layers.linear import check_weight_is_stored, stored_weight
from rasa_ext.base_layers.quantized import forget_quantizer, format_of
from rasa_ext.base_layers.sharded import check_base_whole
from rasa_ext.nn.rasa import RasaLinear
from rasa_ext.nn.rasa_experts import RasaExperts
from rasa_ext.nn.trained_tokens import TrainedTokens
from rasa_ext.patching.fold import Merging, check_parts, merge_parts, unmerge_parts
from rasa_ext.patching.merge_quantized import model_dtype, warn_dequantized
from rasa_ext.patching.parts import Part, chunks_of, deltas_of, linear_part, stack_parts
from rasa_ext.patching.patch import remove_layers
from rasa_ext.patching.state import (
    adapted_experts,
    adapted_layers,
    adapter_checksums,
    check_merge_is_current,
    patch_state,
    unwrap,
)
from rasa_ext.patching.tokens import (
    check_rows_finite,
    merge_rows,
    row_owners,
    trained_tokens,
    unmerge_rows,
)

_SWITCHING = threading.Lock()  # held while a model's adapters are switched off or on


def delta_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Compute the weight change dW = [B | B_pool] diag(d) [A ; A_pool] of every adapted layer.

    The formula is from arXiv 2503.12576, section 3. Layers of one group follow each other. They are
    computed in chunks of at most 64 MiB of dW (or one layer), one product per chunk. A dW is a view
    of its chunk, so it holds the whole chunk in memory. Stacked expert weights come last, each
    whole.

    Args:
        model: a patched model, merged or not.

    Returns:
        An iterator over ``(name, dW)``, with dW (out, in) in float32 and without grad. For a
        stacked weight, name and layout are the parameter's: (E, out, in) or (E, in, out).

    Raises:
        TypeError, ValueError: at the first step, the model is no module, or not patched.
        RuntimeError: the adapter is sharded over processes.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> largest = {name: dW.abs().max().item() for name, dW in rasa_ext.delta_weights(model)}
        >>> max(largest.values())  # every B starts at zero
        0.0
    """
    patch_state(model)
    for chunk in chunks_of(_linear_parts(model)):
        deltas = deltas_of(chunk, torch.float32)
        yield from ((part.name, delta) for part, delta in zip(chunk, deltas, strict=True))
    for name, parts in _stack_parts(model):
        delta = deltas_of(parts, torch.float32)
        yield name, delta.mT if is_transposed(parts[0].base) else delta


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> float:
    """Merge every adapter into its base weight, so that the model runs at the base's speed.

    W becomes W + dW, with dW from ``delta_weights`` (arXiv 2503.12576, section 3). The sum is taken
    in float32 (float64 for float64 weights) and rounded once. A copy of the original weights is
    stored, from which ``unmerge`` restores them exactly; ``merge_and_unload`` saves that memory. A
    quantized layer becomes dense, with a warning that states the error of the output.

    Args:
        model: a patched model.
        dtype: dtype of the dense weights that replace quantized ones. Defaults to the dtype of the
            model's first float parameter, usually the embedding.

    Returns:
        max |dW| over all layers and entries. Merging a merged model changes nothing and returns
        that value again.

    Raises:
        TypeError, ValueError: ``dtype`` is no float dtype, or no adapted layer is quantized.
        ValueError: a merged weight would not be finite, or a weight is shared with another module,
            sharded over processes, parametrized, or rounded in each forward. No layer is then
            merged.
        RuntimeError: a CUDA graph is being captured, a quantized weight cannot be read, the model
            is inside ``disable_adapter``, or the adapter has changed since an earlier merge.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> rasa_ext.merge(model)  # not trained yet, so nothing changes
        0.0
        >>> rasa_ext.unmerge(model)
    """
    return _merge(model, dtype, keep_base=True)


def unmerge(model: nn.Module) -> None:
    """Restore the exact values that every base weight had before ``merge``.

    The adapter is active again. A model that is not merged stays as it is.

    Args:
        model: a patched model.

    Returns:
        Nothing; the model is changed in place.

    Raises:
        TypeError, ValueError: the model is no module, or not patched.
        RuntimeError: the model is merged and a CUDA graph is being captured.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> before = {name: p.clone() for name, p in model.named_parameters()}
        >>> largest = rasa_ext.merge(model)
        >>> rasa_ext.unmerge(model)
        >>> all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        True
    """
    state = patch_state(model)
    if state.merged is None:
        return
    _check_not_capturing()
    unmerge_parts(_parts(model))
    unmerge_rows(unwrap(model))
    state.merged = None


def merge_and_unload(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Merge every adapter into its base weight and remove the adapters.

    W becomes W + dW (arXiv 2503.12576, section 3), as in ``merge``, but without a second copy of
    the weights. Quantized weights are freed only at the end.

    Args:
        model: a patched model.
        dtype: as for ``merge``.

    Returns:
        The same object, with plain linear layers.

    Raises:
        TypeError, ValueError, RuntimeError: as for ``merge``; the model is then unchanged.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> model = rasa_ext.merge_and_unload(model)
        >>> any(isinstance(module, rasa_ext.RasaLinear) for module in model.modules())
        False
    """
    _merge(model, dtype, keep_base=False)
    for _, layer in adapted_layers(model):
        layer.merged_base = None
    return forget_quantizer(remove_layers(model))


def unpatch(model: nn.Module) -> nn.Module:
    """Remove the adapters and restore base weights, modules and ``requires_grad`` flags.

    A merged model is unmerged first. Modules of ``modules_to_save``, and what was unfrozen by hand,
    keep their trained values; what ``load_adapter`` brought beside the adapter goes.

    Args:
        model: a patched model.

    Returns:
        The same object, as it was before ``patch_model``.

    Raises:
        TypeError, ValueError, RuntimeError: as for ``unmerge``.

    Example:
        >>> before = list(model.state_dict())
        >>> model = rasa_ext.unpatch(rasa_ext.patch_model(model, rank=8, k=1))
        >>> list(model.state_dict()) == before
        True
    """
    unmerge(model)
    with torch.no_grad():
        for parameter, value in patch_state(model).replaced.items():
            parameter.copy_(value)
    return remove_layers(model)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model without adapters within the context; ``modules_to_save`` stay trained.

    Merged weights are unmerged meanwhile. The model can thus be its own reference in preference
    training. Contexts may overlap in any order and across threads: the adapter is back when the
    last one ends.

    Args:
        model: a patched model.

    Returns:
        A context manager that yields the model.

    Raises:
        TypeError, ValueError, RuntimeError: on entering, as for ``unmerge``.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> with rasa_ext.disable_adapter(model) as base, torch.no_grad():
        ...     logits = base(torch.tensor([[1, 2, 3]])).logits
    """
    state = patch_state(model)
    with _SWITCHING:
        if not state.disabled:
            merged = state.merged is not None
            unmerge(model)
            state.merge_again = merged
            _switch(model, off=True)
        state.disabled += 1
    try:
        yield model
    finally:
        with _SWITCHING:
            state.disabled -= 1
            if not state.disabled:
                _switch(model, off=False)
                if state.merge_again:
                    _merge(model, state.dense_dtype, keep_base=True, quiet=True)


def _switch(model: nn.Module, off: bool) -> None:
    for module in unwrap(model).modules():
        if isinstance(module, RasaLinear | RasaExperts | TrainedTokens):
            module.disabled = off


def _merge(
    model: nn.Module, dtype: torch.dtype | None, keep_base: bool, quiet: bool = False
) -> float:
    state, root = patch_state(model), unwrap(model)
    if state.merged is not None:
        check_merge_is_current(root)
        return state.merged
    if state.disabled:
        raise RuntimeError("model: leave rasa_ext.disable_adapter(model) before merging.")
    _check_not_capturing()
    tables = {name: module.base_layer for name, module in trained_tokens(root)}
    layers = {name: layer.base_layer for name, layer in adapted_layers(root)}
    check_base_whole(model, {**layers, **tables})
    check_rows_finite((repr(n), m.rows, m.base_layer.weight) for n, m in row_owners(root))
    parts = _parts(root)
    _check_dtype(dtype, parts)
    dense = [part for part in parts if not part.is_quantized]
    _check_in_memory(dense)
    check_own_weights(root, [(part.name, part.base, part.weight) for part in dense])
    merging = Merging(dtype or model_dtype(root), keep_base)
    if not keep_base:  # this cannot be undone: check all results before the first write
        check_parts(parts, merging.dtype, "model")
    try:
        largest = max(merge_rows(root), merge_parts(parts, merging, "model"))
    except BaseException:
        unmerge_rows(root)
        raise
    state.merged, state.dense_dtype = largest, dtype
    state.merged_of = adapter_checksums(root)
    if not quiet:
        warn_dequantized(merging.changes, stacklevel=3)
    return largest


def _parts(model: nn.Module) -> list[Part]:
    """List the matrices that the model's adapters change."""
    return _linear_parts(model) + [part for _, parts in _stack_parts(model) for part in parts]


def _linear_parts(model: nn.Module) -> list[Part]:
    return [linear_part(n, layer, [layer.adapter()]) for n, layer in adapted_layers(model)]


def _stack_parts(model: nn.Module) -> Iterator[tuple[str, list[Part]]]:
    """Yield the parts of each adapted stacked weight, with the parameter's name."""
    for path, experts in adapted_experts(model):
        for key, stack in experts.stacks().items():
            name, adapters = f"{path}.{key}", [stack.adapter()]
            yield name, stack_parts(name, experts.base_layer, key, adapters, experts)


def _check_dtype(dtype: torch.dtype | None, parts: list[Part]) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}.")
    if not any(part.is_quantized for part in parts):
        raise ValueError(
            f"dtype: expected None, because no adapted layer is quantized, got {dtype}; "
            "model.to(dtype) converts layers that are not quantized."
        )


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _check_not_capturing() -> None:
    """Raise during a capture: recorded work has not run yet, but the state would say it has."""
    if _is_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and a merge must read results back; merge and unmerge "
            "before or after the capture."
        )


def _check_in_memory(parts: Iterable[Part]) -> None:
    """Raise ValueError if a weight is not in memory, or is computed from others."""
    if offloaded := next((part.name for part in parts if part.weight.is_meta), None):
        raise ValueError(
            f"model: expected base weights to merge into, but the weight of {offloaded!r} is "
            "offloaded or on the meta device; load the base without offloading, or export."
        )
    for part in parts:
        if part.expert is None:
            check_weight_is_stored(part.name, part.base)


def check_own_weights(root: nn.Module, weights: Iterable[tuple[str, nn.Module, Tensor]]) -> None:
    """Raise ValueError if merging into a weight would change another module, too.

    ``weights`` has name, module and weight of each layer to merge into.
    """
    # torchao's tensors have no storage of their own, and thus all have one address.
    quantized = (module for module in root.modules() if format_of(module) is not None)
    wrappers = {id(stored_weight(module)) for module in quantized}
    users: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        # All weights that accelerate offloads have the address 0; PEFT merges one at a time.
        if id(parameter) not in wrappers and not parameter.is_meta:
            users.setdefault(parameter.data_ptr(), []).append(name)
    for layer, base, weight in weights:
        # A module registered under several names is one layer; only other modules count. The
        # address of a stacked weight is the address of the first expert.
        others = [
            other
            for other in users.get(weight.data_ptr(), ())
            if root.get_submodule(other.rpartition(".")[0]) is not base
        ]
        if others:
            raise ValueError(
                f"model: the weight of {layer!r} is shared with {', '.join(others)}, which a "
                "merge would change as well; untie the weights, or export instead of merging."
            )
