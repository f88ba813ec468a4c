"""The hidden states between a model's blocks, one point per sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Pooling = Literal["mean", "last", "first"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


def pooled_states(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    blocks: Mapping[str, nn.Module],
    pooling: Pooling,
    points: int,
    seed: int,
) -> dict[str, Tensor]:
    """Run a model up to the last block and pool each block's input and the last block's output.

    Arguments and errors are as in ``rasa_research.ranks.hidden_dimensions``, with blocks by name.
    Returns float32 points (points, width) by the name of the place, in order.
    """
    found = _States(blocks, pooling)
    given = [_checked_batch(batch) for batch in batches]
    sizes = [len(next(_tensors(batch))) for batch in given]
    if not given:
        raise ValueError("batches: expected at least one, got none.")
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    taken = torch.zeros(len(order), dtype=torch.bool)
    taken[order[:points]] = True
    with _evaluating(model), found.watching(), torch.no_grad():
        for batch, size, rows in zip(given, sizes, taken.split(sizes), strict=True):
            if rows.any():
                found.run(model, _only(batch, size, rows))
    return found.points()


class _Enough(Exception):
    """Raised after the last block: the head's logits may need more memory than all states."""


class _States:
    """Collector of pooled hidden states: before every block, and after the last one."""

    def __init__(self, blocks: Mapping[str, nn.Module], pooling: Pooling) -> None:
        self._blocks, self._pooling = blocks, pooling
        self._mask: Tensor | None = None
        self._runs = 0
        self._last = list(blocks)[-1]
        self._found: dict[str, list[Tensor]] = {
            **{f"before {name}": [] for name in blocks},
            f"after {self._last}": [],
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Register hooks on the blocks within the context."""
        with contextlib.ExitStack() as stack:
            for name, block in self._blocks.items():
                hook = block.register_forward_pre_hook(self._before(name), with_kwargs=True)
                stack.callback(hook.remove)
            hook = self._blocks[self._last].register_forward_hook(self._after)
            stack.callback(hook.remove)
            yield

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Run one batch, up to the end of the last block."""
        self._mask = batch.get("attention_mask")
        self._runs += 1
        with contextlib.suppress(_Enough):
            model(**batch)
        counts = {place: len(states) for place, states in self._found.items()}
        if set(counts.values()) != {self._runs}:
            raise ValueError(
                "blocks: expected each to run once per batch, in this order, but states were found "
                f"{', '.join(f'{n} times {place}' for place, n in counts.items())}."
            )

    def points(self) -> dict[str, Tensor]:
        """Return float32 points (points, width) by the name of the place."""
        return {place: torch.cat(states) for place, states in self._found.items()}

    def _before(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(f"before {name}", args[0] if args else kwargs.get("hidden_states"))

        return hook

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        self._add(f"after {self._last}", output[0] if isinstance(output, tuple | list) else output)
        raise _Enough

    def _add(self, place: str, states: Any) -> None:
        if not isinstance(states, Tensor) or states.dim() != 3:
            kind = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(
                f"blocks: expected hidden states (sequences, tokens, width) {place}, got {kind}."
            )
        self._found[place].append(_pooled(states, self._mask, self._pooling))


def _pooled(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool states (n, tokens, width), with mask (n, tokens), to (n, width) float32."""
    if mask is None:
        mask = states.new_ones(states.shape[:2])
    if mask.shape != states.shape[:2]:
        raise ValueError(
            f"attention_mask: expected the shape {tuple(states.shape[:2])} of the hidden states, "
            f"got {tuple(mask.shape)}."
        )
    real = mask.to(states.device) != 0
    if not real.any(1).all():
        raise ValueError("attention_mask: expected a token in every sequence, got one without.")
    if pooling == "mean":
        kept = states.float().masked_fill(~real[..., None], 0)
        return kept.sum(1) / real.sum(1, keepdim=True)
    places = torch.arange(real.shape[1], device=real.device)
    if pooling == "last":
        chosen = places.where(real, -1).amax(1)
    else:
        chosen = places.where(real, len(places)).amin(1)
    return states[torch.arange(len(states), device=real.device), chosen].float()


def _checked_batch(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches: expected mappings of the model's arguments, got a {type(batch).__name__}."
        )
    if next(_tensors(batch), None) is None:
        raise ValueError("batches: expected tensors among the model's arguments, got none.")
    return batch


def _tensors(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    return (value for value in batch.values() if isinstance(value, Tensor) and value.dim())


def _only(batch: Mapping[str, Any], size: int, rows: Tensor) -> dict[str, Any]:
    """Return the chosen sequences of a batch of ``size``; rows (size,) bool."""
    if rows.all():
        return dict(batch)
    return {
        key: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == size
        else value
        for key, value in batch.items()
    }


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode within the context; restore the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
