"""finetune(options): check, load, adapt, train with TRL's SFTTrainer, and write the results."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from rasa_ext import patch_model, summary, unpatch
from rasa_ext.patching.state import owners
from rasa_ext.train.callbacks import (
    InterruptCallback,
    MetricsCallback,
    ProgressCallback,
    read_metrics,
)
from rasa_ext.train.checkpoints import RUN, Checkpoint, make_room, newest_whole
from rasa_ext.train.data import Fields, read_examples, rows_for_sft
from rasa_ext.train.model_loading import load_model, load_skeleton, load_tokenizer
from rasa_ext.train.options import FinetuneOptions, differences
from rasa_ext.train.outcome import FinetuneResult
from rasa_ext.train.results import write_record, write_results
from rasa_ext.train.shown import describe_rows, show_example
from rasa_ext.train.trainer import AdapterTrainer, check_head, dataset
from rasa_ext.train.working import working

_CHECKPOINTS = 0.1  # one after every tenth of the run; they hold the adapter only
_KEPT = 2


def finetune(
    options: FinetuneOptions,
    console: Console,
    *,
    model: Any = None,
    tokenizer: Any = None,
) -> FinetuneResult:
    """Fine-tune a causal language model and write the adapter into `options.output`.

    The directory gets the adapter (`adapter_config.json`, `adapter_model.safetensors`), its card
    (`README.md`), the tokenizer, `metrics.jsonl`, `loss.png`, `summary.json`, the run's own
    `finetune.yaml`, and checkpoints. Ctrl-C ends the run after the present step with a checkpoint.

    Args:
        options: what to do.
        console: where progress is shown.
        model: a model already loaded, which is left as it was; loaded by name where None.
        tokenizer: its tokenizer.

    Raises ValueError (its message names the option or the line of data) or FileNotFoundError.
    """
    output = Path(options.output)
    checkpoint = newest_whole(output) if options.resume else None
    reporters = _reporters(options.report_to)
    tokenizer = load_tokenizer(options.model) if tokenizer is None else tokenizer
    fields = Fields(options.prompt_field, options.completion_field)
    asked = {"data": options.data, "eval_data": options.eval_data}
    sources = {option: source for option, source in asked.items() if source is not None}
    examples = [read_examples(source, fields, option) for option, source in sources.items()]
    rows, marks = rows_for_sft(examples, tokenizer, options.template)
    record = {**options.to_dict(), "processes": _processes(), "sha256_of_data": _digest(rows)}
    if checkpoint is not None:
        _check_run(checkpoint.path, record)
        console.print(str(checkpoint), markup=False)
    loaded = model is None
    if loaded:
        _check_plan(options)
        model = _load(options, console)
    scaled = model.dtype == torch.float16
    arguments = _arguments(options, reporters, marks, scaled, resuming=checkpoint is not None)
    with warnings.catch_warnings():
        if loaded:  # the plan's check gave this advice
            warnings.filterwarnings("ignore", "(rank|groups): ")
        trainer = AdapterTrainer(
            model,
            arguments,
            adapter=options.adapter(),
            warmup=options.warmup,
            train_dataset=dataset(rows[0]),
            eval_dataset=dataset(rows[1]) if options.eval_data is not None else None,
            processing_class=tokenizer,
        )
    trainer.record = json.dumps(record)
    trainer.remove_callback(PrinterCallback)
    prepared = (trainer.train_dataset, trainer.eval_dataset)
    for source, given, learnt in zip(sources.values(), rows, prepared, strict=False):
        describe_rows(source, len(given), learnt, options, console)
    show_example(trainer.train_dataset[0], tokenizer, console)
    trained = _describe_adapter(trainer.base_model, console)

    total = total_steps(options, len(trainer.train_dataset))
    trainer.args.eval_steps = options.eval_every or total
    trainer.args.save_steps = math.ceil(_CHECKPOINTS * total)
    metrics = MetricsCallback(output / "metrics.jsonl")
    steps = options.adapter().callbacks(trainer.base_model)
    for callback in steps:
        trainer.add_callback(callback)
    if checkpoint is not None and checkpoint.step >= total:
        console.print(f"The run in {output} is complete: {checkpoint.step} of {total} steps.")
        trainer._load_from_checkpoint(str(checkpoint.path))
        metrics.rows = read_metrics(metrics.path)
        for callback in steps:
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
        step, interrupted = checkpoint.step, False
    else:
        output.mkdir(parents=True, exist_ok=True)
        if options.overwrite:
            make_room(output)
        write_record(options)
        step, interrupted = _train(trainer, total, checkpoint, metrics, console)
    result = write_results(trainer, options, step, total, interrupted, metrics, trained)
    if not loaded:
        unpatch(model)
        vars(model).pop("forward", None)  # TRL's, which can leave logits out
    return result


def total_steps(options: FinetuneOptions, rows: int) -> int:
    """Optimizer steps of a run over `rows` examples, counted as Trainer does."""
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(rows / (options.batch_size * _processes()))
    return math.ceil(options.epochs * math.ceil(batches / options.grad_accum))


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _digest(sets: Sequence[Sequence[Any]]) -> str:
    """SHA-256 of all rows of the data sets, in order."""
    total = hashlib.sha256()
    for rows in sets:
        for row in rows:
            total.update(json.dumps(row).encode() + b"\n")
        total.update(b"\n")
    return total.hexdigest()


def _check_run(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the options, where a checkpoint is of another run than is asked for.

    The steps behind it were made with what it says, so no run that goes on otherwise is the one
    that the options describe: the rate, for one, falls to zero over all steps.
    """
    earlier = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
    if other := differences(earlier, record):
        raise ValueError(
            f"resume: the run of {checkpoint} had other options: {'; '.join(other)}; give the "
            "same, or another --output and no --resume."
        )


