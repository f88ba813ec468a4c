"""Predicted steps: counts compared to counts by hand and to the operators that PyTorch runs."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import passes, predict, records
from benchmarks.linears import Case
from benchmarks.passes import Setting
from benchmarks.shapes import Linear, single


def one(variant: str, tokens: int, **setting) -> list[passes.Op]:
    """Return the operators of a linear from 64 to 48 features with R = 7 + 9."""
    given = {"rank": 16, "pooled": 9, "itemsize": 2, "multiple": 16} | setting
    return passes.ops(
        passes.BY_NAME[variant], [Linear("proj", 64, 48, "x")], Setting(tokens, **given)
    )


def test_the_bytes_of_a_frozen_linear():
    M, inner, out = 100, 64, 48
    forward = 2 * (M * inner + out * inner + M * out)
    assert [op.bytes for op in one("frozen", M)] == [forward, forward]
    assert [op.flops for op in one("frozen", M)] == [2 * M * inner * out] * 2


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
    found = one("ours", M, layers=3)
    assert [op.bytes for op in found] == expected
    assert [op.launches for op in found] == [1] * 8 + [1 / 3] * 3
    biased = [op.bytes for op in one("ours", M, layers=3, biased=True)]
    assert sum(biased) - sum(expected) == 2 * out  # the bias is added while writing the result


def test_dropout_reads_and_writes_x():
    M, inner = 104, 64
    x, mask = 2 * M * inner, M * inner // 8
    without, with_it = (sum(op.bytes for op in one("ours", M, dropout=d)) for d in (False, True))
    # Noise is written and read, the mask is written; two passes for x, one for dx.
    assert with_it - without == 2 * 8 + mask + 3 * (2 * x + mask)
    # The kernels make no copy of x: they read the mask beside x.
    with_it, without = (
        sum(op.bytes for op in one("ours", 1024, dropout=d, kernels=True)) for d in (True, False)
    )
    x, mask = 2 * 1024 * inner, 1024 * inner // 8
    assert with_it - without == 2 * 8 + mask + 2 * mask + 2 * x + mask


def test_the_bytes_of_the_kernels():
    """Counted by hand: 1024 tokens, one part of the features and 4 groups of tokens."""
    M, inner, out, R = 1024, 64, 48, 16
    x, y, U, H = 2 * M * inner, 2 * M * out, 2 * M * R, 2 * M * R
    Ap, Bp, dAp, dBp = 2 * R * inner, 2 * R * out, 4 * R * inner, 4 * R * out
    by_kind = {"down": [], "both": [], "grad": [], "add_parts": []}
    for op in one("ours", M, kernels=True):
        if op.kind in by_kind:
            by_kind[op.kind].append(op.bytes)
    assert by_kind["down"] == [x + Ap + 4 * M * R]
    assert by_kind["both"] == [y + Bp + U + 4 * M * R + 8 * dBp]
    assert by_kind["grad"] == [x + H + 4 * dAp]
    parts = [4 * M * R + U, 4 * M * R + 8 * dBp + H + dBp, 4 * dAp + dAp]
    assert by_kind["add_parts"] == parts
    wide = [op.kind for op in one("ours", M, rank=160, kernels=True)]
    assert wide.count("both") == 0
    assert wide.count("down") == wide.count("grad") == 2
    assert not set(passes.KERNELS) & {op.kind for op in one("ours", M, rank=161, kernels=True)}


def test_launches_of_a_decoder_layer():
    def counted(variant: str) -> tuple[float, int]:
        found = predict.step("llama", 4096, 8, "H100", variant)
        return found.launches, found.products

    assert counted("frozen") == (14 + 3, 14)
    # Seven groups of 32 layers, each with a pack, a zero for its ports and a backward.
    assert counted("ours fused cublas") == (47 + 2 + 7 * 3 / 32, 47)
    # The kernels compute four products of each linear. U, H with dBp, and dAp take two launches
    # each, except down_proj's dAp, which has one group of tokens.
    assert counted("ours") == (28 + 7 * 6 - 1 + 3 + 7 * 3 / 32, 28)
    # q, k and v share U, dAp, dX = H Ap and a cat of the Ap; so do gate and up.
    assert counted("ours fused") == (25 + 4 * 4 + 7 * 2 - 1 + 2 + 7 * 3 / 32, 25)


class Recorded(TorchDispatchMode):
    """A mode that counts operators by kind, with the names of benchmarks/passes.py."""

    KINDS = {  # noqa: RUF012
        "mm": "product",
        "addmm_": "product",
        "cat": "cat",
        "_to_copy": "cast",
        "mul": "mul",
        "add": "add",
        "add_": "add",
        "sum": "sum",
    }

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.KINDS:
            self.kinds[self.KINDS[name]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["frozen", "official", "peft", "addmm"])
def test_pytorch_runs_what_is_listed(variant):
    case = Case(single(64, 48, 10), 33, 8, 1, torch.bfloat16, "cpu")
    module = case.variants()["peft r=8" if variant == "peft" else variant]
    run = case.step(module)
    run()
    with Recorded() as recorded:
        run()
    listed = Counter(op.kind for op in one(variant, 33))
    del listed["copy"]  # autograd copies the strided gradient itself, not by an operator
    listed["add"] += listed.pop("sum_pool", 0)
    listed = +listed
    assert recorded.kinds == listed


def device(model: str, tokens: int, variant: str, card: str = "H100", dropout: float = 0) -> float:
    return predict.step(model, tokens, 8, card, variant, dropout).device_ms


def test_order():
    ms = {variant: device("llama", 4096, variant) for variant in predict.VARIANTS}
    assert ms["frozen"] < ms["ours fused graph"] < ms["ours fused"] < ms["ours"] < ms["peft r"]
    assert ms["peft r"] < ms["peft R"] < ms["official"]
    assert ms["ours"] < ms["addmm"] < ms["official"]
    for variant, found in ms.items():
        assert device("llama", 2048, variant) < found < device("llama", 4096, variant, "A100-80G")
        assert (device("llama", 4096, variant, dropout=0.05) > found) == (variant != "frozen")


def test_the_longer_of_device_and_host_counts():
    small = predict.step("smollm2", 512, 8, "H100", "official")
    assert small.ms == small.host_ms > small.device_ms
    graph = predict.step("smollm2", 512, 8, "H100", "ours fused graph")
    assert graph.ms == graph.device_ms > graph.host_ms


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("model", {"model": "gpt"}),
        ("card", {"card": "H200"}),
        ("variant", {"variant": "theirs"}),
        ("tokens", {"tokens": 0}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_bad_input(argument, change):
    good = {"model": "llama", "tokens": 512, "rank": 8, "card": "H100", "variant": "ours"}
    with pytest.raises(ValueError, match=f"^{argument}"):
        predict.step(**(good | change))


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
    without = re.sub(r"^\|.*$", "| old |", page, flags=re.MULTILINE)
    for shown in (
        predict.over_tokens("llama", "H100", 8, 0.0),
        predict.over_cards(4096, 8, 0.05),
        predict.counts("llama", "H100", 8, 4096),
    ):
        assert records.table(shown) in predict.with_tables(without)
    for name, value in predict.GPU._asdict().items():
        assert name == "in_line" or f"| `{name}` | {value} |" in page, name
