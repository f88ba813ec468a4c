"""Reasons why some mutants are not faults: their change affects no result."""

GUARDED = "the one element more is left out by the condition inside the loop"
EXTRA_BLOCK = "one block more, which finds nothing to do; costs time alone"
LAST_TURN = "a last turn, which finds nothing left"
NOTHING_THERE = "what is beyond is zero in shared memory, and none of it is written"
ASKED_TWICE = "a stage is asked for twice, with the same tile"
BY_VALUE = "where the numbers are equal no table is given, and the layers travel by value"

# File, part of the line before, part of the line after, reason.
REASONS: list[tuple[str, str, str, str]] = [
    ("layers.cuh", "count > kLayersByValue", "count >= kLayersByValue", BY_VALUE),
    ("pack_backward.cuh", "begin < out; begin +=", "begin <= out", LAST_TURN),
    ("pack_backward.cu", "group.out > 0", "group.out >= 0", EXTRA_BLOCK),
    ("decode.cuh", "m < tokens", "m <= tokens", GUARDED),
    ("decode.cuh", "j < Rp; j +=", "j <= Rp", LAST_TURN),
    ("dropout.cuh", "start < kDropoutBytes", "start <= k", "the next warp's work, as well"),
    ("dropout.cuh", "first + N <= n", "first + N < n", "the last eight, one by one"),
    ("dropout.cuh", "kDropoutBytes <= end", "kDropoutBytes < end", "the last four, one by one"),
    ("skinny.cuh", "start < kAll", "start <= kAll", GUARDED),
    ("skinny.cuh", "c * 32 < f", "c * 32 + 8 < f", "with a mask, features are a multiple of 32"),
    ("skinny.cuh", "col < end", "col <= end", NOTHING_THERE),
    ("skinny.cuh", "token < end", "token <= end", NOTHING_THERE),
    ("skinny.cuh", "step + 1 < kStages", "step + 1 <= kStages", ASKED_TWICE),
    ("skinny.cuh", "i < parts.count", "i <= parts.count", GUARDED),
    ("skinny.cuh", "unit < tokens", "unit <= tokens", NOTHING_THERE),
    ("skinny.cuh", "j < R /", "j <= R /", NOTHING_THERE),
    ("skinny.cu", "Rp <= kBothRanks", "kBothRanks", "no Rp, or another cut of the sums, as right"),
    ("skinny.cu", "count > 1", "count >= 1", "a sum of one part"),
    ("skinny.cu", "call.Rp > 0 &&", "call.Rp > 8 + 0", "Rp is a multiple of 16"),
    ("skinny.cu", "call.Rp <= k", "call.Rp <= 8 + k", "Rp is a multiple of 16"),
    ("table.cu", "done < words", "done <= words", "a last launch without words"),
]


def reason_of(file: str, before: str, after: str) -> str | None:
    """Return the reason why this mutant is not a fault, or None if no reason is known."""
    for where, old, new, reason in REASONS:
        if where == file and old in before and new in after:
            return reason
    return None
