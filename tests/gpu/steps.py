"""Run steps of adapted layers and models with the package and plain PyTorch, and compare errors."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rasa_ext.nn import functional
from rasa_ext.ops import Factors
from tests.helpers import oracle
from tests.helpers.adapters import (
    Errors,
    PlainRasa,
    adapters,
    compare,
    excesses,
    excesses_of,
    plain_model,
    trainable_copies,
    wide,
)
from tests.helpers.models import Entry
from tests.helpers.operators import draw_adapter, floor, packed
from tests.helpers.oracle import Adapter


class Case:
    """x, a frozen layer, an adapter with dW about as large as W, and a gradient of y.

    Args:
        sizes: tokens, in, out, private ranks and pool ranks.
    """

    def __init__(self, sizes: tuple, dtype: torch.dtype, device: str) -> None:
        tokens, width, out, own, pooled = sizes
        self.x = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(tokens, out, device=device).to(dtype)
        self.base = nn.Linear(width, out, device=device, dtype=dtype).requires_grad_(False)
        self.base.weight.normal_(std=width**-0.5)
        self.base.bias.normal_()
        A, A_pool, B, B_pool, d = draw_adapter(width, out, own, pooled, device)
        down, up = width**-0.5, d.numel() ** -0.5
        scaled = Adapter(A * down, A_pool * down, B * up, B_pool * up, d)
        self.adapter = trainable_copies({"": scaled})[""]

    def ours(self) -> dict[str, Tensor]:
        """Compute y, every gradient, and y without grad, which has other kernels for few tokens."""
        pack = packed(Factors(*self.adapter), self.x.dtype)
        args = self.x, self.base.weight, self.base.bias, pack
        found = self._step(lambda: functional.low_rank_linear(*args))
        with torch.no_grad():
            return {**found, "quiet": functional.low_rank_linear(*args)}

    def plain(self) -> dict[str, Tensor]:
        """Compute the same quantities by the official formula."""
        found = self._step(lambda: PlainRasa(self.base, self.adapter)(self.x))
        return {**found, "quiet": found["y"]}

    def _step(self, run: Callable[[], Tensor]) -> dict[str, Tensor]:
        y = run()
        leaves = {"x": self.x, **self.adapter._asdict()}
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    @torch.no_grad()
    def reference(self) -> dict[str, Tensor]:
        """Compute the same quantities in float64 on the device."""
        x, adapter = self.x.detach(), self.adapter
        found = oracle.linear_grads(self.grad, x, self.base.weight, adapter)
        y = oracle.linear(x, self.base.weight, self.base.bias, adapter)
        return {**found, "y": y, "quiet": y}


def check_layer(sizes: tuple, dtype: torch.dtype, device: str, draws: int) -> None:
    """Assert that every quantity's error from float64 is at most twice plain PyTorch's."""
    ours, theirs = Errors(), Errors()
    for _ in range(draws):
        case = Case(sizes, dtype, device)
        reference, found = case.reference(), case.ours()
        assert found["y"].dtype == found["x"].dtype == dtype
        ours.add(found, reference)
        theirs.add(case.plain(), reference)
    assert not excesses(ours, theirs, floor(dtype))[0]


def check_model(
    entry: Entry,
    base: nn.Module,
    model: nn.Module,
    run: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    draws: int = 4,
) -> list[dict[str, Tensor]]:
    """Check a patched model like ``check_layer``, over several adapters and inputs.

    ``run`` replaces the model in forwards; it may be the compiled model. Returns the logits and
    gradients of every step.
    """
    ours, theirs, seen = compare(entry, base, model, run, autocast, draws, by_kind=True)
    low = floor(next(base.parameters()).dtype) if autocast is None else 0.0
    assert not excesses(ours, theirs, low)[0]
    return seen


def check_evaluation(entry: Entry, base: nn.Module, model: nn.Module, inputs: dict) -> Tensor:
    """Assert that logits without grad have at most twice plain PyTorch's error; return them.

    The model may be merged.
    """
    copies = trainable_copies(adapters(model))
    reference = oracle.run_model(base, copies, lambda dense: entry.loss(dense, wide(inputs)))
    with torch.no_grad():
        found = entry.call(model, **inputs)
        plain = entry.call(plain_model(base, copies), **inputs)
    logits = ({"logits": each} for each in (found, plain, reference["logits"]))
    assert not excesses_of(*logits, floor(found.dtype))[0]
    return found