def _check_plan(options: FinetuneOptions) -> None:
    """Raise ValueError where the adapter does not fit the model, whose weights are not read."""
    adapter = options.adapter()
    model = patch_model(load_skeleton(options.model), config=adapter)
    check_head(model)
    adapter.callbacks(model)
    most = max(min(row.shape) for row in summary(model))
    if options.rank > most:
        raise ValueError(
            f"rank: expected at most {most}, the smaller side of the largest layer that is "
            f"adapted, since no change of a layer has more ranks, got {options.rank}."
        )


def _load(options: FinetuneOptions, console: Console) -> Any:
    with working(console, f"Loading {options.model}"):
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


def _describe_adapter(model: Any, console: Console) -> int:
    """Say how much is trained; returns the number of trainable parameters."""
    found, every = summary(model), [owner for _, owner in owners(model)]
    pools = {id(owner.pool) for owner in every if owner.pool is not None}
    groups = len(pools) or len(every)
    console.print(
        f"{found.trainable:,} of {found.total:,} parameters are trained ({groups} groups, "
        f"effective rank {max(row.R for row in found)})."
    )
    return found.trainable


def _train(
    trainer: AdapterTrainer,
    total: int,
    checkpoint: Checkpoint | None,
    metrics: MetricsCallback,
    console: Console,
) -> tuple[int, bool]:
    """Run the trainer. Returns the step it ended at, and whether that was because of a Ctrl-C."""
    held_out = None if trainer.eval_dataset is None else len(trainer.eval_dataset)
    progress = ProgressCallback(console, metrics, held_out)
    stop = InterruptCallback(console)
    for callback in (metrics, progress, stop):
        trainer.add_callback(callback)
    try:
        with stop:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.path))
    finally:
        progress.close()
    step = trainer.state.global_step
    return step, stop.requested and step < total


def _arguments(
    options: FinetuneOptions, reporters: list[str], marks: bool, scaled: bool, *, resuming: bool
) -> SFTConfig:
    evaluate = options.eval_data is not None
    arguments = SFTConfig(
        output_dir=options.output,
        max_steps=-1 if options.max_steps is None else options.max_steps,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,  # nothing is kept for a backward
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=options.lr,
        weight_decay=0.0,
        optim="adamw_torch",
        max_length=options.seq_len,
        packing=options.packing,
        eval_packing=False,
        assistant_only_loss=marks,
        # The base's dtype decides; TRL would compute in bfloat16.
        bf16=False,
        fp16=scaled,
        gradient_checkpointing=options.gradient_checkpointing,
        seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if evaluate else "no",
        eval_steps=1 if evaluate else None,  # set once the steps are known
        eval_on_start=evaluate and not resuming,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=1,  # the same
        save_total_limit=_KEPT,
        report_to=reporters,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: DataParallel would copy the model every step
    return arguments


def _reporters(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names in ([], ["none"]):
        return []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to: expected none or trackers among {known}, got {name!r}.")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: {name} is not installed here: pip install {name}")
    return names
