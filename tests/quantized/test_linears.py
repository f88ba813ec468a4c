"""patch_model over quantized bases: forward, backward, files. See test_merge.py for merging."""

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from torch import nn

import rasa_ext
from rasa_ext.peft import RasaConfig
from tests.helpers import oracle
from tests.helpers.adapters import (
    RANK,
    Errors,
    adapters,
    clear_gradients,
    excesses,
    gradients,
    patched,
    same_bits,
)
from tests.helpers.quantized import (
    FORMATS,
    OUT,
    TOKENS,
    WIDTH,
    dense,
    layer_errors,
    linears,
    make_model,
    numbers,
    quantized,
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_forward_and_backward(form, dtype):
    """Output is base(x) + x dW^T and x's gradient G W + H Ap, with W the dequantized weight."""
    model = quantized(linears(dtype=dtype), form)
    base, layer = model[2], patched(model)[2]
    ours, theirs = layer_errors(base, layer, dtype)
    bad, _ = excesses(ours, theirs, 1e-6 if dtype == torch.float32 else 0.0)
    assert not bad
    assert all(error < 0.05 for error in theirs.relative().values())


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Run a training step and return the adapters' gradients."""
    found = adapters(model)
    clear_gradients(found)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return gradients(found)


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_and_its_gradients(form):
    """A model matches one over dense weights, and itself with gradient checkpointing."""
    base = quantized(make_model(), form)
    model, reference = patched(base, seed=4), patched(dense(base).float(), seed=4)
    limit = 0.05 if form == "int8" else 2e-4  # bitsandbytes' int8 also rounds activations
    expected, errors = step(model), Errors(by_kind=True)
    errors.add(expected, step(reference))
    assert max(errors.relative().values()) < limit, errors.relative()
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found, errors = step(model), Errors()
        errors.add(found, expected)
        # Re-entrant checkpointing first runs a forward without grad, in another kernel with other
        # last bits (relative difference at most 3.8e-6, as over a dense float32 base).
        assert max(errors.relative().values()) < 2e-5
        assert reentrant or all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("form", FORMATS)
def test_an_evaluation_before_training_takes_no_gradient_away(form):
    """Some layers rearrange their weight in an eval forward without grad."""
    base = quantized(linears(), form)
    x = torch.randn(8, WIDTH)
    model = patched(base)

    def gradient() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        model.train()(leaf).sum().backward()
        return leaf.grad

    first = gradient()
    with torch.no_grad():
        model.eval()(x)
    assert torch.equal(gradient(), first)
    pairs = zip(base, adapters(model).values(), strict=True)
    oracles = [numbers(each) + oracle.delta(adapter) for each, adapter in pairs]
    expected = torch.ones(8, WIDTH).double()
    for weight in reversed(oracles):
        expected = expected @ weight
    assert (first - expected).norm() < (0.05 if form == "int8" else 1e-4) * expected.norm()


@pytest.mark.parametrize("target", ["0", "1"])
def test_no_4_bit_layer_rearranges_its_weight_while_patched(target):
    """This includes layers without an adapter, since gradients pass through them."""
    base = quantized(linears(1), "nf4")
    layers, bits = list(base), [layer.weight.data.clone() for layer in base]
    for layer in base:
        layer.support_avx512bf16_for_cpu = True
    model = rasa_ext.patch_model(base, RANK, None, target_modules=[target])
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
    with torch.no_grad():
        model.eval()(torch.randn(8, WIDTH))
    rasa_ext.unpatch(model)
    assert list(model) == layers
    assert all(layer.support_avx512bf16_for_cpu for layer in model)
    assert all(same_bits(each.weight.data, was) for each, was in zip(model, bits, strict=True))


def test_rows_that_are_no_whole_blocks():
    """Such rows are refused, because bitsandbytes' AVX-512 kernels compute them wrong."""
    layer = FORMATS["nf4"](nn.Linear(WIDTH // 2, OUT))
    found = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert (found - numbers(layer)).norm() > 1e-3 * found.norm()
    with pytest.raises(ValueError, match=r"target_modules: '0' .*32 inputs.* block size 64"):
        rasa_ext.patch_model(nn.Sequential(layer), RANK, 1)
    rasa_ext.patch_model(nn.Sequential(FORMATS["int8"](nn.Linear(WIDTH // 2, OUT))), RANK, 1)


ENTRANCES = {
    "core": lambda model: rasa_ext.patch_model(model, RANK, None, target_modules=["0"]),
    "peft": lambda model: get_peft_model(model, RasaConfig(r=RANK, target_modules=["0"])),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_layer_that_is_not_quantized_yet(kind, entrance):
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    model = nn.Sequential(getattr(bitsandbytes.nn, kind)(WIDTH, OUT, **options))
    with pytest.raises(ValueError, match=r"target_modules: '0' .*call model.to\(device\)"):
        ENTRANCES[entrance](model)
    assert type(model[0]).__name__ == kind
    ENTRANCES[entrance](model.to("cpu"))


def test_float_weights_under_int8_are_adapted_too():
    """bitsandbytes' layer for int8 training stores float weights and quantizes per forward."""
    made = bitsandbytes.nn.Linear8bitLt(WIDTH, OUT)
    weight = made.weight.detach().clone()
    model = patched(nn.Sequential(made.to("cpu")))
    adapter = adapters(model)["0"]
    with pytest.warns(UserWarning, match="merging into a dequantized weight"):
        merged = rasa_ext.merge_and_unload(model)[0].weight
    torch.testing.assert_close(
        merged.double(), weight.double() + oracle.delta(adapter), rtol=1e-5, atol=1e-6
    )
