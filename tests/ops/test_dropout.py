"""dropout: each element is kept with probability 1 - p, independent of all others."""

import pytest
import torch
from torch import Tensor

from rasa_ext import ops
from rasa_ext.nn import functional
from tests.helpers.operators import P, check_operator, unpacked


def drawn(seed: int, shape: tuple, p: float, device: str = "cpu") -> Tensor:
    """Draw a dropout mask with ``seed``, as booleans."""
    torch.manual_seed(seed)
    x = torch.empty(shape, device=device)
    mask, scale = functional.dropout(x, p)
    assert scale == 1 / (1 - p)
    return unpacked(mask, torch.Size(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator(dtype, device):
    for shape in ((5, 9), (3, 17), (0, 6), (8, 16)):
        x = torch.randn(shape, dtype=dtype, device=device)
        noise = torch.randint(2**62, (ops.noise_words(device, x.numel()),), device=device)
        check_operator("dropout", noise, x, 0.3)


@pytest.mark.parametrize("p", [2**-16, 0.05, 0.5, 0.9])
def test_share_of_the_dropped(p, device):
    """At each bit of a byte, the dropped share is within five standard deviations of p."""
    kept = drawn(0, (1000, 640), p, device)
    dropped = (~kept).view(-1, 8).sum(0)
    count, rate = kept.numel() / 8, round(p * 2**16) / 2**16
    assert ((dropped - count * rate).abs() <= 5 * (count * rate * (1 - rate)) ** 0.5).all()


def test_the_share_under_inductor():
    """The share is right under inductor, too, which has its own random generator."""
    torch._dynamo.reset()
    draw = torch.compile(lambda x: functional.dropout(x, 0.05)[0], fullgraph=True)
    dropped = (~unpacked(draw(torch.empty(80_000)), torch.Size([80_000]))).view(-1, 8).sum(0)
    assert ((dropped - 500).abs() < 5 * (500 * 0.95) ** 0.5).all()


def test_elements_are_independent(device):
    """Masks of rows, columns, neighbours, consecutive draws and seeds do not correlate."""
    size, p = 512, 0.3
    first, other = drawn(1, (size, size), p, device), drawn(2, (size, size), p, device)
    next_mask, *_ = functional.dropout(torch.empty(size, size, device=device), p)
    again = unpacked(next_mask, first.shape)
    z, z_other, z_again = (
        (kept.double() - (1 - p)) / (p * (1 - p)) ** 0.5 for kept in (first, other, again)
    )
    for rows in (z, z.T):
        correlation = rows @ rows.T / size**0.5
        # The largest of 131,000 normal numbers exceeds 6 once in 4,000 draws.
        assert correlation.fill_diagonal_(0).abs().max() < 6
    flat = z.flatten()
    neighbours = [flat.roll(n) for n in (1, 2, 8, 16, 64, 4096)]
    for shifted in (*neighbours, z_other.ravel(), z_again.ravel()):
        assert (flat @ shifted).abs() / size < 5


def test_nothing_is_drawn_where_nothing_is_dropped():
    state = torch.get_rng_state()
    assert functional.dropout(torch.ones(2, 4), 0.0) == (None, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_probabilities_are_refused(p, device):
    with pytest.raises((ValueError, RuntimeError), match=r"p: expected a number in \[0, 1\), got"):
        functional.dropout(torch.ones(3, 5, device=device), p)


@pytest.mark.parametrize("noise", [torch.ones(5, dtype=torch.int64), torch.ones(4)])
def test_bad_noise_is_refused(noise, device):
    with pytest.raises((ValueError, RuntimeError), match="noise: expected"):
        ops.dropout(noise.to(device), torch.ones(3, 5, device=device), P)


def test_what_is_dropped_is_zero_whatever_it_was(device):
    """NaN in a dropped element does not reach outputs or gradients."""
    x = torch.full((6, 9), float("nan"), device=device)
    mask = torch.zeros(7, dtype=torch.uint8, device=device)
    y = torch.ones(6, 4, device=device)
    Ap, Bp = torch.ones(3, 9, device=device), torch.ones(3, 4, device=device)
    added, U = ops.low_rank_add(y, x, Ap, Bp, mask, 2.0)
    assert torch.equal(added, y)
    assert not U.any()
    backward = ops.low_rank_linear_backward
    dx, dAp, _ = backward(y, x, None, None, Ap, Bp, True, True, False, mask, 2.0)
    assert not dx.any()
    assert not dAp.any()
