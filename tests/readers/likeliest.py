"""Compare the top tokens that servers return after whole and cut prompts."""

from collections.abc import Mapping

COUNT = 50
LIMIT = 1e-3
"""Largest error of a log-probability in float32, in nats; measured: 3.0e-4."""


def prompts(case) -> list[tuple[int, int]]:
    """Return (index, length) of each whole prompt and its first half."""
    return [(i, n) for i, p in enumerate(case.prompts) for n in (len(p) // 2, len(p))]


def off(case, adapter: str, told: list[Mapping], count: int = COUNT) -> float:
    """Return the largest error of the log-probabilities that a server returned for an adapter."""
    largest = 0.0
    for (i, length), found in zip(prompts(case), told, strict=True):
        right = case.expected[adapter][i][length - 1]
        assert len(found) >= count
        for token, value in found.items():
            largest = max(largest, abs(value - right[int(token)].item()))
    return largest
