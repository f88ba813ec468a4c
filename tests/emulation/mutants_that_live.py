"""Why some mutants are no faults: what they change is never seen in any result."""

from __future__ import annotations

EMPTY = "the stretch that it lets in is empty, and copying nothing does nothing"
GUARDED = "the one element more is left out by the condition inside the loop"
EXTRA_BLOCK = "one block more, which finds nothing to do; costs time alone"
TWO_STEPS = "the index and its bound are multiples of N > 1, so that one less is as good"

# File, part of the line before, part of the line after, reason.
REASONS: list[tuple[str, str, str, str]] = [
    ("pack.cuh", "Rp < tile ?", "Rp <= tile ?", "both sides are equal there"),
    ("pack.cuh", "Rp < tile ?", "Rp + 1 < tile ?", "one row a tile either way, cut to Rp columns"),
    ("pack.cuh", "begin < own_end", "begin <= own_end", EMPTY),
    ("pack.cuh", "begin < pool_end", "begin <= pool_end", EMPTY),
    ("pack.cuh", "end > own_end", "end >= own_end", EMPTY),
    ("pack.cuh", "end > pool_end", "end >= pool_end", EMPTY),
    ("pack.cuh", "block - down < tiling.count", "<= tiling.count", "a tile without rows"),
    ("pack.cu", "elements +=", "i + 1 < count", "only the choice of the tile's size is moved"),
    ("pack.cu", "std::max(blocks", "+ 1)", EXTRA_BLOCK),
    ("pack_backward.cuh", "col < R; col +=", "col <= R", "a last turn without columns"),
    ("pack_backward.cuh", "begin < own_end", "begin <= own_end", EMPTY),
    ("pack_backward.cuh", "end > own_end", "end >= own_end", EMPTY),
    ("pack_backward.cuh", "v < kSumElements", "v <= kSumElements", GUARDED),
    ("pack_backward.cuh", "if (n <= 0) return", "if (n < 0)", "a thread without elements"),
    ("pack_backward.cu", "std::max(shape.in, shape.out)", "+ 1)", EXTRA_BLOCK),
    ("decode.cuh", "m < tokens", "m <= tokens", GUARDED),
    ("decode.cuh", "if (m >= live)", "if (m > live)", "that token's sum is not written"),
    ("dropout.cuh", "first + N <= n", "first + N < n", "the last eight, one by one"),
    ("table.cu", "done < words", "done <= words", "a last launch without words"),
    ("collective.cuh", "i < done", "i + 1 < done", TWO_STEPS),
]


def reason_of(file: str, before: str, after: str) -> str | None:
    """The reason why this mutant is no fault; None if there is none."""
    for where, old, new, reason in REASONS:
        if where == file and old in before and new in after:
            return reason
    return None
