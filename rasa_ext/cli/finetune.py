"""``rasa-ext finetune``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from rasa_ext.cli.config_file import use_config_file
from rasa_ext.cli.output import INTERRUPTED, command, console


@command
def finetune(
    model: Annotated[str, typer.Option(help="Hub id, local directory, or .gguf file.")],
    data: Annotated[
        str,
        typer.Option(
            help="JSONL file with prompt and completion, or messages, a line; or a hub data set."
        ),
    ],
    output: Annotated[str, typer.Option(help="Directory for the adapter.")] = "rasa-out",
    rank: Annotated[int, typer.Option(help="LoRA rank r per layer.")] = 8,
    k: Annotated[
        int | None,
        typer.Option(
            help="How many of them go to the shared pool. [default: rank // 8, at least 1]"
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Size of the initial diagonal; the paper has 8 and 32.")
    ] = 8.0,
    dropout: Annotated[float, typer.Option(help="On the adapter's input, in [0, 1).")] = 0.0,
    target_modules: Annotated[
        str,
        typer.Option(
            help="all-linear, name suffixes with commas, or regex: and a regular expression."
        ),
    ] = "all-linear",
    lr: Annotated[
        float, typer.Option(help="Peak learning rate; RaSA likes it higher than LoRA does.")
    ] = 5e-4,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; overrides --epochs.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Examples per device and forward pass.")] = 8,
    grad_accum: Annotated[int, typer.Option(help="Forward passes per optimizer step.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens after which an example is cut.")] = 1024,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the frozen base: float32, bfloat16, float16 (GPU), or auto, as it is stored."
        ),
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations in the backward: less memory, more time.")
    ] = False,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out data, in the form of --data.")
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations. [default: before and after training]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapter's start, the order and dropout.")] = 0,
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint in --output.")
    ] = False,
    report_to: Annotated[
        str, typer.Option(help="none, or trackers of transformers, such as tensorboard,wandb.")
    ] = "none",
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=use_config_file,
            help="YAML file with any of these options; the command line overrides it.",
        ),
    ] = None,
) -> None:
    """Fine-tune a language model; only completions, or the assistant's turns, carry a loss."""
    from rasa_ext.train.finetune import finetune as run
    from rasa_ext.train.memory import describe_memory
    from rasa_ext.train.options import RECORD, FinetuneOptions

    options = FinetuneOptions(
        model=model,
        data=data,
        output=output,
        rank=rank,
        k=k,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        lr=lr,
        max_steps=max_steps,
        epochs=epochs,
        batch_size=batch_size,
        grad_accum=grad_accum,
        seq_len=seq_len,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        eval_data=eval_data,
        eval_every=eval_every,
        seed=seed,
        resume=resume,
        report_to=report_to,
    )
    result = run(options, console)
    record = shlex.quote(str(Path(output) / RECORD))
    if result.interrupted:
        console.print(
            f"Stopped after step {result.step} of {result.total_steps}; "
            f"the checkpoint is {result.checkpoint}. Go on with:\n"
            f"  rasa-ext finetune --config {record} --resume"
        )
        raise typer.Exit(INTERRUPTED)
    if result.first_loss is not None:
        console.print(f"loss {result.first_loss:.4f} -> {result.last_loss:.4f}")
    if result.eval_loss is not None:
        console.print(f"held-out loss {result.eval_loss:.4f}")
    if result.tokens_per_s is not None:
        console.print(
            f"{result.seconds:.0f} s in {result.step} steps, {result.tokens_per_s:,.0f} tokens/s"
        )
    console.print(f"peak memory {describe_memory(result.peak_memory)}")
    console.print(f"adapter, metrics.jsonl, loss.png, summary.json: {output}")
