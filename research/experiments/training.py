"""The training loop that all methods share, and the losses that compare them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.batches import IGNORE, Row, collate


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW without weight decay, with a linear warmup and a linear decay of the rate to zero."""

    steps: int
    batch_size: int
    lr: float
    seed: int = 0
    bfloat16: bool = True
    """Compute products in bfloat16 by autocast; trainable parameters stay float32."""
    warmup: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Return the learning rate of step ``step``, counted from 0."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * (self.steps - step) / max(1, self.steps - rise)


def batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """Return the row indices of every step; each pass over the rows has a new seeded order."""
    draw, order, found = random.Random(seed), [], []
    for _ in range(steps):
        while len(order) < size:
            order += draw.sample(range(count), count)
        found.append(order[:size])
        order = order[size:]
    return found


def save(value: Any, path: Path) -> None:
    """Save with ``torch.save``; a reader, or another process that saves, sees a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(value, beside)
    os.replace(beside, path)


class Run:
    """A training run that advances step by step and can save and restore its state."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[Row],
        pad_token_id: int,
        recipe: Recipe,
        groups: list[dict[str, Any]] | None = None,
        between: Callable[[torch.optim.Optimizer], Callable[[], object]] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    ) -> None:
        """Train the parameters of ``model`` that require a gradient on ``rows``.

        ``groups`` are parameter groups for the optimizer; the run preserves the ratios of their
        rates. ``between`` takes the optimizer and returns the function to call after each step.
        ``optimizer`` replaces AdamW and is called with the same arguments.
        """
        self.model, self.rows, self.recipe = model, rows, recipe
        self.losses: list[float] = []
        """The loss of every step so far, measured before the update."""
        self.seconds: list[float] = []
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = (optimizer or torch.optim.AdamW)(
            groups or self._trained, lr=recipe.lr, weight_decay=0.0, fused=True
        )
        self._factors = [group["lr"] / recipe.lr for group in self._optimizer.param_groups]
        self._between = None if between is None else between(self._optimizer)
        self._pad_token_id = pad_token_id
        self._order = batches(len(rows), recipe.batch_size, recipe.steps, recipe.seed)

    @property
    def step(self) -> int:
        """The number of steps done."""
        return len(self.losses)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(p.numel() for p in self._trained)

    @property
    def going(self) -> bool:
        """Whether steps are left and the run has not diverged."""
        return self.step < self.recipe.steps and not self.diverged

    @property
    def diverged(self) -> bool:
        """Whether the last loss is not finite."""
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    def advance(self) -> float:
        """Do one training step and return its loss."""
        began = time.perf_counter()
        self.model.train()
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group["lr"] = factor * self.recipe.rate(self.step)
        batch = collate([self.rows[i] for i in self._order[self.step]], self._pad_token_id)
        with products_in(self.recipe.bfloat16):
            loss = trained_losses(self.model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self.recipe.clip)
        self._optimizer.step()
        if self._between is not None:
            self._between()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - began)
        return self.losses[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which ``load_state_dict`` resumes, without state of ``between``."""
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "losses": self.losses,
            "seconds": self.seconds,
            "trained": [p.detach() for p in self._trained],
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state``. Raises ValueError if it belongs to another recipe."""
        if state["recipe"] != dataclasses.asdict(self.recipe):
            raise ValueError(
                f"state: expected one with {self.recipe}, got one with {state['recipe']}; delete "
                "it to start again, or pass the options of the run that wrote it."
            )
        with torch.no_grad():
            for parameter, stored in zip(self._trained, state["trained"], strict=True):
                parameter.copy_(stored)
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.losses, self.seconds = list(state["losses"]), list(state["seconds"])


def trained_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Compute the cross entropy in nats of every token with a loss, (n,) float32.

    Logits are computed for these tokens only: with a vocabulary of 49,152 the other logits would be
    a quarter of a small model's work.
    """
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORE
    hidden = model.get_decoder()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][kept])
    return cross_entropy(logits.float(), labels[kept], reduction="none")


@torch.no_grad()
def mean_loss(
    model: Any,
    rows: Sequence[Row],
    pad_token_id: int,
    *,
    bfloat16: bool = True,
    batch_size: int = 8,
) -> float:
    """Compute the mean cross entropy in nats over all tokens of ``rows`` that have a loss."""
    model.eval()
    total, count = 0.0, 0
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), batch_size):
        with products_in(bfloat16):
            batch = collate(by_length[start : start + batch_size], pad_token_id)
            losses = trained_losses(model, batch)
        total += losses.double().sum().item()
        count += losses.numel()
    return total / max(count, 1)


def products_in(bfloat16: bool) -> contextlib.AbstractContextManager:
    """Return a context that computes matrix products in bfloat16, or changes nothing."""
    return torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext()
