"""The memory computed in docs/memory.md: the tables and the counts behind them."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rasa_ext
from benchmarks import memory
from benchmarks.shapes import decoder
from tests.helpers.memory import LiveBytes, saved_storages

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
TOKENS = torch.arange(128).view(2, 64)


def llama(shape: memory.Model, **options) -> LlamaForCausalLM:
    linears = {each.name: each for each in shape.block.linears}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} | options
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=linears["gate_proj"].out_features,
            num_hidden_layers=shape.block.layers,
            tie_word_embeddings=shape.tied,
            dtype="bfloat16",
            **heads,
        )
    )


@pytest.mark.parametrize("table", [memory.parts, memory.sums])
def test_the_page_has_the_tables(table):
    assert table(tokens=2048, rank=8, k=1) in PAGE.read_text()


@pytest.mark.parametrize(("name", "heads"), [("Llama-3.2-1B", (32, 8)), ("Llama-3.1-8B", (32, 8))])
def test_weights_and_trained_parameters_are_those_of_the_model(name, heads):
    shape = memory.MODELS[name]
    names = ("num_attention_heads", "num_key_value_heads")
    with torch.device("meta"):
        model = llama(shape, **dict(zip(names, heads, strict=True)))
    assert sum(shape.weights()) == sum(p.numel() for p in model.parameters())
    rasa_ext.patch_model(model, rank=8, k=1)
    assert shape.trained(8, 1) == sum(p.numel() for p in rasa_ext.adapter_parameters(model))


def test_what_blocks_save_is_what_autograd_saves(figure, monkeypatch):
    monkeypatch.setattr(memory, "GPU_PADDING", 1)  # CPU tensors are not padded
    small = memory.Model(decoder("small", 4, 64, 32, 160), vocabulary=320, tied=False)
    model = llama(small).to(torch.bfloat16).train()
    rasa_ext.patch_model(model, rank=8, k=1)
    base = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with saved_storages() as saved:
        model.model(input_ids=TOKENS, use_cache=False)
    found = sum(size for address, size in saved.items() if address not in base)
    packs = small.packs(8, 1) // 3  # without the packs' gradients
    computed = small.activations(TOKENS.numel(), 8, 1, checkpointing=False) + packs
    figure(f"bytes saved for the backward over those computed: {found / computed:.3f}")
    assert computed < found < 1.02 * computed  # plus a scale per norm, row and head


def test_the_logits_are_the_peak_of_the_loss():
    shape = memory.Model(decoder("head", 1, 32, 16, 32), vocabulary=50_000, tied=False)
    model = llama(shape).to(torch.bfloat16).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    with LiveBytes() as live:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert live.peak == pytest.approx(shape.logits(TOKENS.numel()), rel=0.01)
