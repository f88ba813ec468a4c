"""The low-rank linear's host code against float64 formulas, whatever lies how in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.helpers.operators import opcheck

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOKENS = (0, 1, 3, 17, 64)
# (in, out, padded rank)
WIDTHS = ((1, 1, 1), (9, 7, 3), (16, 24, 16), (33, 18, 39), (64, 31, 48), (7, 1, 8), (1, 12, 7))


def contiguous(draw, rows, cols):
    return draw(rows, cols)


def transposed(draw, rows, cols):
    return draw(cols, rows).t()


def sliced(draw, rows, cols):
    return draw(rows + 2, cols + 3)[1:-1, 2:-1]


def sliced_transposed(draw, rows, cols):
    return draw(cols + 2, rows + 3)[1:-1, 2:-1].t()


def every_other(draw, rows, cols):
    return draw(2 * rows, 2 * cols)[::2, ::2]


def one_row(draw, rows, cols):
    return draw(1, cols).expand(rows, cols)


def one_number(draw, rows, cols):
    return draw(1, 1).expand(rows, cols)


LAYOUTS = (
    contiguous, transposed, sliced, sliced_transposed, every_other, one_row, one_number,
)  # fmt: skip


class Case:
    """Tensors of one call, each in a layout of its own."""

    def __init__(self, tokens, widths, dtype, layouts, seed=0) -> None:
        generator = torch.Generator().manual_seed(seed)
        width, out, rank = widths

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        layout = itertools.cycle(layouts)
        self.x = next(layout)(draw, tokens, width)
        self.weight = next(layout)(draw, out, width)
        self.Ap = next(layout)(draw, rank, width)
        self.Bp = next(layout)(draw, rank, out)
        self.grad = next(layout)(draw, tokens, out)
        self.U = next(layout)(draw, tokens, rank)
        self.bias = draw(2 * out + 3)[3::2]
        self.eps = torch.finfo(dtype).eps

    def wide(self) -> Case:
        """The same in float64."""
        return self._each(lambda t: t.double())

    def sizes(self) -> Case:
        """The magnitudes in float64: the same formulas then bound what rounding can do."""
        return self._each(lambda t: t.double().abs())

    def _each(self, change) -> Case:
        result = object.__new__(Case)
        for name, value in vars(self).items():
            setattr(result, name, change(value) if isinstance(value, Tensor) else value)
        return result

    def forward(self, bias: bool) -> dict[str, Tensor]:
        U = self.x @ self.Ap.T
        low_rank = U @ self.Bp
        y = low_rank + self.x @ self.weight.T
        return {"y": y + self.bias if bias else y, "U": U, "added": self.grad + low_rank}

    def backward(self) -> dict[str, Tensor]:
        H = self.grad @ self.Bp.T
        return {
            "dx": H @ self.Ap + self.grad @ self.weight,
            "dx_add": H @ self.Ap,
            "dAp": H.T @ self.x,
            "dBp": self.U.T @ self.grad,
        }


def assert_close(found: dict, expected: dict, bounds: dict, eps: float) -> None:
    for name, value in found.items():
        error = (value.double() - expected[name]).abs()
        limit = 4 * eps * bounds[name] + 1e-300
        assert (error <= limit).all(), f"{name}: {(error / limit).max()} times what rounding does"


def run_forward(host, case: Case, bias: bool) -> dict[str, Tensor]:
    y, U = host.ops.low_rank_linear(
        case.x, case.weight, case.bias if bias else None, case.Ap, case.Bp
    )
    added, U_again = host.ops.low_rank_add(case.grad, case.x, case.Ap, case.Bp)
    assert torch.equal(U, U_again)
    return {"y": y, "U": U, "added": added}


def run_backward(host, case: Case) -> dict[str, Tensor]:
    """All that is needed at once, and each part of it alone with no more than it needs."""
    call, pack = host.ops.low_rank_linear_backward, (case.Ap, case.Bp)
    whole = call(case.grad, case.x, case.weight, case.U, *pack, True, True, True)
    for need in itertools.product((True, False), repeat=3):
        x, U = case.x if need[1] else None, case.U if need[2] else None
        found = call(case.grad, x, case.weight, U, *pack, *need)
        for mine, all_, needed in zip(found, whole, need, strict=True):
            assert torch.equal(mine, all_ if needed else all_.new_empty(0))
    dx_add = call(case.grad, None, None, None, *pack, True, False, False)[0]
    return {"dx": whole[0], "dx_add": dx_add, "dAp": whole[1], "dBp": whole[2]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_values(host, tokens, dtype):
    for widths, bias in itertools.product(WIDTHS, (True, False)):
        case = Case(tokens, widths, dtype, (contiguous,))
        check_values(host, case, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(host, layout, dtype):
    """Each tensor in turn in the layout, the others contiguous; and all of them."""
    for widths, tokens in itertools.product(WIDTHS[1:3], (1, 3, 17)):
        for place in range(6):
            layouts = [contiguous] * 6
            layouts[place] = layout
            check_values(host, Case(tokens, widths, dtype, layouts), bias=False)
        check_values(host, Case(tokens, widths, dtype, (layout,)), bias=True)


def check_values(host, case: Case, bias: bool) -> None:
    wide, sizes = case.wide(), case.sizes()
    found = run_forward(host, case, bias)
    assert_close(found, wide.forward(bias), sizes.forward(bias), case.eps)
    found = run_backward(host, case)
    assert_close(found, wide.backward(), sizes.backward(), case.eps)
    # dBp goes from operands to float32 without a stop in the low precision.
    exact = {"dBp": found["dBp"]}
    eps = min(case.eps, torch.finfo(torch.float32).eps)
    assert_close(exact, wide.backward(), sizes.backward(), eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(host, dtype):
    """Fake kernels give the shapes, dtypes and strides of these kernels; nothing aliases."""
    for tokens, widths in itertools.product((0, 5), WIDTHS[:3]):
        case = Case(tokens, widths, dtype, (contiguous,))
        ops, pack = host.ops, (case.Ap, case.Bp)
        backward = (case.grad, case.x, case.weight, case.U, *pack)
        opcheck(ops.low_rank_linear.default, (case.x, case.weight, case.bias, *pack))
        opcheck(ops.low_rank_add.default, (case.grad, case.x, *pack))
        for need in itertools.product((True, False), repeat=3):
            opcheck(ops.low_rank_linear_backward.default, (*backward, *need))


def test_products(host):
    """The adapter comes first, the base is added to it, and nothing is computed in vain."""
    case = Case(17, (9, 7, 3), torch.bfloat16, (contiguous,))
    host.reset()
    host.ops.low_rank_linear(case.x, case.weight, case.bias, case.Ap, case.Bp)
    host.ops.low_rank_linear(case.x, case.weight, None, case.Ap, case.Bp)
    host.ops.low_rank_add(case.grad, case.x, case.Ap, case.Bp)
    # Row-major results are cuBLAS's transposes: m is the width, n the tokens.
    down, base = "Matmul m=3 n=17 k=9 batch=1", "Matmul m=7 n=17 k=9 batch=1"
    up, rest = "Matmul m=7 n=17 k=3 batch=1", "out=2 compute=32F"
    assert host.calls() == [
        f"{down} beta=0 {rest}",
        f"{up} beta=0 {rest} bias",
        f"{base} beta=1 {rest}",
        f"{down} beta=0 {rest}",
        f"{up} beta=0 {rest}",
        f"{base} beta=1 {rest}",
        f"{down} beta=0 {rest}",
        f"{up} beta=1 {rest} C!=D",
    ]

    # Each product follows one that has read the same: G for dBp, H for dAp, dx for the base.
    H, dBp = "Matmul m=3 n=17 k=7", "Matmul m=7 n=3 k=17"
    dAp, dx, add = "Matmul m=9 n=3 k=17", "Matmul m=9 n=17 k=3", "Matmul m=9 n=17 k=7"
    counts = {
        (True, True, True): [H, dBp, dAp, dx, add],
        (True, True, False): [H, dAp, dx, add],
        (True, False, True): [H, dBp, dx, add],
        (True, False, False): [H, dx, add],
        (False, True, True): [H, dBp, dAp],
        (False, True, False): [H, dAp],
        (False, False, True): [dBp],
        (False, False, False): [],
    }
    for need, products in counts.items():
        host.reset()
        host.ops.low_rank_linear_backward(
            case.grad, case.x, case.weight, case.U, case.Ap, case.Bp, *need
        )
        assert [call.partition(" batch")[0] for call in host.calls()] == products, need
        assert all(("out=4" in c) == c.startswith((dAp, dBp)) for c in host.calls())
        assert all(("beta=1" in c) == c.startswith(add) for c in host.calls())
    assert host.math_mode() == 3, "torch's math mode is put back"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_tokens(host, dtype):
    """Up to 16 tokens cuBLAS computes the base alone; float64 has no kernel of its own."""
    for tokens in (1, 16):
        case = Case(tokens, (9, 7, 3), dtype, (contiguous,))
        host.reset()
        host.ops.low_rank_linear(case.x, case.weight, None, case.Ap, case.Bp)
        expected = 3 if dtype == torch.float64 else 1
        assert len(host.calls()) == expected
        assert f"m=7 n={tokens} k=9 batch=1 beta={int(expected == 3)}" in host.calls()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7, 8)}, r"low_rank_linear: weight: .*\(\*, 9\), got shape \(7, 8\)"),
        ({"weight": torch.ones(7, 9).half()}, r"weight: expected the dtype of x, float32, got fl"),
        ({"Ap": torch.ones(9)}, r"Ap: expected shape \(\*, 9\), got shape \(9\)"),
        ({"Bp": torch.ones(4, 7)}, r"Bp: expected shape \(3, 7\), got shape \(4, 7\)"),
        ({"bias": torch.ones(6)}, r"bias: expected shape \(7\), got shape \(6\)"),
        ({"x": torch.ones(2, 5, 9)}, r"x: expected shape \(\*, \*\), got shape \(2, 5, 9\)"),
    ],
)
def test_refusals(host, change, message):
    case = Case(5, (9, 7, 3), torch.float32, (contiguous,))
    args = {name: getattr(case, name) for name in ("x", "weight", "bias", "Ap", "Bp")}
    with pytest.raises(RuntimeError, match=message):
        host.ops.low_rank_linear(*(args | change).values())


def test_what_is_needed_must_be_given(host):
    case = Case(5, (9, 7, 3), torch.float32, (contiguous,))
    call, rest = host.ops.low_rank_linear_backward, (case.Ap, case.Bp, True)
    with pytest.raises(RuntimeError, match="x: expected a tensor with need_A, got None"):
        call(case.grad, None, case.weight, case.U, *rest, True, False)
    with pytest.raises(RuntimeError, match="U: expected a tensor with need_B, got None"):
        call(case.grad, case.x, case.weight, None, *rest, False, True)


def test_integers_are_refused(host):
    ones = torch.ones(3, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="expected float32, float64, float16 or bfloat16"):
        host.ops.low_rank_add(ones, ones, ones, ones)
