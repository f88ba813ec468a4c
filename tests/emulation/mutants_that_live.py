"""Why some mutants are no faults: what they change is never seen in any result."""

from __future__ import annotations

GUARDED = "the one element more is left out by the condition inside the loop"
EXTRA_BLOCK = "one block more, which finds nothing to do; costs time alone"
LAST_TURN = "a last turn, which finds nothing left"
BY_VALUE = "where the numbers are equal no table is given, and the layers travel by value"

# File, part of the line before, part of the line after, reason.
REASONS: list[tuple[str, str, str, str]] = [
    ("layers.cuh", "count > kLayersByValue", "count >= kLayersByValue", BY_VALUE),
    ("pack_backward.cuh", "begin < out; begin +=", "begin <= out", LAST_TURN),
    ("pack_backward.cu", "group.out > 0", "group.out >= 0", EXTRA_BLOCK),
    ("pack_backward.cu", "if (group.layers > 1)", "if (group.layers >= 1)", EXTRA_BLOCK),
    ("decode.cuh", "m < tokens", "m <= tokens", GUARDED),
    ("decode.cuh", "j < Rp; j +=", "j <= Rp", LAST_TURN),
    ("dropout.cuh", "first + N <= n", "first + N < n", "the last eight, one by one"),
    ("dropout.cuh", "kDropoutBytes <= end", "kDropoutBytes < end", "the last four, one by one"),
    ("table.cu", "done < words", "done <= words", "a last launch without words"),
]


def reason_of(file: str, before: str, after: str) -> str | None:
    """The reason why this mutant is no fault; None if there is none."""
    for where, old, new, reason in REASONS:
        if where == file and old in before and new in after:
            return reason
    return None
