"""Time the solver on one group of an 8B model, from factors or from dense matrices.

    python -m research.benchmarks.decompose [--layers 32] [--side 4096] [--inner 64] [--rank 8]
                                            [--k 1] [--iterations 50] [--dtype float64] [--dense]
                                            [--device cpu]

The weight changes are random, with falling spectra and a common part: factors of rank ``inner``, or
with ``--dense`` the factors' products plus noise. Before the timing, the solver's errors on a small
problem are checked against LoRA's minimum from dense singular values.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
from torch import Tensor

from rasa_research import solver


def factors(layers: int, side: int, inner: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return (B, A) of every layer, (side, inner) and (inner, side)."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    scales = 0.95 ** torch.arange(inner, dtype=dtype)
    B, A = draw(side, inner), draw(inner, side)
    return [
        ((B + draw(side, inner)) * scales / side**0.5, (A + draw(inner, side)) / side**0.5)
        for _ in range(layers)
    ]


def verify(rank: int, k: int) -> None:
    """Check a small problem against LoRA's minimum; raise SystemExit if the solver is wrong."""
    pairs = factors(3, 200, 24, torch.float64)
    found = solver.decompose(pairs, rank, k, iterations=5)
    values = [torch.linalg.svdvals(B @ A).square() for B, A in pairs]
    lora = sum(v[rank:].sum() for v in values) / sum(v.sum() for v in values)
    if abs(found.lora_error - lora) > 1e-10 or found.errors[-1] > lora + 1e-10:
        raise SystemExit(f"the solver is wrong: {found.errors}, {found.lora_error}, {lora}")


def main() -> None:
    """Print the time, the errors and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("layers", 32), ("side", 4096), ("inner", 64), ("rank", 8), ("k", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    verify(given.rank, given.k)
    deltas = [
        tuple(t.to(given.device) for t in pair)
        for pair in factors(given.layers, given.side, given.inner, dtype)
    ]
    if given.dense:
        deltas = [B @ A + 0.01 * torch.randn_like(B[:, :1] @ A[:1]) for B, A in deltas]

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="", file=sys.stderr, flush=True)

    start = time.perf_counter()
    found = solver.decompose(
        deltas, given.rank, given.k, iterations=given.iterations, dtype=dtype, progress=show
    )
    seconds = time.perf_counter() - start
    kind = "dense" if given.dense else f"factored (rank {given.inner})"
    print(
        f"\r{given.layers} layers of {given.side} x {given.side}, {kind}, r={given.rank} "
        f"k={given.k}, {given.iterations} iterations, {given.dtype} on {given.device}, "
        f"{torch.get_num_threads()} threads: {seconds:.1f} s"
    )
    print(
        f"error {found.errors[-1]:.6f}, LoRA {found.lora_error:.6f}, "
        f"ratio {found.errors[-1] / found.lora_error:.4f}; peak memory of the process "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )


if __name__ == "__main__":
    main()
