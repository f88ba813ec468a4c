"""Merging without a copy of the base: unmerging subtracts dW and still restores every bit."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import rasa_ext
from rasa_ext.patching.subtraction import MergeResidual, residual_of
from tests.helpers.adapters import patched, same_bits
from tests.helpers.models import GPT2, SEQUENTIAL
from tests.helpers.peft import adapted, close, dense, layers, logits, tiny, trained, two
from tests.helpers.peft_experts import tuned
from tests.helpers.peft_sides import needs_experts
from tests.helpers.quantized import make_model as quantizable
from tests.helpers.quantized import quantized
from tests.helpers.tiny_lm import make_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CASES = [(SEQUENTIAL, dtype) for dtype in DTYPES] + [(GPT2, torch.bfloat16)]
IDS = [f"{entry.name}-{dtype}" for entry, dtype in CASES]


def small(model, size: float) -> None:
    """Draw trainable parameters so that dW is about ``size``."""
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.normal_().mul_(size if parameter.dim() == 1 else 0.3)


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def same(left, right) -> bool:
    return all(same_bits(left[name], right[name]) for name in right)


def merge(model, subtract: bool = True) -> float | None:
    """Merge a PEFT model or a patched one."""
    if not isinstance(model, PeftModel):
        return rasa_ext.merge(model, subtract=subtract)
    model.unmerge_by_subtracting(subtract)
    return model.merge_adapter()


def unmerge(model) -> None:
    if isinstance(model, PeftModel):
        model.unmerge_adapter()
    else:
        rasa_ext.unmerge(model)


@pytest.mark.parametrize("side", ["peft", "patched"])
@pytest.mark.parametrize(("entry", "dtype"), CASES, ids=IDS)
def test_cycles_give_every_bit_back(entry, dtype, side):
    """A hundred different merges cause no drift; merged weights are the same as with a copy."""
    base = entry.build().to(dtype)
    model = adapted(base) if side == "peft" else patched(base)
    before = weights(model)
    for cycle in range(100):
        small(model, 10.0 ** -(cycle % 5))
        if cycle == 0:
            merge(model, subtract=False)
            expected = weights(model)
            unmerge(model)
        largest = merge(model)
        if cycle == 0:
            assert same(weights(model), expected)
        if side == "patched":
            assert largest == rasa_ext.merge(model)  # merged already
            with rasa_ext.disable_adapter(model):
                assert cycle > 3 or same(weights(model), before)
        unmerge(model)
    assert same(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_small_where_the_change_is(dtype, figure):
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(512, 512, generator=generator)).to(dtype)
    shares = []
    for size in (1e-5, 1e-4, 1e-3, 1.0):
        delta = size * torch.randn(512, 512, generator=generator)
        merged = (weight.float() + delta).to(dtype)
        found = residual_of(weight, merged, delta)
        again = found if isinstance(found, torch.Tensor) else found.original(merged, delta)
        assert same_bits(again, weight)
        held = [found] if isinstance(found, torch.Tensor) else [found.index, found.value]
        shares.append(sum(tensor.nbytes for tensor in held) / weight.nbytes)
    figure(f"kept, of a copy's bytes, for dW of 1e-5 to 1 beside W of 0.02, {dtype}: {shares}")
    assert shares == sorted(shares)
    assert shares[1] < 0.05
    assert shares[2] < 0.3
    assert shares[-1] == 1  # stored as a copy, which is smaller


def test_signs_of_zeros_and_values_that_are_no_numbers_come_back():
    weight = torch.tensor([[0.0, -0.0, float("inf"), float("nan"), 1.0, 2.0]] * 4)
    delta = torch.full_like(weight, 0.5)
    found = residual_of(weight, weight + delta, delta)
    assert isinstance(found, MergeResidual)
    assert same_bits(found.original(weight + delta, delta), weight)


def test_several_adapters_one_after_the_other():
    model = two()
    before = weights(model)
    model.unmerge_by_subtracting()
    model.base_model.merge_adapter(["default"])
    model.unmerge_by_subtracting(False)  # merged layers keep subtracting
    model.base_model.merge_adapter(["second"])
    close(logits(model), dense(model, "default", "second"))
    model.unmerge_adapter()
    assert same(weights(model), before)


@pytest.mark.parametrize("side", ["peft", "patched", pytest.param("experts", marks=needs_experts)])
@pytest.mark.parametrize("bytes_", [1, 1 << 20])
def test_an_adapter_that_changed_meanwhile(side, bytes_, monkeypatch):
    """If the adapter has changed, no layer is unmerged, for any chunk size."""
    monkeypatch.setattr("rasa_ext.patching.parts.CHUNK_BYTES", bytes_)
    makers = {"patched": lambda: patched(make_model()), "peft": tiny, "experts": tuned}
    model = makers[side]()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.mul_(0.1)  # so that few entries are stored
    before = weights(model)
    merge(model)
    merged = weights(model)
    changed = [*trained(model).values()]
    if side == "patched":  # only the last chunk
        changed = changed[-1:]
    numbers = [parameter.detach().clone() for parameter in changed]
    with torch.no_grad():
        for parameter in changed:
            parameter.add_(1e-3)
    with pytest.raises(RuntimeError, match="does not restore the weight from before the"):
        unmerge(model)
    assert same(weights(model), merged)
    with torch.no_grad():
        for parameter, number in zip(changed, numbers, strict=True):
            parameter.copy_(number)
    unmerge(model)
    assert same(weights(model), before)


def test_a_quantized_base_needs_no_copy():
    model = adapted(quantized(quantizable(), "nf4"))
    bases = [layer.base_layer for layer in layers(model).values()]
    model.unmerge_by_subtracting()
    with pytest.warns(UserWarning, match="merging into a dequantized weight"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert [layer.base_layer for layer in layers(model).values()] == bases
