"""Dropout on the adapter's input: its mask, the linears under it, and whole models in training."""

from __future__ import annotations

import copy

import pytest
import torch
from test_ops import (
    DTYPES,
    FLOOR,
    SHAPES,
    as_args,
    case,
    differentiable,
    make_adapter,
    packed,
    places,
    random_mask,
)
from torch import Tensor, nn

from benchmarks import dropout
from rasa_ext import ops
from rasa_ext.nn import functional
from tests.helpers import oracle
from tests.helpers.adapters import (
    Errors,
    adapter_of,
    adapters,
    assert_matches_oracle,
    excesses,
    observe,
    patched,
)
from tests.helpers.models import GPT2, LLAMA, SEQUENTIAL, Checkpointed, ids

P = 0.25


def unpacked(mask: Tensor, shape: torch.Size) -> Tensor:
    """The bits of a mask as booleans."""
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.reshape(-1)[: shape.numel()].view(shape).bool()


def drawn(seed: int, shape: tuple, p: float, device: str = "cpu") -> Tensor:
    """The mask of one draw under a seed, as booleans."""
    torch.manual_seed(seed)
    mask, scale = functional.dropout(torch.empty(shape, device=device), p)
    assert scale == 1 / (1 - p)
    return unpacked(mask, torch.Size(shape))


@pytest.mark.parametrize("p", [2**-16, 0.05, 0.5, 0.9])
def test_share_of_the_dropped(p, device):
    """At each of the eight places of a byte, within five standard deviations."""
    kept = drawn(0, (1000, 640), p, device)
    dropped = (~kept).view(-1, 8).sum(0)
    count, rate = kept.numel() / 8, round(p * 2**16) / 2**16
    assert ((dropped - count * rate).abs() <= 5 * (count * rate * (1 - rate)) ** 0.5).all()


def test_elements_are_independent(device):
    """Rows, columns, neighbours, layers and seeds do not correlate."""
    size, p = 512, 0.3
    first, other = drawn(1, (size, size), p, device), drawn(2, (size, size), p, device)
    again = unpacked(
        functional.dropout(torch.empty(size, size, device=device), p)[0], torch.Size((size, size))
    )
    z, z_other, z_again = (
        (kept.double() - (1 - p)) / (p * (1 - p)) ** 0.5 for kept in (first, other, again)
    )
    for rows in (z, z.T):
        correlation = rows @ rows.T / size**0.5
        # The largest of 131,000 normal numbers is above 6 once in 4,000 draws.
        assert correlation.fill_diagonal_(0).abs().max() < 6
    flat = z.flatten()
    for shifted in (
        *(flat.roll(n) for n in (1, 2, 8, 16, 64, 4096)),
        z_other.ravel(),
        z_again.ravel(),
    ):
        assert (flat @ shifted).abs() / size < 5


def test_the_mask_follows_the_seed(device):
    same, other = (drawn(seed, (33, 17), P, device) for seed in (3, 4))
    assert torch.equal(drawn(3, (33, 17), P, device), same)
    assert not torch.equal(same, other)


