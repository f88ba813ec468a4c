"""``rasa-ext finetune``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rasa_ext.commands.config_file import options_of
from rasa_ext.commands.options import RECORD, FinetuneOptions
from rasa_ext.commands.output import INTERRUPTED, command, console

if TYPE_CHECKING:
    from rasa_ext.commands.outcome import FinetuneResult


@command
@options_of(FinetuneOptions)
def finetune(**values: Any) -> None:
    """Fine-tune a language model; only completions, or the assistant's turns, carry a loss."""
    options = FinetuneOptions(**values)  # checked before the libraries are imported
    from rasa_ext.commands.run import finetune as run

    _report(run(options, console))


def _report(result: FinetuneResult) -> None:
    from rasa_ext.commands.memory import describe_memory

    if result.interrupted:
        record = shlex.quote(str(Path(result.output) / RECORD))
        console.print(
            f"Stopped after step {result.step} of {result.total_steps}; "
            f"the checkpoint is {result.checkpoint}. Go on with:\n"
            f"  rasa-ext finetune --config {record} --resume"
        )
        raise typer.Exit(INTERRUPTED)
    if result.tokens_per_s is not None:
        console.print(
            f"{result.seconds:.0f} s in {result.step} steps, {result.tokens_per_s:,.0f} tokens/s, "
            f"peak memory {describe_memory(result.peak_memory)}"
        )
    console.print(f"adapter, metrics.jsonl, loss.png, summary.json: {result.output}")
    console.print(describe_losses(result))


def describe_losses(result: FinetuneResult) -> str:
    """Training loss over the first and the last tenth of the steps, and the held-out loss."""
    parts = []
    if result.first_loss is not None:
        parts.append(
            f"training loss {result.first_loss:.4f} -> {result.last_loss:.4f} "
            "(first and last tenth of the steps)"
        )
    if result.eval_loss is not None:
        parts.append(f"held-out loss {result.eval_loss_before:.4f} -> {result.eval_loss:.4f}")
    return ", ".join(parts)
