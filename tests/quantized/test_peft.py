"""The PEFT plug-in over quantized bases, with PEFT's quantization backends."""

import warnings

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training

import rasa_ext
from rasa_ext.base_layers.quantized import format_of
from rasa_ext.peft import RasaConfig
from tests.helpers import oracle
from tests.helpers.adapters import adapters, gradients, randomize, same_tensors
from tests.helpers.peft import adapted, layers, named, plain
from tests.helpers.quantized import FORMATS, TOKENS, logits, make_model, numbers, off, quantized
from tests.helpers.trainers import train_by_sft

BACKENDS = {
    "nf4": "bnb 4bit",
    "nf4 nested": "bnb 4bit",
    "fp4": "bnb 4bit",
    "int8": "bnb 8bit",
    "torchao int8": "torchao",
    "torchao int4": "torchao",
}


def limit(form: str) -> float:
    """Return the error limit; it is larger for bitsandbytes' int8, which rounds activations."""
    return 0.1 if form == "int8" else 1e-5


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_as_patch_model(form):
    base = quantized(make_model(), form)
    model = adapted(base, seed=3, task_type="CAUSAL_LM")
    other = rasa_ext.patch_model(quantized(make_model(), form), 4, 1)
    randomize(other, 3)
    assert torch.equal(logits(model), logits(other))
    for each in (model, other):
        each.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert same_tensors(gradients(adapters(plain(model))), gradients(adapters(other)))


@pytest.mark.parametrize("form", FORMATS)
def test_merging_and_unmerging(form):
    model = adapted(quantized(make_model(), form))
    before, bases = logits(model), [layer.base_layer for layer in layers(model).values()]
    read = [layer.get_base_weight().double() for layer in layers(model).values()]
    torch.testing.assert_close(read, list(map(numbers, bases)), rtol=1e-6, atol=5e-7)
    with pytest.warns(UserWarning, match="merging into a dequantized weight") as caught:
        model.merge_adapter()
    assert len([w for w in caught if "merging into" in str(w.message)]) == 1
    for (name, adapter), base in zip(named(model, "default").items(), bases, strict=True):
        weight = layers(plain(model))[name].base_layer.weight
        assert weight.dtype == torch.float32
        wanted = numbers(base) + oracle.delta(adapter)
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-6, atol=1e-6)
    assert model.get_model_status().quantization_backend is None
    assert off(logits(model), before) < limit(form)
    model.unmerge_adapter()
    assert [layer.base_layer for layer in layers(model).values()] == bases
    assert model.get_model_status().quantization_backend == BACKENDS[form]
    assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="merging into a dequantized weight"):
        merged = model.merge_and_unload(safe_merge=True)
    assert not any(format_of(module) is not None for module in merged.modules())
    assert off(logits(merged), before) < limit(form)


def test_two_adapters_in_one_dense_weight():
    model = adapted(quantized(make_model(), "nf4"))
    model.add_adapter("other", RasaConfig(r=2, rasa_k=1))
    model.set_adapter("other")
    randomize(plain(model), 8)
    model.base_model.set_adapter(["default", "other"])
    before = logits(model)
    bases = [layer.base_layer for layer in layers(model).values()]
    with warnings.catch_warnings(action="ignore"):
        model.base_model.merge_adapter(["default"])
        model.base_model.merge_adapter(["other"])
    assert off(logits(model), before) < 1e-5
    model.unmerge_adapter()
    assert [layer.base_layer for layer in layers(model).values()] == bases
    assert torch.equal(logits(model), before)


def test_prepared_for_kbit_training(tmp_path):
    """Training works after PEFT's usual preparation (float32 norms, checkpointing, input grads)."""
    base = quantized(make_model().bfloat16(), "nf4")
    base.is_loaded_in_4bit = True
    config = RasaConfig(r=4, task_type="CAUSAL_LM")
    model = train_by_sft(get_peft_model(prepare_model_for_kbit_training(base), config), tmp_path)
    with pytest.warns(UserWarning, match="in torch.float32"):
        merged = model.merge_and_unload()
    assert merged.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_peft_cannot_quantize_again_what_it_did_not_see_quantized():
    model = adapted(quantized(make_model(), "torchao int8"))
    layer = next(iter(layers(model).values()))
    weight = numbers(layer.base_layer).float()
    with pytest.raises(NotImplementedError, match="torchao: a changed weight can be quantized"):
        layer.quantization_backend.set_base_weight(layer, weight)
