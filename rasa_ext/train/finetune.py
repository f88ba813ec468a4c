"""finetune(options): load, patch, train with transformers' Trainer, and write the results."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from rasa_ext import load_adapter, patch_model, summary
from rasa_ext.train.callbacks import (
    InterruptCallback,
    MetricsCallback,
    ProgressCallback,
    read_metrics,
)
from rasa_ext.train.data import read_examples
from rasa_ext.train.encoding import Collator, Encoded, encode_all
from rasa_ext.train.model_loading import load_model, load_tokenizer
from rasa_ext.train.options import RECORD, FinetuneOptions
from rasa_ext.train.results import FinetuneResult, write_record, write_results
from rasa_ext.train.trainer import AdapterTrainer, checkpoints_in

_WARMUP = 0.03  # of all steps
_CHECKPOINTS = 0.1  # one after every tenth of the run; they hold the adapter only
_KEPT = 2


def finetune(
    options: FinetuneOptions,
    console: Console,
    *,
    model: Any = None,
    tokenizer: Any = None,
) -> FinetuneResult:
    """Fine-tune a causal language model with RaSA and write the adapter into `options.output`.

    The directory gets the adapter (`adapter_config.json`, `adapter_model.safetensors`), the
    tokenizer, `metrics.jsonl`, `loss.png`, `summary.json`, the run's own `finetune.yaml`, and
    checkpoints. Ctrl-C ends the run after the present step with a checkpoint.

    Args:
        options: what to do.
        console: where progress is shown.
        model: a model already loaded, which is patched in place; loaded by name where None.
        tokenizer: its tokenizer.

    Raises ValueError (its message names the option or the line of data) or FileNotFoundError.
    """
    output = Path(options.output)
    checkpoint = _checkpoint_to_resume(options, output, console)
    tokenizer = load_tokenizer(options.model) if tokenizer is None else tokenizer
    train = _load_data(options.data, tokenizer, options.seq_len, console)
    held_out = None
    if options.eval_data is not None:
        held_out = _load_data(options.eval_data, tokenizer, options.seq_len, console)

    model = _load(options, console) if model is None else model
    set_seed(options.seed)
    patch_model(
        model,
        rank=options.rank,
        k=options.k,
        alpha=options.alpha,
        dropout=options.dropout,
        target_modules=options.targets(),
    )
    report = summary(model)
    console.print(
        f"{report.trainable:,} of {report.total:,} parameters are trained "
        f"({len(report)} groups, effective rank {max(row.R for row in report)})."
    )

    total = total_steps(options, len(train.rows))
    output.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        write_record(options)
    metrics = MetricsCallback(output / "metrics.jsonl")
    if checkpoint is not None and checkpoint[0] >= total:
        console.print(f"The run in {output} is complete: {checkpoint[0]} of {total} steps.")
        load_adapter(model, checkpoint[1])
        metrics.rows = read_metrics(metrics.path)
        step, interrupted = checkpoint[0], False
    else:
        step, interrupted = _train(
            model, tokenizer, train, held_out, options, total, checkpoint, metrics, console
        )
    return write_results(
        model, tokenizer, options, step, total, interrupted, metrics, report.trainable
    )


def total_steps(options: FinetuneOptions, rows: int) -> int:
    """Optimizer steps of a run over `rows` examples, counted as Trainer does."""
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(rows / (options.batch_size * int(os.environ.get("WORLD_SIZE", "1"))))
    return math.ceil(options.epochs * math.ceil(batches / options.grad_accum))


def _checkpoint_to_resume(
    options: FinetuneOptions, output: Path, console: Console
) -> tuple[int, str] | None:
    """The newest checkpoint as (step, path), or None for a new run."""
    found = checkpoints_in(output) if output.is_dir() else []
    if not options.resume:
        if found:
            raise ValueError(
                f"output: {output} holds checkpoints of an earlier run; pass --resume to continue "
                "it, choose another --output, or delete it."
            )
        return None
    if not found:
        raise ValueError(
            f"resume: expected a checkpoint in {output}, found none; start without --resume."
        )
    record = output / RECORD
    if record.is_file():
        changes = options.changes_from(yaml.safe_load(record.read_text()))
        if changes:
            console.print(
                "These options differ from the run that is resumed, so its losses will not be "
                f"those of an uninterrupted one: {'; '.join(changes)}.",
                style="yellow",
            )
    step, path = found[-1]
    console.print(f"Resuming from {path}.")
    return step, str(path)


def _load_data(source: str, tokenizer: Any, seq_len: int, console: Console) -> Encoded:
    encoded = encode_all(read_examples(source), tokenizer, seq_len)
    console.print(
        f"{source}: {len(encoded.rows):,} examples, {encoded.trained_tokens:,} tokens to learn."
    )
    if encoded.dropped:
        console.print(
            f"{encoded.dropped:,} more have no completion token within --seq-len {seq_len} and "
            "are left out.",
            style="yellow",
        )
    if encoded.truncated:
        console.print(
            f"{encoded.truncated:,} reach --seq-len {seq_len} and may be cut there.", style="yellow"
        )
    return encoded


def _load(options: FinetuneOptions, console: Console) -> Any:
    console.print(f"Loading {options.model} ...")
    model = load_model(options.model, options.dtype)
    if model.dtype == torch.float16 and not torch.cuda.is_available():
        if options.dtype == "float16":
            raise ValueError(
                "dtype: float16 is trained with a scaled loss, which needs a GPU; on a CPU use "
                "float32 or bfloat16."
            )
        console.print("The model is stored in float16; without a GPU it is trained in float32.")
        model = model.float()
    return model


def _train(
    model: Any,
    tokenizer: Any,
    train: Encoded,
    held_out: Encoded | None,
    options: FinetuneOptions,
    total: int,
    checkpoint: tuple[int, str] | None,
    metrics: MetricsCallback,
    console: Console,
) -> tuple[int, bool]:
    """Run Trainer. Returns the step it ended at, and whether that was because of a Ctrl-C."""
    progress, stop = ProgressCallback(console, metrics), InterruptCallback(console)
    scaled = model.dtype == torch.float16
    trainer = AdapterTrainer(
        model=model,
        args=_arguments(options, total, scaled=scaled, resuming=checkpoint is not None),
        train_dataset=train.rows,
        eval_dataset=None if held_out is None else held_out.rows,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[metrics, progress, stop],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with stop:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else checkpoint[1])
    finally:
        progress.close()
    step = trainer.state.global_step
    return step, stop.requested and step < total


def _arguments(
    options: FinetuneOptions, total: int, *, scaled: bool, resuming: bool
) -> TrainingArguments:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    # Newer releases say activation_checkpointing and warn about the old name.
    checkpointing = "activation_checkpointing"
    if checkpointing not in fields:
        checkpointing = "gradient_checkpointing"
    evaluate = options.eval_data is not None
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=total,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=int(_WARMUP * total),
        weight_decay=0.0,
        optim="adamw_torch",
        fp16=scaled,
        seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if evaluate else "no",
        eval_steps=(options.eval_every or total) if evaluate else None,
        eval_on_start=evaluate and not resuming,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=math.ceil(_CHECKPOINTS * total),
        save_total_limit=_KEPT,
        report_to=_reporters(options.report_to),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        **{checkpointing: options.gradient_checkpointing},
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: DataParallel would copy the model every step
    return arguments


def _reporters(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names in ([], ["none"]):
        return []
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise ValueError(
                f"report_to: expected none or installed trackers ({', '.join(available) or 'none'} "
                f"here), got {name!r}; install it first."
            )
    return names
