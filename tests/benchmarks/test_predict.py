"""Predicted steps: bytes counted by hand, a measurement of this machine, and the page."""

import sys

import pytest

from benchmarks import passes, predict, records
from benchmarks.passes import Setting
from benchmarks.shapes import BLOCKS, Linear


def operators(tokens: int, **setting) -> list[passes.Op]:
    """Return the operators of a linear from 64 to 48 features with R = 7 + 9."""
    given = {"rank": 16, "pooled": 9, "itemsize": 2, "multiple": 16, "layers": 3} | setting
    linear = Linear("proj", 64, 48, "x")
    return passes.ops(passes.BY_NAME["ours"], [linear], Setting(tokens, **given))


def test_the_bytes_of_an_adapted_linear():
    """Counted by hand: bfloat16 activations, float32 parameters and parameter gradients."""
    M, inner, out, R, own = 100, 64, 48, 16, 7 + 9 // 3  # each layer owns a third of the pool
    parameters = 4 * own * (inner + out) + 4 * R
    pack = parameters + 2 * R * (inner + out)
    x, y, U, W = 2 * M * inner, 2 * M * out, 2 * M * R, 2 * inner * out
    Ap, Bp, dAp, dBp = 2 * R * inner, 2 * R * out, 4 * R * inner, 4 * R * out
    expected = [
        *(x + Ap + U, U + Bp + y, x + W + 2 * y),
        *(y + Bp + U, U + y + dBp, U + x + dAp, U + Ap + x, y + W + 2 * x),
        # Reads dAp, dBp, B, B_pool and d; writes five gradients.
        *(pack, 4, dAp + dBp + 4 * own * out + 4 * R + parameters),
    ]
    found = operators(M)
    assert [op.bytes for op in found] == expected
    assert [op.launches for op in found] == [1] * 8 + [1 / 3] * 3
    biased = [op.bytes for op in operators(M, biased=True)]
    assert sum(biased) - sum(expected) == 2 * out  # the bias is added while writing the result


def test_a_captured_layer_packs_for_itself():
    """Three launches for every linear, not for every group, and two sums of the pool's gradient."""
    layer = BLOCKS["llama-3.1-8b"]
    eager, captured = (
        sum(op.launches for group in predict.operations(layer, 4096, 8, name) for op in group)
        for name in ("ours fused", "ours fused graph")
    )
    assert captured - eager == pytest.approx(7 * (3 - 3 / 32 + 2))


def test_this_machine_is_measured_beside_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict", "--check-cpu", "--quick", "--seconds", "1"])
    predict.main()
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "predicted / frozen" in line)
    shown = lines[lines.index(header) + 1 :]
    assert "GB/s" in "".join(lines)
    assert len(shown) == len(predict.CHECKED)
    assert all("%" in line for line in shown)


def test_the_page_has_what_is_predicted():
    page = predict.PAGE.read_text()
    assert predict.with_tables(page) == page, "python -m benchmarks.predict --write"
    assert records.table(predict.over_cards(4096, 8, 0.05)) in page
    for name, value in predict.GPU._asdict().items():
        assert name == "in_line" or f"| `{name}` | {value} |" in page, name
