"""How products reach cuBLAS: through cublasLt if it has an algorithm, and never as empty sums."""

import itertools
import threading

import pytest
import torch
from torch import Tensor

from tests.helpers.linear_cases import EMPTY, draw
from tests.helpers.operators import DTYPES, columns, every_other, one_row, part, shifted
from tests.helpers.threads import run_in_threads

# Ways in which cublasLt refuses a product: a status, no result, a bad result, an error on launch.
REFUSALS = {"status": 1, "no result": 2, "state": 3, "product": 4}
BROKEN = 5


def inputs(tokens, width, out, rank, dtype=torch.float32):
    """Draw x, weight, bias, Ap and Bp."""
    return draw((tokens, width, out, rank), dtype, "cpu")[:5]


def linear(x: Tensor, weight: Tensor, bias: Tensor, U: Tensor, Bp: Tensor) -> Tensor:
    return x.double() @ weight.double().T + bias.double() + U.double() @ Bp.double()


def close(found: Tensor, expected: Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    size = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=32 * eps * size)


def one_column(y: Tensor) -> Tensor:
    return y[:, :1].expand_as(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "how"),
    [
        (Tensor.contiguous, "C!=D"),
        (part, "C!=D"),
        (one_row, "bias"),
        (columns, "copy"),
        (every_other, "copy"),
        (one_column, "copy"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_base_output(host, layout, how, dtype):
    """cublasLt reads the base's output in place if the layout allows; otherwise a copy is added."""
    x, _, _, Ap, Bp, y, _ = draw((18, 5, 6, 3), dtype, "cpu")
    y = layout(y)
    before = y.clone()
    host.reset()
    added, U = host.ops.low_rank_add(y, x, Ap, Bp)
    close(added, y.double() + U.double() @ Bp.double())
    assert torch.equal(y, before)
    product = host.calls()[1]
    assert ("beta=1" in product) == (how != "bias")
    assert [product.endswith(end) for end in (" C!=D", " bias")] == [how == "C!=D", how == "bias"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias(host, dtype):
    """The first product that writes y adds the bias, whatever the bias's strides."""
    for tokens, strided in itertools.product((1, 18), (False, True)):
        x, weight, bias, Ap, Bp = inputs(tokens, 5, 6, 3, dtype)
        if strided:
            bias = bias.repeat_interleave(2)[::2]
        host.reset()
        y, U = host.ops.low_rank_linear(x, weight, bias, Ap, Bp)
        close(y, linear(x, weight, bias, U, Bp))
        assert sum(call.endswith(" bias") for call in host.calls()) == 1
        first = next(call for call in host.calls() if "m=6" in call)
        assert "beta=0" in first
        assert first.endswith(" bias")


ROWS = itertools.count(2)


def is_asked_again(host) -> bool:
    """Return whether cublasLt is asked twice for one kind of product, after up to 4096 other kinds.

    The table of choices is emptied when it is full, so afterwards it is almost empty.
    """
    x, weight, _, Ap, Bp = inputs(1, 1, 1, 1, torch.float64)

    def multiply(rows: int) -> tuple[Tensor, Tensor]:
        return host.ops.low_rank_linear(x.expand(rows, 1), weight, None, Ap, Bp)

    first, before, others = next(ROWS), set(), 0
    host.heuristics()
    while True:
        held = [multiply(first) for _ in range(20)]  # results in every alignment
        asked = set(host.heuristics())
        del held
        if before & asked or others > 4096:
            return bool(before & asked)
        before |= asked
        for rows in itertools.islice(ROWS, 10):
            multiply(rows)
        others += len(host.heuristics())


@pytest.fixture
def few_choices(host) -> None:
    """Empty the table of choices, so that it is not emptied in the middle of a test."""
    assert is_asked_again(host)


@pytest.mark.parametrize("how", REFUSALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fall_back(host, few_choices, how, dtype):
    """cuBLAS computes what cublasLt refuses, bit-identically, and cublasLt is not asked again."""
    # A number of tokens used nowhere else: other tests would find the algorithms refused.
    tokens = 140 + len(REFUSALS) * DTYPES.index(dtype) + list(REFUSALS).index(how)
    x, weight, bias, Ap, Bp, y, _ = draw((tokens, 5, 6, 3), dtype, "cpu")

    def run() -> list[Tensor]:
        linear, U = host.ops.low_rank_linear(x, weight, bias, Ap, Bp)
        added, _ = host.ops.low_rank_add(y, x, Ap, Bp)
        need = True, True, True
        return [
            *(linear, U, added),
            *host.ops.low_rank_linear_backward(y, x, weight, U, Ap, Bp, *need),
        ]

    host.reset()
    host.heuristics()
    with host.refusing(REFUSALS[how]):
        found = run()
        assert [call.partition(" ")[0] for call in host.calls()] == ["GemmEx"] * 10
        asked = host.heuristics()
        assert len(asked) in (9, 10)  # U twice, perhaps in another alignment
        for _ in range(5):
            run()
        asked += host.heuristics()
        assert len(set(asked)) == len(asked)
        assert host.refused() == (len(asked) if how == "product" else 0)
    close(found[0], linear(x, weight, bias, found[1], Bp))
    close(found[2], y.double() + found[1].double() @ Bp.double())
    # In memory of other alignments, some products use cublasLt again, with equal results.
    assert all(map(torch.equal, found, run()))


def test_a_failure_is_told_once_and_cublas_takes_over(host, capfd):
    """Any failure of cublasLt warns once, as in torch; cuBLAS reports errors of the device."""
    x, weight, bias, Ap, Bp = inputs(29, 70, 7, 3)  # a shape that no other test uses
    host.reset()
    with host.refusing(BROKEN):
        y, U = host.ops.low_rank_linear(x, weight, bias, Ap, Bp)
        host.ops.low_rank_linear(x, weight, bias, Ap, Bp)
    assert {call.partition(" ")[0] for call in host.calls()} == {"GemmEx"}
    close(y, linear(x, weight, bias, U, Bp))
    assert capfd.readouterr().err.count("cublasLtMatmul failed with cuBLAS status 13") == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 18])
@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_a_bias_below_16_bytes_is_no_epilogue(host, shift, tokens, dtype):
    """cublasLt gets no bias that is not aligned to 16 bytes, since its kernels may fault.

    Pieces of a flat buffer can have such an address.
    """
    x, weight, bias, Ap, Bp = inputs(tokens, 5, 6, 3, dtype)
    host.reset()
    with host.refusing(0):
        y, U = host.ops.low_rank_linear(x, weight, shifted(bias, shift), Ap, Bp)
    close(y, linear(x, weight, bias, U, Bp))
    aligned = shift * dtype.itemsize % 16 == 0
    assert any(call.endswith(" bias") for call in host.calls()) == aligned
    assert host.refused() == 0


def test_a_bias_is_added_before_a_long_sum_is_rounded(host):
    """For a sum that may be split, the bias is written to D first.

    cublasLt rounds a split sum before it adds an epilogue's bias.
    """
    for width, epilogue in ((512, True), (513, False)):
        x, weight, bias, Ap, Bp = inputs(1, width, 6, 3)
        host.reset()
        y, U = host.ops.low_rank_linear(x, weight, bias, Ap, Bp)
        close(y, linear(x, weight, bias, U, Bp))
        assert any(call.endswith(" bias") for call in host.calls()) == epilogue


def test_choices_are_kept(host):
    """cublasLt chooses once for each kind of product; split sums stay float32, in a workspace."""

    def asked(*args: Tensor | None) -> dict[str, list[str]]:
        """Return products that algorithms were chosen for, and the other details of each choice."""
        for _ in range(10):
            host.ops.low_rank_linear(*(t if t is None else t.clone() for t in args))
        lines = host.heuristics()
        # Other alignments are other kinds, but no kind occurs twice.
        assert len(set(lines)) == len(lines)
        chosen: dict[str, list[str]] = {}
        for line in lines:
            product, _, rest = line.partition(",")
            chosen.setdefault(product, []).append(rest)
        return chosen

    x, weight, _, Ap, Bp = args = inputs(18, 80, 81, 3)
    down, up, base = "m=3 n=18 k=80", "m=81 n=18 k=3", "m=81 n=18 k=80"
    host.heuristics()
    chosen = asked(*args)
    assert set(chosen) == {down, up, base}
    assert all("bias" in line for line in chosen[up])
    for line in itertools.chain(*chosen.values()):
        assert f"workspace={32 << 20} reduction=2 " in line
    # Another dtype, math mode or row stride, or no bias, is another kind.
    assert set(asked(*(t.bfloat16() for t in args))) == {down, up, base}
    with host.with_math_mode(0):
        assert set(asked(*args)) == {down, up, base}
    assert any("bias" not in line for line in asked(x, weight, None, Ap, Bp)[up])
    host.ops.low_rank_linear(torch.cat([x, x], 1)[:, :80], *args[1:])
    assert sum(",160," in line for line in host.heuristics()) == 2


def test_alignment(host):
    """Pointers with a smaller alignment than before need a new choice."""
    args = inputs(18, 84, 85, 3)
    y = host.ops.low_rank_linear(*args)[0]
    for place, shift in itertools.product(range(5), (1, 2, 4)):
        moved = list(args)
        moved[place] = shifted(args[place], shift)
        host.heuristics()
        assert torch.equal(host.ops.low_rank_linear(*moved)[0], y)
        found = [line.partition("alignment=")[2] for line in host.heuristics()]
        alignments = [line.replace(" bias=", ",").split(",") for line in found]
        # x is an operand of two products. A bias that is not aligned to 16 bytes is copied.
        expected = 2 if place == 0 else 0 if place == 2 and shift < 4 else 1
        assert sum(str(4 * shift) in each for each in alignments) == expected


def test_tf32(host):
    """Only float32 uses TF32, and only if torch's flag, the handle's math mode, allows it."""
    modes = {0: "32F", 3: "TF32", 16: "32F", 19: "TF32"}
    for (mode, float32), dtype in itertools.product(modes.items(), DTYPES):
        expected = {torch.float32: float32, torch.float64: "64F"}.get(dtype, "32F")
        x, weight, bias, Ap, Bp = inputs(18, 5, 6, 3, dtype)
        host.reset()
        with host.with_math_mode(mode):
            U = host.ops.low_rank_linear(x, weight, bias, Ap, Bp)[1]
            host.ops.low_rank_linear_backward(x @ weight.T, x, weight, U, Ap, Bp, *[True] * 3)
            assert host.math_mode() == mode
        assert len(host.calls()) == 8
        assert all(f" compute={expected}" in call for call in host.calls())


@pytest.mark.parametrize("tokens", [0, 1, 18])
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_no_sum_over_nothing_reaches_cublas(host, sizes, tokens):
    x, weight, bias, Ap, Bp, grad, U = draw((tokens, *sizes), torch.float32, "cpu")
    host.reset()
    for given in (bias, None):
        host.ops.low_rank_linear(x, weight, given, Ap, Bp)
    host.ops.low_rank_add(grad, x, Ap, Bp)
    host.ops.low_rank_linear_backward(grad, x, weight, U, Ap, Bp, True, True, True)
    assert not any(" m=0 " in c or " n=0 " in c or " k=0 " in c for c in host.calls())


def test_threads_share_choices(host):
    """Threads that need the same new kinds of product at once ask once for each."""
    cases = [inputs(18, width, 90, 3) for width in range(91, 131)]
    expected = [host.ops.low_rank_linear(*(t.double() for t in case))[0] for case in cases]
    host.heuristics()
    start, wrong = threading.Barrier(4), []

    def run(_: int) -> None:
        start.wait()
        for case, y in zip(cases, expected, strict=True):
            found = host.ops.low_rank_linear(*case)[0]
            if not torch.allclose(found.double(), y, rtol=0, atol=1e-3):
                wrong.append(found)

    run_in_threads(4, run)
    assert not wrong
    lines = host.heuristics()
    assert len(set(lines)) == len(lines)


def test_choices_are_bounded(host):
    """After thousands of other kinds a choice is made again, so the table does not grow forever."""
    assert is_asked_again(host)
