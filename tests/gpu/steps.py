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
        sizes: tokens, in, out, private ranks and pool ranks (None: no pool).
    """

    def __init__(self, sizes: tuple, dtype: torch.dtype, device: str) -> None:
        tokens, width, out, own, pooled = sizes
        self.x = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(tokens, out, device=device).to(dtype)
        self.base = nn.Linear(1, 1, device=device).requires_grad_(False)
        weight = torch.randn(out, width, device=device) * max(width, 1) ** -0.5
        self.base.weight.data, self.base.bias.data = weight.to(dtype), self.grad.new_zeros(out)
        self.base.bias.normal_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        drawn = draw_adapter(width, out, own, pooled, device, wide)
        down = max(width, 1) ** -0.5
        up = max(drawn.d.numel(), 1) ** -0.5
        pools = (None, None) if pooled is None else (drawn.A_pool * down, drawn.B_pool * up)
        scaled = Adapter(drawn.A * down, pools[0], drawn.B * up, pools[1], drawn.d)
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
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    @torch.no_grad()
    def reference(self) -> dict[str, Tensor]:
        """Compute the same quantities in float64 on the device."""
        x, adapter = self.x.detach(), self.adapter
        found = oracle.linear_grads(self.grad, x, self.base.weight, adapter)
        if adapter.A_pool is None:
            del found["A_pool"], found["B_pool"]
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
    copies, ours, theirs = trainable_copies(adapters(model)), Errors(), Errors()
    reference = oracle.run_model(base, copies, lambda dense: entry.loss(dense, wide(inputs)))
    with torch.no_grad():
        found = entry.call(model, **inputs)
        plain = entry.call(plain_model(base, copies), **inputs)
    ours.add({"logits": found}, {"logits": reference["logits"]})
    theirs.add({"logits": plain}, {"logits": reference["logits"]})
    assert not excesses(ours, theirs, floor(found.dtype))[0]
    return found
