"""trainable_token_indices under PEFT: PEFT's wrappers and this package's files."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import rasa_ext
from rasa_ext.peft import RasaConfig
from rasa_ext.peft.tokens import token_layers
from tests.helpers.adapters import same_bits
from tests.helpers.models import BERT, GPT2, LLAMA, T5, ids
from tests.helpers.peft import add_noise
from tests.helpers.trained_tokens import IDS, TABLES

FAMILIES = [LLAMA, GPT2, T5, BERT]


def tuned(entry, given=IDS, dtype=torch.float32, **options):
    config = RasaConfig(r=4, rasa_k=1, trainable_token_indices=given, **options)
    model = get_peft_model(entry.build().to(dtype), config)
    add_noise(model, 4)
    return model.eval()


@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
def test_both_front_ends_read_and_compute_the_same(entry, tmp_path):
    model, inputs = tuned(entry), entry.inputs(0)
    owner = TABLES[entry.name][0]
    assert model.peft_config["default"].trainable_token_indices == {owner: IDS}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("trainable_tokens" in name for name in trained) == 1
    assert not [name for name in trained if name.endswith("weight")]
    y = entry.call(model, **inputs)
    model.save_pretrained(tmp_path / "peft")
    ours = rasa_ext.load_adapter(entry.build().eval(), tmp_path / "peft")
    torch.testing.assert_close(entry.call(ours, **inputs), y, rtol=1e-4, atol=1e-4)
    for each in (model, ours):
        entry.loss(each, inputs)[1].backward()
    (rows,) = (layer.trainable_tokens_delta["default"] for layer in token_layers(model))
    expected = rasa_ext.adapter_parameters(ours)[-1].grad
    torch.testing.assert_close(rows.grad, expected, rtol=1e-3, atol=1e-4)
    rasa_ext.save_adapter(ours, tmp_path / "core")
    for folder in ("peft", "core"):
        loaded = PeftModel.from_pretrained(entry.build(), tmp_path / folder).eval()
        torch.testing.assert_close(entry.call(loaded, **inputs), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
def test_merge_unmerge_and_unload(entry):
    model, base, inputs = tuned(entry), entry.build().eval(), entry.inputs(0)
    y, before = entry.call(model, **inputs), copy.deepcopy(model.state_dict())
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(entry.call(model, **inputs), y, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    assert all(same_bits(t, before[key]) for key, t in model.state_dict().items())
    with model.disable_adapter():
        torch.testing.assert_close(entry.call(model, **inputs), entry.call(base, **inputs))
    plain = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(entry.call(plain, **inputs), y, rtol=1e-3, atol=1e-3)
    assert {*plain.state_dict()} == {*base.state_dict()}
    assert type(plain.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("entry", [LLAMA, GPT2], ids=ids)
def test_two_adapters(entry, tmp_path):
    model, inputs = tuned(entry), entry.inputs(0)
    y = entry.call(model, **inputs)
    options = {"r": 3, "rasa_k": 1, "init_weights": False}
    model.add_adapter("two", RasaConfig(trainable_token_indices=[IDS[0], 1], **options))
    model.add_adapter("none", RasaConfig(**options))
    (layer,) = token_layers(model)
    with torch.no_grad():
        layer.trainable_tokens_delta["two"].add_(0.5)
    found = {}
    for name in ("two", "none", "default"):
        model.set_adapter(name)
        found[name] = entry.call(model, **inputs)
        model.save_pretrained(tmp_path)
    assert torch.equal(found["default"], y)
    for name, folder in (("two", "two"), ("none", "none"), ("default", "")):
        alone = PeftModel.from_pretrained(entry.build(), tmp_path / folder).eval()
        torch.testing.assert_close(entry.call(alone, **inputs), found[name], rtol=1e-4, atol=1e-4)
    names = ["two", "default", "__base__", "none", "two", "two", "default", "none"]
    mixed = model(**inputs, adapter_names=names).logits
    found["__base__"] = entry.call(entry.build().eval(), **inputs)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], found[name][row], rtol=1e-4, atol=1e-4)
    model.delete_adapter("two")
    assert torch.equal(entry.call(model, **inputs), y)


def test_rows_are_float32_over_bfloat16(tmp_path):
    model = tuned(GPT2, dtype=torch.bfloat16)
    (layer,) = token_layers(model)
    assert layer.trainable_tokens_delta["default"].dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(GPT2.build().bfloat16(), tmp_path, is_trainable=True)
    (other,) = token_layers(loaded)
    rows = other.trainable_tokens_delta["default"]
    assert rows.requires_grad
    assert same_bits(rows.detach(), layer.trainable_tokens_delta["default"].detach())


def test_no_safe_merge_of_what_is_not_finite():
    model = tuned(GPT2)
    (layer,) = token_layers(model)
    with torch.no_grad():
        layer.trainable_tokens_delta["default"][0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="rows of the adapter 'default' hold values that are not"):
        model.merge_adapter(safe_merge=True)
    assert all(t.equal(before[k]) for k, t in model.state_dict().items() if "delta" not in k)


def test_a_tied_head_may_be_named():
    model = tuned(GPT2, {"lm_head": [2, 3]})
    assert model.peft_config["default"].trainable_token_indices == {"transformer.wte": [2, 3]}
