"""Memory that an adapted linear layer saves for the backward: only x and U.

Base weights, adapter tensors and the group's packs exist anyway and are not counted.
"""

import pytest
import torch
from torch import nn

from tests.helpers.adapters import RANK, adapter_of, patched
from tests.helpers.memory import saved_storages
from tests.helpers.models import GPT2

TOKENS, WIDTH, OUT, LAYERS = 256, 512, 384, 32
alive: list[nn.Module] = []
"""Keeps the model of the tested layer alive."""


def new(layer, x) -> tuple[list[int], torch.Tensor]:
    """Return bytes of each storage newly saved by a forward, except the group's packs, and y."""
    base = layer.base_layer
    with saved_storages() as storages:
        y = layer(x)
    there = [t for t in (x, base.weight, base.bias, *adapter_of(layer)) if t is not None]
    known = {t.untyped_storage().data_ptr() for t in there}
    sizes = sorted(size for address, size in storages.items() if address not in known)
    rows = layer.spec.num_layers * layer.effective_rank * x.element_size()
    packs = rows * layer.in_features, rows * layer.out_features
    return [size for size in sizes if size not in packs], y


def assert_is_u(size: int, layer, tokens: int, dtype) -> None:
    """Assert that ``size`` is the bytes of an (M, R) tensor in the compute dtype."""
    assert size == tokens * dtype.itemsize * layer.effective_rank


def layer_of(rank, k, dtype=torch.float32, bias=True, **options):
    base = nn.Sequential(*(nn.Linear(WIDTH, OUT, bias=bias) for _ in range(LAYERS))).to(dtype)
    alive[:] = [patched(base, rank, k, **options)]
    return alive[0][1]


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rank", "k"), [(8, 0), (8, 1), (8, 8), (16, 2)])
def test_only_u_is_new(rank, k, dtype, bias, needs_dx):
    """A forward saves one (M, R) tensor in the compute dtype: no concatenated or cast weights."""
    layer = layer_of(rank, k, dtype, bias)
    x = torch.randn(4, TOKENS // 4, WIDTH, dtype=dtype, requires_grad=needs_dx)
    (u,), y = new(layer, x)
    assert_is_u(u, layer, TOKENS, dtype)
    attributes = getattr(y.grad_fn, "__dict__", {})  # an autograd function of ours may set them
    assert not [v for v in attributes.values() if isinstance(v, torch.Tensor)]
    y.sum().backward()
    assert layer.d.grad is not None


def test_transposed_weights_are_not_copied():
    model = patched(GPT2.build(), RANK, 1)
    layer = model.transformer.h[1].attn.c_attn
    x = torch.randn(2, 7, 24, requires_grad=True)
    (u,), _ = new(layer, x)
    assert_is_u(u, layer, x[..., 0].numel(), x.dtype)


@pytest.mark.parametrize("hooked", [False, True])
def test_dropout_adds_a_bit_for_each_element_of_x(hooked):
    layer = layer_of(8, 1, dropout=0.1)
    if hooked:  # takes the path for other bases
        layer.base_layer.register_forward_hook(lambda module, args, output: output)
    x = torch.randn(4, TOKENS // 4, WIDTH, requires_grad=True)
    (mask, u), _ = new(layer.train(), x)
    assert mask == TOKENS * WIDTH // 8
    assert_is_u(u, layer, TOKENS, x.dtype)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_grad(context):
    layer = layer_of(8, 1)
    with context(), saved_storages() as storages:
        y = layer(torch.randn(TOKENS, WIDTH))
    assert not storages
    assert y.grad_fn is None
