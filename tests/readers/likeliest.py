"""Prompts, whole and cut, and the likeliest tokens after them: what servers tell."""

from __future__ import annotations

from collections.abc import Mapping

COUNT = 50


def prompts(case) -> list[tuple[int, int]]:
    """(index, length) of what is asked."""
    return [(i, n) for i, p in enumerate(case.prompts) for n in (len(p) // 2, len(p))]


def off(case, adapter: str, told: list[Mapping], count: int = COUNT) -> float:
    """The largest difference of a log-probability from what is right for an adapter."""
    largest = 0.0
    for (i, length), found in zip(prompts(case), told, strict=True):
        right = case.expected[adapter][i][length - 1]
        assert len(found) >= count
        for token, value in found.items():
            largest = max(largest, abs(value - right[int(token)].item()))
    return largest
