"""LoRAs in GGUF and mlx-lm format, at a chosen rank. tests/readers runs the readers."""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import rasa_ext
from tests.helpers import oracle
from tests.helpers.adapter_folders import read
from tests.helpers.adapters import RANK, adapters, content, patched
from tests.helpers.models import GPT2, LLAMA, TIED_LLAMA
from tests.helpers.trained_tokens import with_moved_rows

BASE = LLAMA.build()
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS)).eval()
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(directory):
    found = gguf.GGUFReader(directory / "adapter.gguf")
    tensors = {each.name: torch.tensor(each.data) for each in found.tensors}
    return {name: field.contents() for name, field in found.fields.items()}, tensors


def as_halves(delta, heads):
    """Permute rows of q and k from Meta's order to transformers', as its Llama conversion does."""
    out, width = delta.shape
    return delta.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


@pytest.mark.parametrize("base", [BASE, QWEN], ids=["llama", "qwen2"])
def test_gguf_holds_the_adapter_in_llama_cpp_s_order(base, tmp_path):
    model, config = patched(base), base.config
    rank = rasa_ext.export_lora(model, tmp_path, format="gguf")
    told, tensors = read_gguf(tmp_path)
    assert told["general.type"] == "adapter"
    assert told["adapter.type"] == "lora"
    assert told["general.architecture"] == config.model_type
    assert told["adapter.lora.alpha"] == rank
    expected = adapters(model)
    assert len(tensors) == 2 * len(expected) == 14 * config.num_hidden_layers
    for name in {name.rpartition(".")[0] for name in tensors}:
        block, index, part = name.removesuffix(".weight").split(".")
        assert block == "blk"
        delta = tensors[f"{name}.lora_b"].double() @ tensors[f"{name}.lora_a"].double()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if config.model_type == "llama" and part in heads:
            delta = as_halves(delta, heads[part])
        its = expected[f"model.layers.{index}.{PARTS[part]}"]
        torch.testing.assert_close(delta, oracle.delta(its), rtol=1e-5, atol=1e-6)


