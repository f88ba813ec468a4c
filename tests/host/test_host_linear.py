"""The low-rank linear's host code against float64 formulas, whatever lies how in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import opcheck
from torch import Tensor

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
        self.Bt = next(layout)(draw, out, rank)
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
        low_rank = U @ self.Bt.T
        y = low_rank + self.x @ self.weight.T
        return {"y": y + self.bias if bias else y, "U": U, "added": self.grad + low_rank}

    def backward(self) -> dict[str, Tensor]:
        H = self.grad @ self.Bt
        return {
            "dx": H @ self.Ap + self.grad @ self.weight,
            "dx_add": H @ self.Ap,
            "dAp": H.T @ self.x,
            "dBt": self.grad.T @ self.U,
        }


def assert_close(found: dict, expected: dict, bounds: dict, eps: float) -> None:
    for name, value in found.items():
        error = (value.double() - expected[name]).abs()
        limit = 4 * eps * bounds[name] + 1e-300
        assert (error <= limit).all(), f"{name}: {(error / limit).max()} times what rounding does"


def run_forward(host, case: Case, bias: bool) -> dict[str, Tensor]:
    y, U = host.ops.low_rank_linear(
        case.x, case.weight, case.bias if bias else None, case.Ap, case.Bt
    )
    added, U_again = host.ops.low_rank_add(case.grad, case.x, case.Ap, case.Bt)
    assert torch.equal(U, U_again)
    return {"y": y, "U": U, "added": added}


def run_backward(host, case: Case) -> dict[str, Tensor]:
    args = (case.U, case.Ap, case.Bt, None)
    call = host.ops.low_rank_linear_backward
    dx, dAp, dBt, dd = call(case.grad, case.x, case.weight, *args, True, True)
    assert dd.shape == (0,)
    for weight, need_x, need_adapter in itertools.product(
        (case.weight, None), (True, False), (True, False)
    ):
        found = call(case.grad, case.x, weight, *args, need_x, need_adapter)
        assert found[0].shape == (dx.shape if need_x else (0,))
        assert found[1].shape == (dAp.shape if need_adapter else (0,))
        if need_adapter:
            assert torch.equal(found[1], dAp)
            assert torch.equal(found[2], dBt)
        if need_x and weight is not None:
            assert torch.equal(found[0], dx)
        if need_x and weight is None:
            dx_add = found[0]
    return {"dx": dx, "dx_add": dx_add, "dAp": dAp, "dBt": dBt}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_values(host, tokens, dtype):
    for widths, bias in itertools.product(WIDTHS, (True, False)):
        case = Case(tokens, widths, dtype, (contiguous,))
        check_values(host, case, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(host, layout, dtype):
    """Each tensor in turn in the layout, the others contiguous; and all of them."""
    for widths, tokens in itertools.product(WIDTHS[1:5], (1, 3, 17)):
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
    # dBt goes from operands to float32 without a stop in the low precision.
    exact = {"dBt": found["dBt"]}
    eps = min(case.eps, torch.finfo(torch.float32).eps)
    assert_close(exact, wide.backward(), sizes.backward(), eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(host, dtype):
    """Fake kernels give the shapes, dtypes and strides of these kernels; nothing aliases."""
    for tokens, widths in itertools.product((0, 5), WIDTHS[:3]):
        case = Case(tokens, widths, dtype, (contiguous,))
        ops, pack = host.ops, (case.Ap, case.Bt)
        backward = (case.grad, case.x, case.weight, case.U, *pack)
        opcheck(ops.low_rank_linear.default, (case.x, case.weight, case.bias, *pack))
        opcheck(ops.low_rank_add.default, (case.grad, case.x, *pack))
        for need in itertools.product((True, False), repeat=2):
            opcheck(ops.low_rank_linear_backward.default, (*backward, None, *need))


def test_products(host):
    """The adapter comes first, the base is added to it, and nothing is computed in vain."""
    case = Case(17, (9, 7, 3), torch.bfloat16, (contiguous,))
    host.reset()
    host.ops.low_rank_linear(case.x, case.weight, case.bias, case.Ap, case.Bt)
    host.ops.low_rank_linear(case.x, case.weight, None, case.Ap, case.Bt)
    host.ops.low_rank_add(case.grad, case.x, case.Ap, case.Bt)
    # Row-major results are cuBLAS's transposes: m is the width, n the tokens.
    down, base = "GemmEx m=3 n=17 k=9", "GemmEx m=7 n=17 k=9"
    up, rest = "GemmEx m=7 n=17 k=3", "batch=1 beta={} out=2 math=19"
    expected = [(down, 0), (up, 1), (base, 1), (down, 0), (up, 0), (base, 1), (down, 0), (up, 1)]
    assert host.calls() == [f"{call} {rest.format(beta)}" for call, beta in expected]

    args = (case.grad, case.x, case.weight, case.U, case.Ap, case.Bt, None)
    counts = {(True, True): 5, (True, False): 3, (False, True): 3, (False, False): 0}
    for need, count in counts.items():
        host.reset()
        host.ops.low_rank_linear_backward(*args, *need)
        assert len(host.calls()) == count
        wide = [call for call in host.calls() if "out=4" in call]
        assert len(wide) == (2 if need[1] else 0)
    assert host.math_mode() == 3, "torch's math mode is put back"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_tokens(host, dtype):
    """Up to 16 tokens cuBLAS computes the base alone; float64 has no kernel of its own."""
    for tokens in (1, 16):
        case = Case(tokens, (9, 7, 3), dtype, (contiguous,))
        host.reset()
        host.ops.low_rank_linear(case.x, case.weight, None, case.Ap, case.Bt)
        expected = 3 if dtype == torch.float64 else 1
        assert len(host.calls()) == expected
        assert f"m=7 n={tokens} k=9 batch=1 beta={int(expected == 3)}" in host.calls()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7, 8)}, r"low_rank_linear: weight: .*\(\*, 9\), got shape \(7, 8\)"),
        ({"weight": torch.ones(7, 9).half()}, r"weight: expected the dtype of x, float32, got fl"),
        ({"Ap": torch.ones(9)}, r"Ap: expected shape \(\*, 9\), got shape \(9\)"),
        ({"Bt": torch.ones(7, 4)}, r"Bt: expected shape \(7, 3\), got shape \(7, 4\)"),
        ({"bias": torch.ones(6)}, r"bias: expected shape \(7\), got shape \(6\)"),
        ({"d": torch.ones(3)}, r"d: expected None on a GPU"),
        ({"x": torch.ones(2, 5, 9)}, r"x: expected shape \(\*, \*\), got shape \(2, 5, 9\)"),
    ],
)
def test_refusals(host, change, message):
    case = Case(5, (9, 7, 3), torch.float32, (contiguous,))
    args = {name: getattr(case, name) for name in ("x", "weight", "bias", "Ap", "Bt")}
    args = args | {"d": None} | change
    with pytest.raises(RuntimeError, match=message):
        host.ops.low_rank_linear(*args.values())


def test_integers_are_refused(host):
    ones = torch.ones(3, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="expected float32, float64, float16 or bfloat16"):
        host.ops.low_rank_add(ones, ones, ones, ones)
