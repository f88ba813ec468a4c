"""Embeddings and heads with trained rows, compared with training the whole table."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rasa_ext.nn.trained_tokens import TrainedTokens
from tests.helpers.adapters import same_bits
from tests.helpers.memory import Made

IDS = (9, 2, 5)
TOKENS = torch.tensor([[2, 3, 9, 9], [0, 11, 2, 5]])
ALL = {"dtype": torch.float64}


class Scaled(nn.Embedding):
    """An embedding with outputs multiplied by a scale in the weight's dtype, like Gemma's."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("embed_scale", torch.tensor(3.25), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.requires_grad_(False)


BASES = {
    "embedding": lambda: nn.Embedding(12, 6, **ALL),
    "untrained padding": lambda: nn.Embedding(12, 6, padding_idx=3, **ALL),
    "trained padding": lambda: nn.Embedding(12, 6, padding_idx=2, **ALL),
    "scaled": lambda: Scaled(12, 6, **ALL),
    "head": lambda: nn.Linear(6, 12, bias=False, **ALL),
    "head with bias": lambda: nn.Linear(6, 12, **ALL),
}


def case(name: str, dtype: torch.dtype = torch.float64):
    """Return a wrapped base with changed rows, a base with these rows in its table, an input."""
    base = drawn(BASES[name]()).to(dtype)
    module = TrainedTokens(base, IDS, torch.promote_types(dtype, torch.float32))
    assert torch.equal(module.rows, base.weight[list(IDS)].to(module.rows.dtype))
    with torch.no_grad():
        module.rows.add_(torch.randn(3, 6, generator=torch.Generator().manual_seed(1)))
    dense = copy.deepcopy(base)
    dense.weight[list(IDS)] = module.rows.detach().to(dtype)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return module, dense, x.to(dtype) if isinstance(base, nn.Linear) else TOKENS


@pytest.mark.parametrize("name", BASES)
def test_forward_and_gradients(name):
    """Output and gradients equal a fully trained table's, for the trained rows."""
    module, dense, x = case(name)
    dense.weight.requires_grad_(True)
    if x.is_floating_point():
        x.requires_grad_(True)
    results = []
    for each in (module, dense):
        y = each(x)
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), **ALL)
        (y.sin() * probe).sum().backward()
        results.append((y.detach(), x.grad))
        x.grad = None
    (y, dx), (expected, expected_dx) = results
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.rows.grad, dense.weight.grad[list(IDS)])
    if dx is not None:
        torch.testing.assert_close(dx, expected_dx, rtol=1e-12, atol=1e-12)
    assert module.base_layer.weight.grad is None


@pytest.mark.parametrize("name", BASES)
def test_half_precision(name):
    """Rows stay float32; a look-up is bit-identical to the merged table."""
    module, dense, x = case(name, torch.bfloat16)
    y = module(x)
    assert module.rows.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    if isinstance(dense, nn.Embedding):
        assert same_bits(y.detach(), dense(x))
    else:
        torch.testing.assert_close(y, dense(x), rtol=2**-7, atol=2**-6)
    y.sum().backward()
    assert module.rows.grad.dtype == torch.float32


def test_gradients_of_a_frequent_token_are_summed_in_float32():
    module = TrainedTokens(drawn(nn.Embedding(4, 2)).bfloat16(), [1], torch.float32)
    module(torch.ones(1, 1001, dtype=torch.long)).sum().backward()
    assert torch.equal(module.rows.grad, torch.full((1, 2), 1001.0))


def tied():
    embedding = drawn(nn.Embedding(12, 6, **ALL))
    head = nn.Linear(6, 12, bias=False, **ALL)
    head.weight = embedding.weight
    owner = TrainedTokens(embedding, IDS, torch.float64)
    return nn.Sequential(owner, nn.Tanh(), TrainedTokens(head, IDS, torch.float64, owner))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_tied_head_has_the_rows_of_its_embedding(copied):
    model = copied(tied())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.rows"]
    assert [key for key in model.state_dict() if "rows" in key] == ["0.rows"]
    assert model[2].owner is model[0]
    with torch.no_grad():
        model[0].rows.mul_(2)
    table = model[0].base_layer.weight.clone()
    table[list(IDS)] = model[0].rows.detach()
    table.requires_grad_(True)
    y, expected = model(TOKENS), F.linear(F.embedding(TOKENS, table).tanh(), table)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(model[0].rows.grad, table.grad[list(IDS)])
    assert torch.equal(model[2].weight, table)
    assert torch.equal(model[0].weight, table)


def test_code_that_reads_the_weight_trains_the_rows():
    """Rows also train if code reads ``weight``, such as losses that compute in chunks."""
    module, dense, x = case("head")
    y = F.linear(x, module.weight)
    torch.testing.assert_close(y, dense(x))
    y.sum().backward()
    torch.testing.assert_close(module.rows.grad, x.sum((0, 1)).expand(3, 6))


def test_a_merged_table_is_not_trained():
    model = tied()
    model[0].merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        model.train()(TOKENS)


def test_the_table_is_not_copied():
    """Neither a forward nor a backward copies the table."""
    embedding = nn.Embedding(5000, 64)
    head = nn.Linear(64, 5000, bias=False)
    head.weight = embedding.weight
    owner = TrainedTokens(embedding.requires_grad_(False), [7, 4999], torch.float32)
    model = nn.Sequential(owner, TrainedTokens(head, [7, 4999], torch.float32, owner))
    with Made() as made:
        model(torch.tensor([[7, 3, 4999]])).sum().backward()
    assert max(made.sizes) == 3 * 5000
    with Made() as made:
        model[1].weight.sum()
    assert max(made.sizes) == 64 * 5000


@pytest.mark.parametrize("training", [True, False])
def test_compile_without_a_break(training):
    model = tied()
    run, found = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for each in (run, model):
        with torch.set_grad_enabled(training):
            y = each(TOKENS)
        grad = torch.autograd.grad(y.square().sum(), model[0].rows)[0] if training else None
        found.append((y.detach(), grad))
    torch.testing.assert_close(*found)


def test_values_given_after_the_meta_device():
    """Row indices survive ``to_empty``, although no state dict contains them."""
    model = tied()
    with torch.device("meta"):
        empty = nn.Sequential(TrainedTokens(nn.Embedding(12, 6, **ALL), IDS, torch.float64))
    empty.to_empty(device="cpu").load_state_dict(nn.Sequential(model[0]).state_dict())
    assert torch.equal(empty(TOKENS), model[0](TOKENS))
    assert not [key for key in empty.state_dict() if "index" in key]


def test_rows_that_were_cast_are_restored():
    module, _, _ = case("embedding", torch.float32)
    module.rows.data = module.rows.data.bfloat16()
    with pytest.warns(UserWarning, match="is torch.float32 again"):
        module.train()
    assert module.rows.dtype == torch.float32
