"""merge, unmerge and merge_and_unload over quantized bases: dense weights and a warning."""

import copy
import re
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from peft import get_peft_model
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import rasa_ext
from rasa_ext.base_layers.quantized import format_of, stored_bytes
from rasa_ext.peft import RasaConfig
from tests.helpers import oracle
from tests.helpers.adapters import adapted_layers, adapters, patched, same_bits
from tests.helpers.quantized import FORMATS, WIDTH, linears, make_model, numbers, off, quantized
from tests.helpers.refusals import refused

DTYPES = [torch.float32, torch.bfloat16]
WARNING = re.compile(
    r"merging into a dequantized weight: relative error of a layer's output at most (\S+)\. "
    r"Layers made dense: (\d+) of (.+) in (torch\.\w+); (\S+) MiB instead of (\S+)\.$"
)


def merged(call, model, *args) -> re.Match:
    """Run a merge and return the match of its one warning."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        call(model, *args)
    said = [str(w.message) for w in caught if "merging into" in str(w.message)]
    assert len(said) == 1, said
    return WARNING.match(said[0])


def held(model) -> list[torch.Tensor]:
    """Return copies of all stored tensors, including the parts of quantized ones."""
    state = model.state_dict().values()
    parts = []
    for value in state:
        inner = getattr(type(value), "tensor_data_names", None)
        parts += [getattr(value, n).clone() for n in inner] if inner else [value.clone()]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_the_merged_weight(form, dtype):
    """The merged weight is the dequantized weight plus dW, added in float32 and rounded once."""
    base = quantized(linears(dtype=dtype), form)
    model = patched(base)
    before = held(model)
    bases = [layer.base_layer for layer in adapted_layers(model).values()]
    said = merged(rasa_ext.merge, model)
    kept = torch.float32 if form == "int8" else dtype  # dequantizing rounds to this dtype
    eps = max(torch.finfo(kept).eps, torch.finfo(dtype).eps)
    for (name, adapter), layer in zip(adapters(model).items(), bases, strict=True):
        found = model.get_submodule(name).base_layer
        assert type(found) is nn.Linear
        assert found.weight.dtype == dtype
        assert not found.weight.requires_grad
        wanted = numbers(layer) + oracle.delta(adapter)
        torch.testing.assert_close(found.weight.double(), wanted, rtol=eps, atol=2 * eps)
        torch.testing.assert_close(found.bias, layer.bias)
    assert int(said[2]) == len(bases)
    assert said[4] == str(dtype)
    rasa_ext.unmerge(model)
    assert [layer.base_layer for layer in adapted_layers(model).values()] == bases
    assert all(same_bits(a, b) for a, b in zip(held(model), before, strict=True))
    merged(rasa_ext.merge_and_unload, model)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("form", FORMATS)
def test_the_warning_tells_what_was_measured(form):
    """The warning's error also bounds the error for other inputs, within a factor of two."""
    base = quantized(linears(), form)
    model = patched(base)
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bias = 0 if base[0].bias is None else base[0].bias.double()
        exact = x.double() @ numbers(base[0]).T + bias
        kernel = off(base.eval()[0](x), exact)
        layer = model[0].eval()
        before = layer(x)
        said = merged(rasa_ext.merge, model)
        error = ((layer(x) - before).norm() / before.norm()).item()
    told = float(said[1])
    assert error < 2 * told + 1e-7
    assert told < (2 * kernel if form == "int8" else 1e-6)
    assert (told > 1e-3) == (form == "int8")  # int8's kernel rounds activations


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_can_be_asked_for(asked):
    model = patched(quantized(linears(dtype=torch.bfloat16), "nf4"))
    assert merged(rasa_ext.merge_and_unload, model, asked)[4] == str(asked)
    assert {layer.weight.dtype for layer in model} == {asked}


def test_a_merged_layer_takes_the_inputs_that_it_took_before():
    """Linear4bit accepts inputs of any dtype, so the merged layer must, too."""
    model = patched(quantized(linears(), "nf4"))
    merged(rasa_ext.merge, model, torch.bfloat16)
    assert model.eval()(torch.randn(4, WIDTH)).dtype == torch.float32


def test_the_model_s_dtype_is_that_of_what_reaches_its_layers():
    base = quantized(make_model(), "int8").bfloat16()
    model = patched(base)
    assert merged(rasa_ext.merge, model)[4] == "torch.bfloat16"


@pytest.mark.parametrize("form", FORMATS)
def test_disabling_within_a_merge(form):
    """Disabling uses the quantized base; afterwards the merge returns without another warning."""
    model = patched(quantized(linears(dtype=torch.bfloat16), form)).eval()
    x = torch.randn(4, WIDTH).bfloat16()
    base = copy.deepcopy(model)
    with torch.no_grad(), rasa_ext.disable_adapter(base):
        alone = base(x)
    merged(rasa_ext.merge, model, torch.float32)
    with torch.no_grad(), warnings.catch_warnings(action="error"):
        there = model(x)
        with rasa_ext.disable_adapter(model):
            assert torch.equal(model(x), alone)
        assert torch.equal(model(x), there)
    assert model[0].base_layer.weight.dtype == torch.float32