def test_nothing_is_drawn_where_nothing_is_dropped():
    model = patched(nn.Sequential(nn.Linear(4, 4)), dropout=0.5).eval()
    plain = copy.deepcopy(model)
    plain[0].dropout = 0.0
    state = torch.get_rng_state()
    assert functional.dropout(torch.ones(2, 4), 0.0) == (None, 1.0)
    assert torch.equal(model(torch.ones(2, 4)), plain.train()(torch.ones(2, 4)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_probabilities(p, device):
    with pytest.raises((ValueError, RuntimeError), match=r"p: expected a number in \[0, 1\), got"):
        functional.dropout(torch.ones(3, 5, device=device), p)


@pytest.mark.parametrize("noise", [torch.ones(5, dtype=torch.int64), torch.ones(4)])
def test_bad_noise(noise, device):
    with pytest.raises((ValueError, RuntimeError), match="noise: expected"):
        ops.dropout_mask(noise.to(device), torch.ones(3, 5, device=device), P)


@places
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, in_pack, device):
    """Against float64, within twice the error of the same formula in plain PyTorch."""
    ours, theirs = Errors(), Errors()
    for _ in range(32):
        x, weight, bias, adapter = case(shape, dtype, device)
        mask = random_mask(x)
        x[unpacked(mask, x.shape).logical_not()] *= 1e3  # what is dropped must not be seen
        kept = unpacked(mask, x.shape)
        grad = torch.randn(x.shape[0], weight.shape[0], dtype=dtype, device=device)
        tensors = (x, weight, bias, *packed(adapter, dtype, in_pack=in_pack), grad)
        found = run_ops(*tensors, mask)
        wide = (None if t is None else t.double() for t in tensors)
        reference = formulas(*wide, kept)
        ours.add(found, reference)
        theirs.add(formulas(*tensors, kept), reference)
    assert not excesses(ours, theirs, FLOOR.get(dtype, torch.finfo(dtype).eps))[0]


def run_ops(x, weight, bias, Ap, Bt, d, grad, mask) -> dict[str, Tensor]:
    drop = mask, 1 / (1 - P)
    y, U = ops.low_rank_linear(x, weight, bias, Ap, Bt, d, *drop)
    added, _ = ops.low_rank_add(grad, x, Ap, Bt, d, *drop)
    backward = ops.low_rank_linear_backward
    dx, dAp, dBt, dd = backward(grad, x, weight, U, Ap, Bt, d, True, True, *drop)
    dx_add = backward(grad, x, None, U, Ap, Bt, d, True, False, *drop)[0]
    found = {"y": y, "U": U, "added": added, "dx": dx, "dx_add": dx_add}
    return {**found, "dAp": dAp, "dBt": dBt, "dd": dd}


def formulas(x, weight, bias, Ap, Bt, d, grad, kept) -> dict[str, Tensor]:
    def drop(tensor):
        return torch.where(kept, tensor / (1 - P), 0)

    U, H = drop(x) @ Ap.T, grad @ Bt
    scale = torch.ones_like(U[:1]) if d is None else d.to(x.dtype)
    dx = drop((H * scale) @ Ap)
    return {
        "y": x @ weight.T + bias + (U * scale) @ Bt.T,
        "U": U,
        "added": grad + (U * scale) @ Bt.T,
        "dx": grad @ weight + dx,
        "dx_add": dx,
        "dAp": (H * scale).T @ drop(x),
        "dBt": grad.T @ (U * scale),
        "dd": grad.new_empty(0) if d is None else (U * H).sum(0),
    }


def test_what_is_dropped_is_zero_whatever_it_was(device):
    """Not-a-numbers where the adapter does not look do not reach it."""
    x = torch.full((6, 9), float("nan"), device=device)
    mask = torch.zeros(7, dtype=torch.uint8, device=device)
    y = torch.ones(6, 4, device=device)
    Ap, Bt = torch.ones(3, 9, device=device), torch.ones(4, 3, device=device)
    added, U = ops.low_rank_add(y, x, Ap, Bt, None, mask, 2.0)
    assert torch.equal(added, y)
    assert not U.any()


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
@pytest.mark.parametrize("form", [functional.adapted_linear, functional.adapted_add])
def test_gradcheck(form, shape, device):
    x, weight, bias, _ = case(shape, torch.float64, device)
    adapter = differentiable(make_adapter(*shape[1:], device, torch.float64))
    y = (x @ weight.T).requires_grad_()
    head = (x.requires_grad_(), weight, bias) if form is functional.adapted_linear else (y, x)
    args = (*head, *as_args(adapter), 1, random_mask(x), 1 / (1 - P))
    assert torch.autograd.gradcheck(form, args)


def layer_of(dtype=torch.float64, hooked=False, base=None, **options):
    """One adapted layer of (9, 7) with dropout, whose base is a plain GEMM unless hooked."""
    stack = nn.Sequential(*(nn.Linear(9, 7) for _ in range(3))).to(dtype)
    if hooked:
        stack[1].register_forward_hook(lambda module, args, output: output)
    model = patched(stack, 4, 1, dropout=P, **options).train()
    return stack[1], model[1]


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (0, 9)], ids=str)
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("needs_dx", [False, True])
def test_a_layer(needs_dx, hooked, shape):
    """Output and gradients, given the mask; without grad the same under the same seed."""
    base, layer = layer_of(hooked=hooked, adapter_dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_(needs_dx)
    kept = drawn(7, shape, P).view(-1, 9)
    torch.manual_seed(7)
    y = layer(x)
    flat = x.detach().view(-1, 9)
    dropped = torch.where(kept, flat, 0) / (1 - P)
    adapter, nothing = adapter_of(layer), torch.zeros_like(base.weight)
    expected = flat @ base.weight.T + base.bias + oracle.linear(dropped, nothing, None, adapter)
    torch.testing.assert_close(y.view(-1, 7), expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    G = grad.view(-1, 7)
    wanted = oracle.linear_grads(G, dropped, nothing, adapter)
    for field in ("A", "B", "d", "A_pool", "B_pool"):
        torch.testing.assert_close(getattr(adapter, field).grad, wanted[field], msg=field)
    if needs_dx:
        wanted_x = G @ base.weight + torch.where(kept, wanted["x"], 0) / (1 - P)
        torch.testing.assert_close(x.grad.view(-1, 9), wanted_x)
    with torch.no_grad():
        torch.manual_seed(7)
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(base_dtype, hooked):
    """In autocast's dtype, as good as plain PyTorch in it; x may come in another."""
    ours, theirs = Errors(), Errors()
    base, layer = layer_of(base_dtype, hooked)
    adapter = adapter_of(layer)
    down, up, d = (t.bfloat16() for t in adapter.stacked())
    for seed in range(8):
        x = torch.randn(64, 9)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(seed)
            y = layer(x)
        assert y.dtype == torch.bfloat16
        dropped = torch.where(drawn(seed, (64, 9), P), x, 0) / (1 - P)
        weight, bias = base.weight.bfloat16(), base.bias.bfloat16()
        plain = nn.functional.linear(x.bfloat16(), weight, bias)
        plain = plain + ((dropped.bfloat16() @ down.T) * d) @ up.T
        wide = x.double() @ base.weight.double().T + base.bias.double()
        wide = wide + oracle.linear(dropped, torch.zeros_like(weight), None, adapter)
        ours.add({"y": y}, {"y": wide.detach()})
        theirs.add({"y": plain}, {"y": wide.detach()})
    assert not excesses(ours, theirs, 0.0)[0]


def step(model: nn.Module, entry, seed: int = 11, run=None) -> dict[str, Tensor]:
    """Logits and gradients in float64, of ``run`` where given, under a seed."""
    inputs = entry.inputs(0, torch.float64)
    torch.manual_seed(seed)
    return observe(model if run is None else run, adapters(model), entry, inputs)


def assert_same(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def with_dropout(base: nn.Module) -> nn.Module:
    return patched(base.double(), dropout=P, adapter_dtype=torch.float64).train()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("entry", [LLAMA, GPT2], ids=ids)
def test_gradient_checkpointing(entry, use_reentrant):
    """Restores the generator's state, and so draws the same masks again."""
    model = with_dropout(entry.build())
    expected = step(model, entry)
    assert not torch.allclose(step(model, entry, 12)["logits"], expected["logits"])
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(step(model, entry), expected)


def test_compile():
    """As one graph; backends that keep torch's generators give the same masks."""
    torch._dynamo.reset()
    model = with_dropout(LLAMA.build())
    expected = step(model, LLAMA)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(step(model, LLAMA, run=compiled), expected)


def test_the_mask_under_inductor():
    """Which draws from a generator of its own: the shares are those of any."""
    torch._dynamo.reset()
    draw = torch.compile(lambda x: functional.dropout(x, 0.05)[0], fullgraph=True)
    dropped = (~unpacked(draw(torch.empty(80_000)), torch.Size([80_000]))).view(-1, 8).sum(0)
    assert ((dropped - 500).abs() < 5 * (500 * 0.95) ** 0.5).all()


def test_compile_with_checkpointing():
    torch._dynamo.reset()
    model = with_dropout(Checkpointed(use_reentrant=False))
    inputs = {"x": torch.randint(0, 32, (4, 5))}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(11)
    expected = observe(model, adapters(model), SEQUENTIAL, inputs)
    torch.manual_seed(11)
    assert_same(observe(compiled, adapters(model), SEQUENTIAL, inputs), expected)


def test_deep_copies_and_steps():
    """Equal under equal seeds, and no two steps alike."""
    model = with_dropout(SEQUENTIAL.build())
    twin = copy.deepcopy(model)
    expected = step(model, SEQUENTIAL)
    assert_same(step(twin, SEQUENTIAL), expected)
    following = observe(model, adapters(model), SEQUENTIAL, SEQUENTIAL.inputs(0, torch.float64))
    assert not torch.equal(following["logits"], expected["logits"])


def test_eval_is_without_dropout():
    base = SEQUENTIAL.build().double()
    model = with_dropout(base).eval()
    inputs = SEQUENTIAL.inputs(0, torch.float64)
    assert_matches_oracle(SEQUENTIAL, base, model, step(model, SEQUENTIAL), inputs)


@pytest.mark.gpu
def test_a_captured_graph_draws_anew():
    """Each replay has a mask of its own, from torch's generator, and gradients under it."""
    _, layer = layer_of(torch.float32)
    layer.cuda()
    x = torch.randn(64, 9, device="cuda", requires_grad=True)
    inputs = x, *layer.adapter()

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y.sum(), inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        graph.replay()
        replays.append([t.clone() for t in captured])
    assert all(map(torch.equal, replays[0], replays[1]))
    assert not torch.equal(replays[0][0], replays[2][0])
    torch.manual_seed(1)
    for found, expected in zip(replays[0], step(), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_benchmark_counts_what_is_kept(capsys):
    """A bit for each element of x, against a dropped copy and a mask in x's dtype instead of x."""
    dropout.compare((16, 32, 24), torch.float32, P, 2, "cpu")
    *_, mine, theirs = capsys.readouterr().out.split()
    assert (mine, theirs) == (str(16 * 32 // 8), f"{16 * 32 * 4:,}")
