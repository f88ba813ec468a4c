"""What the tests of the command share."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rasa_ext.commands.app import app

TOKENS = torch.arange(24).view(2, 12) * 11 % 320


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def invoke(*words: object, code: int = 0) -> str:
    """Run the command; its whole output on one line, since a terminal wraps where it likes."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    if result.output.endswith("Aborted!\n"):  # an EOFError from anywhere, of which it says no more
        raise AssertionError("the command was aborted") from result.exception
    return " ".join(result.output.split())
