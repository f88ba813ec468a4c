"""``rasa-ext demo``."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rasa_ext.commands.output import command, console

if TYPE_CHECKING:
    from rasa_ext.commands.course import DemoReport


@command
def demo(
    output: Annotated[Path, typer.Option(help="Directory for everything.")] = Path("rasa-demo"),
    short: Annotated[
        bool, typer.Option("--short", help="A few steps: checks the path, not the gain.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of problems, adapter and order.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier demo in --output first.")
    ] = False,
) -> None:
    """Teach SmolLM2-135M-Instruct word problems: train, merge, export, reload, compare."""
    from rasa_ext.commands.course import AGREEMENT, FULL, SHORT, run_demo

    _make_room(output, overwrite)
    report = run_demo(output, SHORT if short else FULL, console, seed)
    _show(report)
    if not report.agree:
        console.print(f"The three differ by more than {AGREEMENT:g}.", style="bold red")
        raise typer.Exit(1)


def _make_room(output: Path, overwrite: bool) -> None:
    if not output.exists() or not any(output.iterdir()):
        return
    # Only what looks like a demo's directory is ever deleted.
    if not (output / "test.jsonl").is_file() or not overwrite:
        raise ValueError(
            f"output: {output} is not empty; pass --overwrite if it holds an earlier demo, or "
            "choose another --output."
        )
    shutil.rmtree(output)


def _show(report: DemoReport) -> None:
    from rasa_ext.commands.memory import describe_memory

    before, bare, after, training = report.before, report.bare, report.after, report.training
    # A demo that was not interrupted has them all.
    assert before is not None
    assert bare is not None
    assert after is not None
    assert training is not None
    console.rule(align="left", title="result")
    table = Table("on held-out problems", title=f"{len(report.problems)} problems", box=None)
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    table.add_row("exact match", f"{before.accuracy:.0%}", f"{after.accuracy:.0%}")
    table.add_row("exact match, asked for just the number", f"{bare.accuracy:.0%}", "")
    losses = (f"{loss:.3f}" for loss in (training.eval_loss_before, training.eval_loss))
    table.add_row("loss per solution token", *losses)
    console.print(table)
    for i in range(min(2, len(report.problems))):
        problem = report.problems[i]
        console.print(f"\n{problem.question}  [{problem.answer}]", markup=False)
        console.print(f"  before: {_line(before.answers[i])}", markup=False)
        console.print(f"  after:  {_line(after.answers[i])}", markup=False)
    console.print(
        "\nlargest difference of any logit to the adapter: "
        f"merged model {report.merged_difference:.1e}, "
        f"LoRA of rank {report.lora_rank} in PEFT {report.lora_difference:.1e}"
    )
    console.print(
        f"{training.trainable:,} trainable parameters, {training.step} steps, "
        f"{training.tokens_per_s:,.0f} tokens/s; peak memory {describe_memory(report.peak_memory)}"
    )
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.stages.items())
    console.print(f"{sum(report.stages.values()):.0f} s: {stages}")
    console.print(f"loss picture: {report.output / 'adapter' / 'loss.png'}")
    console.print(f"adapter/, lora/, merged/, train.jsonl, test.jsonl: {report.output}")
    console.print("\nGo on with the model, or with your own data:")
    for line in _next_steps(report):
        console.print(f"  {line}", markup=False)


def _next_steps(report: DemoReport) -> list[str]:
    from rasa_ext.commands.course import INSTRUCTION

    adapter, test = (shlex.quote(str(report.output / name)) for name in ("adapter", "test.jsonl"))
    asked = (
        f"--system {shlex.quote(INSTRUCTION)} --prompt {shlex.quote(report.problems[0].question)}"
    )
    return [
        f"rasa-ext generate {adapter} smollm2 {asked}",
        f"rasa-ext evaluate {adapter} smollm2 --data {test} --limit 20",
        "rasa-ext finetune --model smollm2 --data your.jsonl --output your-adapter",
    ]


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."
