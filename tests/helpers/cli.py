"""Helpers for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rasa_ext.commands.app import app
from tests.helpers import oracle
from tests.helpers.adapters import adapters, trainable_copies

TOKENS = torch.arange(24).view(2, 12) * 11 % 320


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def save_lora(base: Path, directory: Path) -> Path:
    """Save a PEFT LoRA of rank 6, with a nonzero B, for the base model in ``base``."""
    config = LoraConfig(r=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def save_official(model: nn.Module, directory: Path, rank: int = 4) -> Path:
    """Write the adapters of a model patched with k = 1 in the official code's format."""
    found = trainable_copies(adapters(model))
    targets = sorted({name.rpartition(".")[2] for name in found})
    tensors = oracle.official_tensors(found)
    options = {"rank": rank, "k": 1, "alpha": 8, "target_modules": targets}
    return oracle.write_official(directory, tensors, **options)


def invoke(*words: object, code: int = 0) -> str:
    """Run the command and return its output on one line, without the terminal's line breaks."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    if result.output.endswith("Aborted!\n"):  # printed for any EOFError, without a traceback
        raise AssertionError("the command was aborted") from result.exception
    return " ".join(result.output.split())
