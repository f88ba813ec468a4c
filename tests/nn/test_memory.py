"""What one adapted linear layer keeps for its backward: x, U, and what exists anyway.

Where PyTorch differentiates, on a CPU, the pack is kept, too: see the tests of few and many tokens.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import ops
from rasa_ext.nn.pack_cache import PackCache
from tests.helpers.adapters import RANK, PlainRasa, adapter_of, patched, randomize
from tests.helpers.models import GPT2

TOKENS, WIDTH, OUT, LAYERS = 256, 512, 384, 32


def kept(call) -> tuple[dict[int, int], torch.Tensor]:
    """Storages that autograd keeps during ``call``, each once: address to bytes."""
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    storages.pop(0, None)  # tensors without elements
    return storages, result


def assert_is_u(size: int, layer, tokens: int, dtype) -> None:
    """(M, R) in the compute dtype, R rounded up to a multiple of 8 at most."""
    width, rest = divmod(size, tokens * dtype.itemsize)
    assert rest == 0
    assert 0 <= width - layer.d.numel() < 8


def addresses(*tensors) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None}


def layer_of(rank, k, dtype=torch.float32, bias=True, **options):
    base = nn.Sequential(*(nn.Linear(WIDTH, OUT, bias=bias) for _ in range(LAYERS))).to(dtype)
    base.requires_grad_(False)
    model = rasa_ext.patch_model(copy.deepcopy(base), rank, k, **options)
    randomize(model, 0)
    return base[1], model[1]


def existing(layer, x) -> set[int]:
    base = layer.base_layer
    return addresses(x, base.weight, base.bias, *adapter_of(layer))


@pytest.fixture(autouse=True)
def _by_functions(monkeypatch):
    monkeypatch.setattr(ops, "torch_differentiates", lambda _: False)


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rank", "k"), [(8, 0), (8, 1), (8, 8), (16, 2)])
def test_only_u_is_new(rank, k, dtype, bias, needs_dx):
    """One (M, R) tensor in the compute dtype: no concatenated or cast weights, no U * d."""
    _, layer = layer_of(rank, k, dtype, bias)
    x = torch.randn(4, TOKENS // 4, WIDTH, dtype=dtype, requires_grad=needs_dx)
    storages, y = kept(lambda: layer(x))
    (new,) = (size for address, size in storages.items() if address not in existing(layer, x))
    assert_is_u(new, layer, TOKENS, dtype)
    assert not [v for v in vars(y.grad_fn).values() if isinstance(v, torch.Tensor)]
    y.sum().backward()
    assert layer.B.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rank", "k"), [(8, 1), (16, 2), (32, 4)])
def test_against_the_published_formula(rank, k, dtype, figure):
    """Its adapter in the base's dtype, as the official code keeps it."""
    base, layer = layer_of(rank, k, dtype)
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    mine, _ = kept(lambda: layer(x))
    leaves = adapter_of(layer).map(lambda t: t.detach().to(dtype).requires_grad_())
    theirs, _ = kept(lambda: PlainRasa(base, leaves)(x))
    there = addresses(x, base.weight, base.bias, *leaves)
    ours = sum(size for address, size in mine.items() if address not in existing(layer, x))
    published = sum(size for address, size in theirs.items() if address not in there)
    figure(
        f"saved for backward beyond x, weights and parameters, r={rank} k={k} L={LAYERS} "
        f"M={TOKENS} {WIDTH}->{OUT} {dtype}: {ours:,} bytes, official formula {published:,} "
        f"({ours / published:.2f})"
    )
    ranks = layer.d.numel()
    assert published >= ranks * (WIDTH + OUT + 2 * TOKENS) * dtype.itemsize
    assert_is_u(ours, layer, TOKENS, dtype)


def test_transposed_weights_are_not_copied():
    model = patched(GPT2.build(), RANK, 1)
    layer = model.transformer.h[1].attn.c_attn
    x = torch.randn(2, 7, 24, requires_grad=True)
    storages, _ = kept(lambda: layer(x))
    (new,) = (size for address, size in storages.items() if address not in existing(layer, x))
    assert_is_u(new, layer, x[..., 0].numel(), x.dtype)


@pytest.mark.parametrize("hooked", [False, True])
def test_dropout_adds_a_bit_for_each_element_of_x(hooked):
    _, layer = layer_of(8, 1, dropout=0.1)
    if hooked:  # no plain GEMM
        layer.base_layer.register_forward_hook(lambda module, args, output: output)
    x = torch.randn(4, TOKENS // 4, WIDTH, requires_grad=True)
    storages, _ = kept(lambda: layer.train()(x))
    mask, u = sorted(s for address, s in storages.items() if address not in existing(layer, x))
    assert mask == TOKENS * WIDTH // 8
    assert_is_u(u, layer, TOKENS, x.dtype)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 513])
def test_on_a_cpu_u_and_the_pack_are_kept(tokens, dtype, k, monkeypatch):
    """Less than the formula, which keeps U diag(d) as well: below nine tenths with many tokens."""
    monkeypatch.undo()
    _, layer = layer_of(8, k, dtype)
    x = torch.randn(tokens, WIDTH, dtype=dtype)
    storages, _ = kept(lambda: layer(x))
    new = [size for address, size in storages.items() if address not in existing(layer, x)]
    each = dtype.itemsize * layer.effective_rank
    assert sorted(new) == sorted([each * tokens, each * OUT])  # without dx, no Ap
    storages, _ = kept(lambda: layer(x.requires_grad_()))
    new = [size for address, size in storages.items() if address not in existing(layer, x)]
    whole = k > 0 or dtype != layer.A.dtype  # else A is the pack
    assert sorted(new) == sorted([each * tokens, each * OUT, *([each * WIDTH] if whole else [])])
    if tokens == 513:
        assert sum(new) < 0.9 * each * (2 * tokens + OUT + WIDTH)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_grad(context):
    _, layer = layer_of(8, 1)
    with context():
        storages, y = kept(lambda: layer(torch.randn(TOKENS, WIDTH)))
    assert not storages
    assert y.grad_fn is None


def test_a_training_forward_drops_the_cached_pack():
    """What an evaluation cached does not outlive it into training."""
    _, layer = layer_of(8, 1)
    x = torch.randn(TOKENS, WIDTH)

    def held() -> int:
        parts, seen = list(vars(layer).values()), set()
        while parts:
            part = parts.pop()
            if isinstance(part, list | tuple):
                parts.extend(part)
            elif isinstance(part, PackCache):
                parts.extend(vars(part).values())
            elif isinstance(part, torch.Tensor) and part.numel():
                seen |= addresses(part)
        return len(seen - existing(layer, x))

    assert held() == 0
    with torch.no_grad():
        layer(x)
    assert held() == 2
    layer(x)
    assert held() == 0
