"""The operators of one layer: schemas, fake kernels, values and gradients on awkward shapes."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from common import Errors, excesses, opcheck
from oracle import Adapter

from rasa_ext import ops
from rasa_ext.nn import functional

NAMES = (
    "pack", "pack_backward", "low_rank_linear", "low_rank_add", "low_rank_linear_backward",
    "dropout_mask",
)  # fmt: skip
FIELDS = ("A", "A_pool", "B", "B_pool", "d")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6}
# (tokens, in, out, private ranks, pool ranks): odd, one, none of them, k = 0 and k = r.
SHAPES = (
    (5, 9, 7, 3, 6),
    (3, 17, 2, 0, 5),
    (0, 6, 4, 2, 4),
    (8, 16, 24, 4, None),
    (1, 1, 1, 1, 0),
    (33, 65, 31, 7, 32),
)

# Where the diagonal may be: folded into the pack, or left to the linear where packs go without it.
FOLDS = {"cpu": (True, False), "cuda": (True,)}
places = pytest.mark.parametrize(
    ("device", "in_pack"),
    [
        pytest.param("cpu", True, id="cpu-d in pack"),
        pytest.param("cpu", False, id="cpu-d on U"),
        pytest.param("cuda", True, id="cuda-d in pack", marks=pytest.mark.gpu),
    ],
)


def make_adapter(width, out, own, pooled, device="cpu", dtype=torch.float32) -> Adapter:
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    pools = (None, None) if pooled is None else (draw(pooled, width), draw(out, pooled))
    rank = own + (pooled or 0)
    return Adapter(draw(own, width), pools[0], draw(out, own), pools[1], draw(rank))


def as_args(adapter: Adapter) -> tuple:
    return tuple(getattr(adapter, field) for field in FIELDS)


def packed(adapter: Adapter, dtype, multiple=1, in_pack=True):
    """Ap, Bt, and the diagonal (Rp,) where it is left to the linear."""
    *factors, d = as_args(adapter)
    Ap, Bt = ops.pack(*factors, d if in_pack else None, dtype, multiple)
    fill = Ap.shape[0] - d.shape[0]
    return Ap, Bt, None if in_pack else torch.nn.functional.pad(d, (0, fill))


def case(shape, dtype, device, bias=True):
    tokens, width, out, own, pooled = shape

    def draw(*size):
        return torch.randn(*size, dtype=dtype, device=device)

    adapter = make_adapter(width, out, own, pooled, device)
    return draw(tokens, width), draw(out, width), draw(out) if bias else None, adapter


def random_mask(x):
    """A bit for each element of x, as dropout's."""
    return torch.randint(256, (-(-x.numel() // 8),), dtype=torch.uint8, device=x.device)


def sample_calls(device, dtype=torch.float32):
    """Arguments for every operator, with each optional argument present and not."""
    for shape, bias, folded in itertools.product(SHAPES[:4], (True, False), FOLDS[device]):
        x, weight, b, adapter = case(shape, dtype, device, bias)
        multiple = 1 if bias else 4
        Ap, Bt, rest = packed(adapter, dtype, multiple, folded)
        grad, U = torch.randn_like(x @ weight.T), x @ Ap.T
        *factors, d = as_args(adapter)
        yield "pack", (*factors, d if folded else None, dtype, multiple)
        grads = torch.randn_like(Ap.float()), torch.randn_like(Bt.float())
        yield "pack_backward", (*grads, adapter.B, adapter.B_pool, d if folded else None)
        noise = torch.randint(2**62, (ops.noise_words(device, x.numel()),), device=device)
        yield "dropout_mask", (noise, x, 0.3)
        drop = (random_mask(x), 1.25) if bias == folded else ()
        yield "low_rank_linear", (x, weight, b, Ap, Bt, rest, *drop)
        yield "low_rank_add", (grad, x, Ap, Bt, rest, *drop)
        for need in itertools.product((True, False), repeat=2):
            base = weight if bias else None
            yield "low_rank_linear_backward", (grad, x, base, U, Ap, Bt, rest, *need, *drop)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name, dtype, device):
    """Schema (nothing mutated, nothing aliased), fake kernel and compilation of every operator."""
    operator = getattr(torch.ops.rasa_ext, name).default
    calls = [args for called, args in sample_calls(device, dtype) if called == name]
    assert calls
    for args in calls:
        opcheck(operator, args)


@pytest.mark.parametrize("name", NAMES)
def test_callables_are_the_operators(name, device):
    operator = getattr(torch.ops.rasa_ext, name).default
    for called, args in sample_calls(device):
        if called == name:
            pairs = zip(getattr(ops, name)(*args), operator(*args), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@places
@pytest.mark.parametrize("multiple", [1, 2, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack(shape, dtype, multiple, in_pack, device):
    """Each factor is rounded once, after d was folded in, and padded with zeros."""
    adapter = make_adapter(*shape[1:], device)
    Ap, Bt, _ = packed(adapter, dtype, multiple, in_pack)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    down, up, d = (t.to(wide) for t in adapter.stacked())
    rank = d.numel()
    width = -(-rank // multiple) * multiple
    assert Ap.shape == (width, shape[1])
    assert Bt.shape == (shape[2], width)
    assert Ap.dtype == Bt.dtype == dtype
    assert torch.equal(Ap[:rank], down.to(dtype))
    assert torch.equal(Bt[:, :rank], (up * d if in_pack else up).to(dtype))
    assert not Ap[rank:].any()
    assert not Bt[:, rank:].any()


@places
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, bias, in_pack, device):
    """Against float64, within twice the error of the same formula in plain PyTorch."""
    ours, theirs = Errors(), Errors()
    for _ in range(32):  # pooled, since one rounding of a single number says little
        x, weight, b, adapter = case(shape, dtype, device, bias)
        grad = torch.randn(x.shape[0], weight.shape[0], dtype=dtype, device=device)
        pack = packed(adapter, dtype, in_pack=in_pack)
        found = run_ops(x, weight, b, *pack, grad)
        wide = (None if t is None else t.double() for t in (x, weight, b, *pack, grad))
        reference = formulas(*wide)
        ours.add(found, reference)
        theirs.add(formulas(x, weight, b, *pack, grad), reference)
    assert found["y"].dtype == found["dx"].dtype == dtype
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert {found[key].dtype for key in ("dAp", "dBt", "dd")} == {accumulated}
    assert not excesses(ours, theirs, FLOOR.get(dtype, torch.finfo(dtype).eps))[0]


def run_ops(x, weight, bias, Ap, Bt, d, grad):
    y, U = ops.low_rank_linear(x, weight, bias, Ap, Bt, d)
    backward = ops.low_rank_linear_backward
    dx, dAp, dBt, dd = backward(grad, x, weight, U, Ap, Bt, d, True, True)
    added, U = ops.low_rank_add(grad, x, Ap, Bt, d)
    dx_add = backward(grad, x, None, U, Ap, Bt, d, True, False)[0]
    found = {"y": y, "U": U, "dx": dx, "dAp": dAp, "dBt": dBt, "dd": dd}
    return {**found, "added": added, "dx_add": dx_add}


def formulas(x, weight, bias, Ap, Bt, d, grad):
    U, H = x @ Ap.T, grad @ Bt
    dd = grad.new_empty(0) if d is None else (U * H).sum(0)
    scale = torch.ones_like(U[:1]) if d is None else d.to(x.dtype)
    y = x @ weight.T + (U * scale) @ Bt.T
    return {
        "y": y if bias is None else y + bias,
        "U": U,
        "dx": grad @ weight + (H * scale) @ Ap,
        "dAp": (H * scale).T @ x,
        "dBt": grad.T @ (U * scale),
        "dd": dd,
        "added": grad + (U * scale) @ Bt.T,
        "dx_add": (H * scale) @ Ap,
    }


def chain(x, weight, bias, adapter, grad, multiple=1, in_pack=True):
    """Forward and backward through all operators: y, and gradients keyed as the oracle's."""
    Ap, Bt, rest = packed(adapter, x.dtype, multiple, in_pack)
    y, U = ops.low_rank_linear(x, weight, bias, Ap, Bt, rest)
    dx, dAp, dBt, dd = ops.low_rank_linear_backward(grad, x, weight, U, Ap, Bt, rest, True, True)
    rank = adapter.d.numel()
    assert not dAp[rank:].any()
    assert not dBt[:, rank:].any()
    args = (dAp, dBt, adapter.B, adapter.B_pool, adapter.d if in_pack else None)
    *grads, folded = ops.pack_backward(*args)
    assert bool(folded.numel()) == in_pack
    last = folded if in_pack else dd[:rank]
    return {"y": y, "x": dx, **dict(zip(FIELDS, (*grads, last), strict=True))}


@places
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_chain(shape, multiple, in_pack, device):
    """Wherever the diagonal is applied, and however wide the pad, the same gradients."""
    x, weight, bias, _ = case(shape, torch.float64, device)
    adapter = make_adapter(*shape[1:], device, torch.float64)
    grad = torch.randn(x.shape[0], weight.shape[0], dtype=x.dtype, device=device)
    found = chain(x, weight, bias, adapter, grad, multiple, in_pack)
    expected = oracle.linear_grads(grad, x, weight, adapter)
    expected["y"] = oracle.linear(x, weight, bias, adapter)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


@places
@pytest.mark.parametrize(("need_x", "need_adapter"), [*itertools.product((True, False), repeat=2)])
def test_only_what_is_needed_comes_back(need_x, need_adapter, in_pack, device):
    x, weight, _, adapter = case(SHAPES[0], torch.float32, device)
    Ap, Bt, rest = packed(adapter, x.dtype, in_pack=in_pack)
    grad = torch.randn_like(x @ weight.T)
    dx, dAp, dBt, dd = torch.ops.rasa_ext.low_rank_linear_backward(
        grad, x, weight, x @ Ap.T, Ap, Bt, rest, need_x, need_adapter
    )
    assert bool(dx.numel()) == need_x
    assert bool(dAp.numel()) == bool(dBt.numel()) == need_adapter
    assert bool(dd.numel()) == (need_adapter and not in_pack)


@places
@pytest.mark.parametrize("layout", ["weight", "x", "grad", "adapter"])
def test_strides(layout, in_pack, device):
    """A transposed weight, a strided x, an expanded grad, adapters that are views."""
    x, weight, bias, _ = case(SHAPES[0], torch.float64, device)
    adapter = make_adapter(*SHAPES[0][1:], device, torch.float64)
    grad = torch.randn(x.shape[0], weight.shape[0], dtype=x.dtype, device=device)
    if layout == "weight":
        weight = weight.T.contiguous().T
    elif layout == "x":
        x = torch.stack([x, x], 2)[..., 0]
    elif layout == "grad":
        grad = grad[:1].expand_as(grad)
    else:
        adapter = adapter.map(lambda t: torch.stack([t, t], -1)[..., 0])
    found = chain(x, weight, bias, adapter, grad, in_pack=in_pack)
    expected = oracle.linear_grads(grad, x, weight, adapter)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_narrow_adapters_lose_nothing_in_a_wide_pack(dtype, stored, device):
    """d is folded in the wider of the two dtypes; gradients are as good as the stored one."""
    adapter = make_adapter(17, 9, 3, 4, device).map(lambda t: t.to(stored))
    Ap, Bt, _ = packed(adapter, dtype)
    _, up, d = adapter.stacked()
    accurate = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    change = oracle.delta(adapter)
    assert (Bt.double() @ Ap.double() - change).norm() <= accurate * change.norm()
    dAp, dBt = torch.randn_like(Ap.float()), torch.randn_like(Bt.float())
    found = ops.pack_backward(dAp, dBt, adapter.B, adapter.B_pool, adapter.d)
    scaled = dBt * d
    expected = (dAp[:3], dAp[3:], scaled[:, :3], scaled[:, 3:], (up * dBt).sum(0))
    for got, value in zip(found, expected, strict=True):
        assert got.dtype == stored
        assert (got - value).norm() <= torch.finfo(stored).eps * value.norm()


def differentiable(adapter: Adapter) -> Adapter:
    return adapter.map(lambda t: t.requires_grad_())


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
@pytest.mark.parametrize("form", ["linear", "linear without bias", "add", "pack"])
def test_gradcheck(shape, form, device):
    x, weight, bias, _ = case(shape, torch.float64, device, form == "linear")
    adapter = differentiable(make_adapter(*shape[1:], device, torch.float64))
    x = x.reshape(1, *x.shape).requires_grad_()
    if form == "pack":
        assert torch.autograd.gradcheck(functional.pack, (*as_args(adapter), torch.float64))
    elif form == "add":
        y = (x.detach() @ weight.T).requires_grad_()
        assert torch.autograd.gradcheck(functional.adapted_add, (y, x, *as_args(adapter)))
    else:
        args = (x, weight, bias, *as_args(adapter))
        assert torch.autograd.gradcheck(functional.adapted_linear, args)


@pytest.mark.parametrize("frozen", ["x", *FIELDS])
def test_each_input_may_be_frozen(frozen, device):
    x, weight, bias, _ = case(SHAPES[0], torch.float64, device)
    adapter = differentiable(make_adapter(*SHAPES[0][1:], device, torch.float64))
    x.requires_grad_()
    (x if frozen == "x" else getattr(adapter, frozen)).requires_grad_(False)
    grad = torch.randn(x.shape[0], weight.shape[0], dtype=x.dtype, device=device)
    functional.adapted_linear(x, weight, bias, *as_args(adapter)).backward(grad)
    for field, value in oracle.linear_grads(grad, x, weight, adapter).items():
        tensor = x if field == "x" else getattr(adapter, field)
        if field == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, value, msg=field)


def test_no_dx_is_computed_where_x_needs_none(device):
    """The frozen weight takes part in no product of the backward."""
    tokens, width, out, padded_rank = 64, 320, 480, 16
    x, weight, bias, _ = case((tokens, width, out, 2, 2), torch.float32, device)
    adapter = differentiable(make_adapter(width, out, 2, 2, device))
    y = functional.adapted_linear(x, weight, bias, *as_args(adapter))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() <= 2 * tokens * padded_rank * (width + 2 * out)


def test_a_second_derivative_is_refused(device):
    x, weight, bias, _ = case(SHAPES[0], torch.float64, device)
    adapter = differentiable(make_adapter(*SHAPES[0][1:], device, torch.float64))
    y = functional.adapted_linear(x.requires_grad_(), weight, bias, *as_args(adapter))
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        first.sum().backward()
