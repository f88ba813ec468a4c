"""Helpers for the tests of the command line."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rasa_ext.commands.app import app
from tests.helpers import oracle, peft
from tests.helpers.adapters import adapters, trainable_copies

TOKENS = torch.arange(24).view(2, 12) * 11 % 320


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def save_lora(base: Path, directory: Path) -> Path:
    """Save a PEFT LoRA of rank 6, with a nonzero B, for the base model in ``base``."""
    targets = ["q_proj", "down_proj"]
    peft.save_lora(load(base), directory, r=6, target_modules=targets, task_type="CAUSAL_LM")
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