def test_a_merge_leaves_no_trace_on_the_quantized_layer():
    """Linear4bit takes its compute dtype from its first input; a merge must not set the dtype."""
    model = patched(quantized(linears(dtype=torch.bfloat16), "nf4"))
    merged(rasa_ext.merge, model, torch.float32)
    rasa_ext.unmerge(model)
    assert not any(layer.base_layer.compute_type_is_set for layer in model)
    assert {layer.base_layer.bias.dtype for layer in model} == {torch.bfloat16}


def test_a_mixture_of_dense_and_quantized_layers():
    base = quantized(linears(), "nf4")
    base[1] = linears()[1].requires_grad_(False)
    model = patched(base)
    weight = model[1].base_layer.weight.clone()
    assert merged(rasa_ext.merge, model)[2] == "5"
    assert type(model[1].merged_base) is torch.Tensor
    rasa_ext.unmerge(model)
    assert torch.equal(model[1].base_layer.weight, weight)
    assert format_of(model[0].base_layer) is not None


@pytest.mark.parametrize("call", [rasa_ext.merge, rasa_ext.merge_and_unload])
def test_a_result_that_is_not_finite_merges_nothing(call):
    model = patched(quantized(linears(), "nf4"))
    with torch.no_grad():
        model[5].d[0] = float("inf")
    bases = [layer.base_layer for layer in model]
    with pytest.raises(ValueError, match=r"expected finite merged weights, but '5'"):
        call(model)
    assert [layer.base_layer for layer in model] == bases
    assert not any(layer.merged for layer in model)


def test_a_weight_that_cannot_be_read_merges_nothing(monkeypatch):
    model = patched(quantized(linears(), "nf4"))
    kind = type(format_of(model[0].base_layer))

    def fails(self, base):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(kind, "dequantize", fails)
    with pytest.raises(RuntimeError, match=r"weight of '0' \(bitsandbytes nf4\) cannot.*no kernel"):
        rasa_ext.merge(model)
    assert not any(layer.merged for layer in model)


def test_dtypes_that_are_none_or_for_nothing():
    model = patched(quantized(linears(), "nf4"))
    for each, wrong in ((model, torch.int8), (model, "bfloat16"), (patched(linears()), DTYPES[0])):
        for call in (rasa_ext.merge, rasa_ext.merge_and_unload):
            refused(partial(call, each, wrong), each, "^dtype: ")


def trained_aware(model: nn.Module) -> nn.Module:
    """Round weights to 8 bits in each forward, as torchao does for quantization-aware training."""
    config = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    return model


def trained_aware_in_4_bits(model: nn.Module) -> nn.Module:
    """Round weights to 4 bits in each forward, as recipes of torchtune do."""
    config = IntxFakeQuantizeConfig(torch.int4, group_size=16)
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    return model


def before_compression(model: nn.Module) -> nn.Module:
    """Round weights to 8 bits in each forward, as llmcompressor's models do before saving."""
    scheme = preset_name_to_scheme("W8A16", ["Linear"])
    scheme.weights.group_size = 16
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}))
    for layer in model:
        layer.weight_scale.data = layer.weight.unflatten(1, (-1, 16)).abs().amax(-1) / 127
        layer.weight.data = layer.forward(torch.eye(layer.in_features)).t() - layer.bias[:, None]
    return model


class Exact(nn.Linear):
    """A layer with a forward of its own, which computes x W^T + bias."""

    def forward(self, x):
        return x @ self.weight.t() + self.bias


def exact(model: nn.Module) -> nn.Module:
    for layer in model:
        layer.__class__ = Exact
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entrance", ["core", "peft"])
@pytest.mark.parametrize(
    "rounding", [trained_aware, trained_aware_in_4_bits, before_compression, exact]
)
def test_layers_that_round_a_weight_in_each_forward(rounding, entrance, dtype):
    """They can be trained over; a merge, which would be rounded, is refused. Others are merged."""
    model = rounding(linears()).to(dtype).requires_grad_(False)
    if entrance == "core":
        model, merge = patched(model), rasa_ext.merge
    else:
        model = get_peft_model(model, RasaConfig(r=4, target_modules="all-linear"))
        merge = type(model.base_model).merge_adapter
    assert len(adapted_layers(getattr(model, "base_model", model))) == 6
    before = held(model)
    if rounding is exact:
        merge(getattr(model, "base_model", model))
        return
    with pytest.raises(ValueError, match=r"^model: .*0' \(.*Linear\)"):
        merge(getattr(model, "base_model", model))
    assert all(same_bits(a, b) for a, b in zip(held(model), before, strict=True))


def test_quanto_s_tensors(monkeypatch):
    """Its tensors are known by their base class, here torchao's."""
    base = quantized(linears(), "torchao int8")
    kind = sys.modules["torchao.utils"].TorchAOBaseTensor
    monkeypatch.setitem(sys.modules, "torchao.utils", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "optimum.quanto", SimpleNamespace(QTensor=kind))
    assert stored_bytes(base[0]) == WIDTH * 128 + 128 * 5  # a zero point of one byte
    assert merged(rasa_ext.merge, patched(base))[3] == "quanto Int8Tensor"
