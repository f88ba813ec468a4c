"""Tables that travel as kernel parameters."""

from __future__ import annotations

import pytest
import torch
from emulated import Memory, address, run


@pytest.mark.parametrize("words", [0, 1, 128, 129, 510, 511, 1300])
def test_words_arrive(kernels, words):
    memory = Memory()
    table = [(i + 1) * 0x9E3779B97F4A7C15 % 2**63 for i in range(words)]
    to = memory.written((2 * words,), torch.float32)  # 8 bytes a word
    run(kernels, memory, lambda: kernels.write_table(table, address(to)))
    assert to.view(torch.int64).tolist() == table


@pytest.mark.parametrize(("words", "launches"), [(0, 0), (510, 1), (511, 2), (1021, 3)])
def test_a_launch_takes_as_much_as_its_parameters(kernels, words, launches):
    before = kernels.counts()["launches"]
    to = torch.empty(max(words, 1), dtype=torch.int64)
    kernels.write_table([7] * words, address(to))
    assert kernels.counts()["launches"] == before + launches