def test_mlx_holds_the_transposed_factors(tmp_path):
    model = patched(BASE, exclude_modules=["layers.1.mlp.down_proj"])
    rank = rasa_ext.export_lora(model, tmp_path, format="mlx")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    keys = config["lora_parameters"].pop("keys")
    assert config["lora_parameters"] == {"rank": rank, "scale": 1.0, "dropout": 0.0}
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == -1
    assert sorted(keys) == sorted(PARTS.values())
    tensors, expected = load_file(tmp_path / "adapters.safetensors"), adapters(model)
    assert len(tensors) == 2 * len(expected)
    for name, adapter in expected.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape[1] == b.shape[0] == rank
        change = (a.double() @ b.double()).t()
        torch.testing.assert_close(change, oracle.delta(adapter), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_a_folder_that_is_there_keeps_its_files(form, tmp_path):
    """Above all, a base model's weights are not overwritten."""
    (tmp_path / "model.safetensors").write_text("weights")
    rasa_ext.export_lora(patched(BASE), tmp_path, format=form)
    first = content(tmp_path)
    rasa_ext.export_lora(patched(BASE, RANK + 1), tmp_path, format=form)
    second = content(tmp_path)
    assert first["model.safetensors"] == second["model.safetensors"] == b"weights"
    assert first.keys() == second.keys()
    assert first != second


PLAIN = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
REFUSED = {
    "Conv1D": (lambda: patched(GPT2.build()), "model types llama, .*got 'gpt2'"),
    "no model of transformers": (lambda: patched(PLAIN), "got None"),
    "rows": (lambda: with_moved_rows(LLAMA), "trainable_token_indices"),
    "norms": (lambda: patched(BASE, modules_to_save=["norm"]), "model.norm.weight"),
    "tied head": (
        lambda: patched(TIED_LLAMA.build(), target_modules=["q_proj", "lm_head"]),
        "lm_head is tied to the embedding",
    ),
}


@pytest.mark.parametrize("form", ["gguf", "mlx"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold(form, case, tmp_path):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^format: .*{message}"):
        rasa_ext.export_lora(build(), tmp_path, format=form)
    assert not [*tmp_path.iterdir()]


def test_a_layer_that_llama_cpp_has_no_name_for(tmp_path):
    """The config says Llama, but the model has a layer that no Llama has."""
    model = nn.ModuleDict({"extra": nn.Linear(8, 8)})
    model.config = BASE.config
    with pytest.raises(ValueError, match=r"format: expected layers .* but its .* none for 'extra'"):
        rasa_ext.export_lora(patched(model), tmp_path, format="gguf")
    assert not [*tmp_path.iterdir()]


def test_what_sglang_would_drop_is_written_for_others(tmp_path):
    """v without q is refused only in PEFT's format, the one that SGLang reads."""
    model = patched(BASE, target_modules=["v_proj", "o_proj"])
    rasa_ext.export_lora(model, tmp_path, format="gguf")
    assert len(read_gguf(tmp_path)[1]) == 2 * len(adapters(model))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_lower_rank_is_each_layer_s_nearest(rank, tmp_path):
    """It equals the truncated float64 SVD; A and B each take the root of a singular value."""
    model = patched(BASE, exclude_modules=["layers.1.mlp.down_proj"])
    assert rasa_ext.export_lora(model, tmp_path, rank=rank) == rank
    config, tensors = read(tmp_path)
    assert config["r"] == config["lora_alpha"] == rank
    told, lost, whole = rasa_ext.export_error(model, rank), 0.0, 0.0
    expected = adapters(model)
    assert told.layers.keys() == expected.keys()
    for name, adapter in expected.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert (A.shape[0], B.shape[1]) == (rank, rank)
        delta = oracle.delta(adapter)
        U, S, V = torch.linalg.svd(delta, full_matrices=False)
        nearest = U[:, :rank] * S[:rank] @ V[:rank]
        torch.testing.assert_close(B.double() @ A.double(), nearest, rtol=1e-4, atol=1e-5)
        if adapter.d.numel() > rank:  # smaller ranks are written unchanged
            torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
        off = (nearest - delta).square().sum().item()
        assert told.layers[name] == pytest.approx((off / S.square().sum().item()) ** 0.5, abs=1e-6)
        lost, whole = lost + off, whole + S.square().sum().item()
    assert told.error == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
    assert told.error > 0.1


def test_at_the_effective_rank_or_above_nothing_changes(tmp_path):
    model = patched(BASE)
    R = rasa_ext.export_lora(model, tmp_path / "whole")
    _, whole = read(tmp_path / "whole")
    for rank in (R, R + 3):
        assert rasa_ext.export_lora(model, tmp_path / f"{rank}", rank=rank) == rank
        for name, tensor in read(tmp_path / f"{rank}")[1].items():
            kept = tensor[:R] if ".lora_A." in name else tensor[:, :R]
            assert torch.equal(kept, whole[name])
            assert tensor.count_nonzero() == kept.count_nonzero()
        told = rasa_ext.export_error(model, rank)
        assert told.error == 0
        assert set(told.layers.values()) == {0.0}


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_every_format_has_the_chosen_rank(form, tmp_path):
    assert rasa_ext.export_lora(patched(BASE), tmp_path, rank=2, format=form) == 2
    tensors = load_file(tmp_path / "adapters.safetensors") if form == "mlx" else None
    assert {min(t.shape) for t in (tensors or read_gguf(tmp_path)[1]).values()} == {2}


BAD = [
    ({"rank": 0}, "rank: expected at least 1, got 0"),
    ({"rank": 2.0}, "rank: expected an integer, got 2.0"),
    ({"rank": True}, "rank: expected an integer, got True"),
    ({"format": "onnx"}, "format: expected 'peft' or 'gguf' or 'mlx', got 'onnx'"),
    ({"format": 3}, "format: .*got 3"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_are_none(options, message, tmp_path):
    model = patched(BASE)
    with pytest.raises((ValueError, TypeError), match=message):
        rasa_ext.export_lora(model, tmp_path, **options)
    assert not [*tmp_path.iterdir()]
    if "rank" in options:
        with pytest.raises((ValueError, TypeError), match=message):
            rasa_ext.export_error(model, **options)
