"""Memory of adapted experts: they make and save no tensor as large as a stacked weight."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from rasa_ext import ops
from tests.helpers import experts
from tests.helpers.experts import GROUPINGS, TOP, UNLIKE
from tests.helpers.memory import Made, saved_storages

COUNT, WIDTH, INNER, TOKENS, RANK = 8, 64, 96, 64, 3
PAIRS, LAYERS = TOKENS * TOP, 2


def module_of(family: str, grouping: str, dtype: torch.dtype = torch.float32, **options):
    """Return the first layer's adapted experts, in a model with large weights for few tokens."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER}
    if family == "nemotron_h":
        sizes |= {"n_routed_experts": COUNT, "moe_intermediate_size": INNER}
    else:
        sizes |= {"num_local_experts": COUNT}
    model = experts.patched(experts.model(family, **sizes).to(dtype), grouping, RANK, 1, **options)
    return experts.adapted(model)[0]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, chosen, shares = experts.inputs(TOKENS, dtype=dtype, hidden=WIDTH, count=COUNT)
    return x.requires_grad_(), chosen, shares.requires_grad_()


def step(module: nn.Module, x: Tensor, chosen: Tensor, shares: Tensor) -> None:
    module(x, chosen, shares).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", UNLIKE)
def test_nothing_of_the_size_of_a_weight_is_made(family, grouping, dtype):
    module = module_of(family, grouping, dtype, dropout=0.1).train()
    smallest = COUNT * WIDTH * INNER
    for _ in range(2):
        with Made() as made:
            step(module, *inputs(dtype))
        assert 0 < max(made.sizes) < smallest
    with Made() as made, torch.no_grad():
        module.eval()(*inputs(dtype))
    assert 0 < max(made.sizes) < smallest


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_what_is_saved(grouping):
    """Autograd saves x without a copy, U, the packs, and tensors that gate and router need."""
    module = module_of("mixtral", grouping)
    x, chosen, shares = inputs()
    with saved_storages() as saved:
        y = module(x, chosen, shares)
    pools = (each.pool.parameters() for each in module.stacks().values())
    tensors = (x, shares, *module.parameters(), *itertools.chain(*pools))
    known = {t.untyped_storage().data_ptr() for t in tensors}
    found = sorted(size for address, size in saved.items() if address not in known)
    own, size = RANK - 1, 4
    rank = own + {"slot": LAYERS, "layer": 0, "shared": 0}[grouping]
    multiple = ops.experts_rank_multiple(torch.float32)
    rank = -(-rank // multiple) * multiple
    U = size * PAIRS * rank
    gate = [size * PAIRS * 2 * INNER, size * PAIRS * INNER]  # the gate's argument and its half
    expected = [U, U, *gate, size * PAIRS * INNER, size * PAIRS * WIDTH]  # h, z
    expected += [size * COUNT, size * PAIRS, 8 * PAIRS]  # offsets, shares, order
    expected += [size * COUNT * rank * n for n in (WIDTH, 2 * INNER, INNER, WIDTH)]
    if grouping != "slot":
        P = size * {"layer": COUNT, "shared": LAYERS}[grouping]
        expected += [TOKENS * P, PAIRS * P]  # V and V * d of the input
        expected += [PAIRS * P, PAIRS * P, TOKENS * P]  # for the output, and their sum by token
    assert found == sorted(expected)
    y.sum().backward()
