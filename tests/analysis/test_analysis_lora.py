"""Effective ranks of plain LoRA files, and the comparison of two adapters."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rasa_ext
from rasa_ext.analysis import analyze, analyze_lora
from tests.helpers.adapters import patched
from tests.helpers.models import FAMILIES, LLAMA, ids

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def write(directory, pairs: Pairs, **config):
    """Write a LoRA from pairs (B, A) by layer name."""
    directory.mkdir(exist_ok=True)
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **config}
    (directory / "adapter_config.json").write_text(json.dumps(told))
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": factor.clone().contiguous()
        for name, pair in pairs.items()
        for part, factor in zip("BA", pair, strict=True)
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def random_pair(rank: int, out: int = 10, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(out, rank), torch.randn(rank, width)


def only(directory):
    ((layer,),) = (group.layers for group in analyze_lora(directory))
    return layer


@pytest.mark.parametrize("rank", [1, 3, 7, 9])
def test_agrees_with_numpys_svd_of_the_dense_product(rank, tmp_path):
    B, A = random_pair(rank)
    found = only(write(tmp_path, {"a.0.q": (B, A)}))
    S = np.linalg.svd(8 / rank * B.double().numpy() @ A.double().numpy(), compute_uv=False)
    S = S[: min(rank, 7)]
    assert found.singular_values.tolist() == pytest.approx(S.tolist(), rel=1e-9, abs=1e-9)
    p = S / S.sum()
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert 1 <= found.effective_rank <= min(rank, 7)
    assert found.norm == pytest.approx(np.sqrt((S**2).sum()))
    assert (found.private_share, found.slots_used, len(found.pool_use)) == (1, 0, 0)


def test_equal_singular_values_have_the_rank_and_a_single_one_is_one(tmp_path):
    Q, _ = torch.linalg.qr(torch.randn(10, 5, dtype=torch.float64))
    P, _ = torch.linalg.qr(torch.randn(7, 5, dtype=torch.float64))
    B, A = random_pair(4)
    B[:, 1:] = 0
    for pair, rank in (((Q, P.t()), 5), ((B, A), 1), ((0 * B, A), 0)):
        found = only(write(tmp_path, {"a.0.q": pair}))
        assert found.effective_rank == pytest.approx(rank)


def test_no_change_by_scale(tmp_path):
    B, A = random_pair(4)
    plain = only(write(tmp_path, {"a.0.q": (B, A)}))
    for factor, config in ((1e3, {}), (1e-4, {}), (1.0, {"lora_alpha": 3, "use_rslora": True})):
        scaled = only(write(tmp_path, {"a.0.q": (factor * B, A)}, **config))
        assert scaled.effective_rank == pytest.approx(plain.effective_rank, rel=1e-6)
        alpha = 3 / 2 if config else 2
        assert scaled.norm == pytest.approx(plain.norm * factor * alpha / 2, rel=1e-6)


@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
def test_an_exported_adapter_is_what_it_was(entry, tmp_path):
    model = patched(entry.build(), 4, 1)
    rasa_ext.export_lora(model, tmp_path, allow_dropped=True)
    before, after = analyze(model), analyze_lora(tmp_path)
    assert {(g.pattern, g.shape) for g in before} == {(g.pattern, g.shape) for g in after}
    layers = {layer.name: layer for group in before for layer in group.layers}
    for layer in (layer for group in after for layer in group.layers):
        expected = layers.pop(layer.name)
        count = len(expected.singular_values)
        torch.testing.assert_close(
            layer.singular_values[:count], expected.singular_values, rtol=1e-5, atol=1e-5
        )
        assert layer.effective_rank == pytest.approx(expected.effective_rank, rel=1e-4)
    assert not layers


def test_layers_stand_in_the_models_order(tmp_path):
    pairs = {f"a.{i}.q": random_pair(2) for i in range(12)}
    pairs["a.3.v"] = random_pair(2, out=5)
    q, v = analyze_lora(write(tmp_path, pairs))
    assert [layer.name for layer in q.layers] == [f"a.{i}.q" for i in range(12)]
    assert (q.shape, v.shape, v.pattern) == ((10, 7), (5, 7), "a.*.v")


def test_what_is_no_lora(tmp_path):
    rasa_ext.save_adapter(patched(LLAMA.build()), tmp_path)
    with pytest.raises(ValueError, match="expected peft_type 'LORA'"):
        analyze_lora(tmp_path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        analyze_lora(tmp_path / "nothing")
