"""The command import-lora: adapters that load and compute what PEFT does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rasa_ext
from tests.helpers.cli import invoke, load, logits, save_lora
from tests.helpers.tiny_lm import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("import") / "base")


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory) -> Path:
    return save_lora(base, tmp_path_factory.mktemp("import") / "lora")


def test_import_lora(base, lora, tmp_path):
    text = invoke("import-lora", lora, "--output", tmp_path)
    model = rasa_ext.load_adapter(load(base), tmp_path).eval()
    assert f"of k = 0 and rank 6, for 4 layers in {tmp_path}" in text
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(load(base), lora).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_import_lora_for_another_base(lora, tmp_path):
    other = save_base(tmp_path / "other", head_dim=16)
    text = invoke("import-lora", lora, "--model", other, "--output", tmp_path / "o", code=1)
    assert "of the layer's (out, in) (64, 32), got (32, 32)" in text
    assert not (tmp_path / "o").exists()


def test_nothing_is_written_over_what_is_read(base, lora):
    for read in (base, lora):
        text = invoke("import-lora", lora, "-o", read, "--overwrite", code=1)
        assert "output: expected another directory" in text
