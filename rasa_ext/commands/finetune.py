"""``rasa-ext finetune``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

from rasa_ext.commands.options import OTHER_NAMES, RECORD, SAME, FinetuneOptions, reserved
from rasa_ext.commands.output import INTERRUPTED, command, console, working
from rasa_ext.commands.parsing import options_of


@command
@options_of(FinetuneOptions, OTHER_NAMES, SAME)
def finetune(**values: Any) -> None:
    """Fine-tune a language model; only completions, or the assistant's turns, carry a loss."""
    options = FinetuneOptions(**values)  # checks before the slow imports
    with reserved(options):
        with working("Loading PyTorch, transformers and TRL"):
            from rasa_ext.commands.results import describe
            from rasa_ext.commands.training import processes, train

        result = train(options, console)
    if result["interrupted"]:
        record = shlex.quote(str(Path(result["output"]) / RECORD))
        several = f" in {processes()} processes" if processes() > 1 else ""
        console.print(
            f"Stopped after step {result['step']} of {result['total_steps']}. "
            f"Continue{several} with:\n"
            f"  rasa-ext finetune --config {record} --resume"
        )
        raise typer.Exit(INTERRUPTED)
    console.print(f"adapter, metrics.jsonl, loss.png, summary.json: {result['output']}")
    for line in describe(result):
        console.print(line)
