"""trainable_token_indices of patch_model, compared with training a whole table."""

import copy

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext.methods import AdapterConfig, LoraConfig
from tests.helpers.adapters import same_bits
from tests.helpers.models import BERT, GEMMA, GPT2, LLAMA, T5, TIED, Checkpointed, ids
from tests.helpers.outside import VeraConfig
from tests.helpers.refusals import Snapshot, refused
from tests.helpers.trained_tokens import IDS, TABLES, with_moved_rows

pytestmark = pytest.mark.filterwarnings("ignore:groups")
EVERY = [LLAMA, GPT2, T5, BERT, TIED]


def with_rows(entry, given=IDS, **options):
    model = entry.build()
    return rasa_ext.patch_model(model, 4, 1, trainable_token_indices=given, **options)


@pytest.mark.parametrize("entry", EVERY, ids=ids)
def test_rows_get_the_gradients_of_a_table(entry):
    inputs = entry.inputs(0)
    model = with_rows(entry, adapter_dtype=torch.float64).double()
    rows = rasa_ext.adapter_parameters(model)[-1]  # others stay at B = 0, without effect
    dense = entry.build().double().requires_grad_(False)
    table = dense.get_submodule(TABLES[entry.name][0]).weight.requires_grad_(True)
    with torch.no_grad():
        rows.add_(0.5)
        table[IDS] = rows
    found, expected = (entry.call(each, **inputs) for each in (model, dense))
    torch.testing.assert_close(found, expected)
    for logits in (found, expected):
        logits.log_softmax(-1).sin().sum().backward()
    assert rows.grad.any()
    torch.testing.assert_close(rows.grad, table.grad[IDS], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("entry", EVERY, ids=ids)
def test_what_is_trained_and_told(entry):
    model = with_rows(entry)
    found = rasa_ext.summary(model)
    names = TABLES[entry.name]
    assert found.tokens == {", ".join(names): tuple(IDS)}
    assert f"trained rows: 3 of {', '.join(names)}" in str(found)
    rows = model.get_submodule(names[0]).rows
    assert rasa_ext.adapter_parameters(model)[-1] is rows
    assert found.adapter == found.trainable == sum(r.trainable for r in found) + rows.numel()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if n.endswith("rows")} == {f"{names[0]}.rows"}
    assert not [name for name in trained if name.endswith("weight")]


