"""Calls of operators: arguments, work, checks and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness, roofline
from benchmarks.shapes import Linear
from rasa_ext import ops


@dataclass
class Call:
    """An operator with arguments; ``flops`` is for the whole call."""

    name: str
    args: tuple
    flops: float = 0.0

    def work(self, results) -> roofline.Work:
        # Weights that are changed in place are read and written.
        twice = self.args[0] if self.name == "merge_group" else []
        return roofline.Work(nbytes(self.args) + nbytes(results) + nbytes(twice), self.flops)


def nbytes(value) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(nbytes, value)) if isinstance(value, list | tuple) else 0


def adapters(linear: Linear, layers: int, rank: int, k: int, device: str):
    """Return A, A_pool, B, B_pool and d of every layer of a group, in float32."""
    own, pooled = rank - k, layers * k

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device) / shape[-1] ** 0.5

    A = [draw(own, linear.in_features) for _ in range(layers)]
    B = [draw(linear.out_features, own) for _ in range(layers)]
    d = [draw(own + pooled) for _ in range(layers)]
    return A, draw(pooled, linear.in_features), B, draw(linear.out_features, pooled), d


def one_linear(linear: Linear, adapter, M: int, dtype: torch.dtype, device: str) -> list[Call]:
    """Return the calls of a training step of one linear."""
    width, out, rank = linear.in_features, linear.out_features, adapter[-1][0].numel()
    ((Ap, *_), (Bp, *_)) = ops.pack_group(*adapter, dtype, ops.rank_multiple(device))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, weight, grad = draw(M, width), draw(out, width) / width**0.5, draw(M, out)
    U = torch.mm(x, Ap.t())
    base, low = 2 * M * width * out, 2 * M * rank * (width + out)
    return [
        Call("low_rank_linear", (x, weight, None, Ap, Bp), base + low),
        Call("low_rank_add", (grad, x, Ap, Bp), low),
        Call(
            "low_rank_linear_backward",
            (grad, x, weight, U, Ap, Bp, True, True, True),
            base + 2 * low,
        ),
    ]


def group(linear: Linear, adapter, dtype: torch.dtype, device: str) -> list[Call]:
    """Return calls that pack a group, run the backward, and merge the group into weights."""
    *_, B, B_pool, d = adapter
    layers, rank = len(B), d[0].numel()
    multiple = ops.rank_multiple(device)
    Ap, Bp = ops.pack_group(*adapter, dtype, multiple)
    width, out = linear.in_features, linear.out_features
    weights = [torch.randn(out, width, device=device).to(dtype) for _ in range(layers)]
    dAp, dBp = (list(torch.randn_like(pack, dtype=torch.float32)) for pack in (Ap, Bp))
    return [
        Call("pack_group", (*adapter, dtype, multiple)),
        Call("pack_group_backward", (dAp, dBp, B, B_pool, d)),
        # Small changes, so that weights stay finite when they are added many times.
        Call("merge_group", (weights, Ap, Bp * 1e-3), 2 * layers * rank * width * out),
    ]


def verify(call: Call, dtype: torch.dtype):
    """Return the results; raise RuntimeError if they differ from the PyTorch kernel's."""
    function, plain = getattr(ops, call.name), ops.OPERATORS[call.name][1]
    if call.name == "merge_group":
        weights, *rest = call.args
        mine, theirs = weights[0].clone(), weights[0].clone()
        function([mine], *(t[:1] for t in rest))
        plain([theirs], *(t[:1] for t in rest))
        found, expected = (mine,), (theirs,)
        answer = ()
    else:
        found = answer = function(*call.args)
        expected = plain(*call.args)
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(found, expected, strict=True):
        error = harness.relative_error(mine, theirs)
        if not error <= limit:
            raise RuntimeError(f"{call.name} and its PyTorch kernel differ by {error:.2e}")
    return answer


def measure(
    call: Call, dtype: torch.dtype, device: str, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, float], roofline.Work]:
    """Time a call, ours and PyTorch's, and a copy of its bytes; also return host times and work."""
    work = call.work(verify(call, dtype))
    source = torch.ones(int(work.bytes // 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: getattr(ops, call.name)(*call.args),
        "pytorch": lambda: ops.OPERATORS[call.name][1](*call.args),
        "copy": lambda: target.copy_(source),
    }
    how = {"device": device, "hide_launches": True, "cold": True}
    times = harness.interleaved(runs, rounds, at_most=seconds, **how)
    cuda = device.startswith("cuda")
    host = {name: harness.host_seconds(runs[name]) for name in ("ours", "pytorch") if cuda}
    return times, host, work