@pytest.mark.parametrize("entry", EVERY, ids=ids)
def test_merge_and_back(entry):
    model, inputs = with_moved_rows(entry), entry.inputs(0)
    before = Snapshot(model)
    y = entry.call(model, **inputs)
    rows = model.get_submodule(TABLES[entry.name][0]).rows
    rasa_ext.merge(model)
    tables = [model.get_submodule(name).weight for name in TABLES[entry.name]]
    assert all(torch.equal(table[IDS], rows) for table in tables)
    torch.testing.assert_close(entry.call(model, **inputs), y, rtol=1e-3, atol=1e-3)
    rasa_ext.unmerge(model)
    before.assert_unchanged()
    plain = rasa_ext.merge_and_unload(model)
    assert type(plain.get_submodule(TABLES[entry.name][0])) is nn.Embedding
    torch.testing.assert_close(entry.call(plain, **inputs), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("entry", EVERY, ids=ids)
def test_off(entry):
    base, model, inputs = entry.build().eval(), with_moved_rows(entry), entry.inputs(0)
    with rasa_ext.disable_adapter(model):
        torch.testing.assert_close(entry.call(model, **inputs), entry.call(base, **inputs))
    assert not torch.allclose(entry.call(model, **inputs), entry.call(base, **inputs), atol=0.01)
    rasa_ext.unpatch(model)
    assert [*model.state_dict()] == [*base.state_dict()]
    assert all(same_bits(tensor, base.state_dict()[k]) for k, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_no_merge_of_what_is_not_finite():
    model = with_moved_rows(TIED)
    with torch.no_grad():
        model.embed.rows[1, 2] = torch.inf
    refused(lambda: rasa_ext.merge(model), model, "'embed' hold values that are not finite")


NAMED = [
    ({"embed_tokens": [4]}, {"model.embed_tokens": (4,)}),
    ({"lm_head": {7, 4}}, {"lm_head": (4, 7)}),
    ({"embed_tokens": (4,), "lm_head": [1, 2]}, {"model.embed_tokens": (4,), "lm_head": (1, 2)}),
]


@pytest.mark.parametrize(("given", "tokens"), NAMED)
def test_tables_by_name(given, tokens):
    model = with_rows(LLAMA, given)
    assert rasa_ext.summary(model).tokens == tokens


def test_a_tied_head_may_be_named_as_well():
    found = rasa_ext.summary(with_rows(GPT2, {"lm_head": [3], "wte": [3]})).tokens
    assert found == {"transformer.wte, lm_head": (3,)}


def test_resized_embeddings():
    """Rows of new tokens, beyond the old end of the table, can be trained."""
    model = LLAMA.build()
    model.resize_token_embeddings(34)
    rasa_ext.patch_model(model, 4, trainable_token_indices={"embed_tokens": [32, 33]})
    assert model.model.embed_tokens.rows.shape == (2, 24)
    logits = model(torch.tensor([[1, 33]])).logits
    logits.sum().backward()
    gradient = model.model.embed_tokens.rows.grad
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = with_moved_rows(GPT2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        GPT2.loss(model, GPT2.inputs(0))[1].backward()
        gradients.append(model.transformer.wte.rows.grad)
    torch.testing.assert_close(*gradients)
    own = rasa_ext.patch_model(Checkpointed(use_reentrant), 2, 1, trainable_token_indices=[3])
    own.train()(torch.tensor([[3, 1]])).sum().backward()
    assert own.embed.rows.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embeddings(dtype):
    model = with_moved_rows(GEMMA, [*IDS, 0], dtype)
    assert model.model.embed_tokens.rows.dtype == torch.float32
    inputs = GEMMA.inputs(0)
    embedded, y = model.model.embed_tokens(inputs["input_ids"]), GEMMA.call(model, **inputs)
    plain = rasa_ext.merge_and_unload(model)
    assert same_bits(embedded.detach(), plain.model.embed_tokens(inputs["input_ids"]).detach())
    if dtype == torch.float32:
        torch.testing.assert_close(y, GEMMA.call(plain, **inputs), rtol=1e-4, atol=1e-4)


class Normed(nn.Embedding):
    def forward(self, x):
        return nn.functional.normalize(super().forward(x), dim=-1)


ROWS = "trainable_token_indices"
GIVEN = ["3", 3, [True], [1.0], [3, -1], [0, 1, 0], {"embed": []}, [32], {"wte": [1]}]
BAD = [{ROWS: given} for given in (*GIVEN, {"embed": [1], "readout": [2]})]
BAD += [{ROWS: [1], "modules_to_save": [table]} for table in ("embed", "readout")]
BAD += [{ROWS: [1], "target_modules": ["body", "readout"]}]


UNFIT = [
    nn.Embedding(32, 12, max_norm=1.0),
    nn.Embedding(32, 12, scale_grad_by_freq=True),
    Normed(32, 12),
]


def refused_rows(model, **options):
    refused(lambda: rasa_ext.patch_model(model, 2, 1, **options), model, f"^{ROWS}")


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_input_and_tables_that_are_trained_already(options):
    refused_rows(TIED.build(), **options)


@pytest.mark.parametrize("embedding", UNFIT, ids=str)
def test_embeddings_whose_rows_cannot_be_trained(embedding):
    model = TIED.build()
    model.embed = embedding
    refused_rows(model, **{ROWS: {"embed": [1]}})


def test_a_model_that_names_no_embedding():
    refused_rows(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), **{ROWS: [1]})


@pytest.fixture(params=[LoraConfig, VeraConfig])
def method(request) -> type[AdapterConfig]:
    return request.param


def test_every_method_takes_it(method):
    config = method(rank=2, trainable_token_indices=IDS)
    model = rasa_ext.patch_model(copy.deepcopy(TIED.build()), config=config)
    assert model.embed.rows.requires_grad
    assert type(config).from_dict(config.to_dict()) == config
    assert config.to_dict()["trainable_token_indices"] == IDS
