"""train(options): check, load and patch, train with TRL's SFTTrainer, and write the results."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import SchedulerType
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from trl import SFTConfig

from rasa_ext import patch_model, summary, unpatch
from rasa_ext.checkpoint import convert_lora, read_adapter, read_lora
from rasa_ext.checkpoint.loading import load_tensors_into
from rasa_ext.commands.callbacks import InterruptCallback, MetricsCallback
from rasa_ext.commands.checkpoints import RUN, make_room, newest_whole
from rasa_ext.commands.data import DataError, counted, read_examples, rows_for_sft, split
from rasa_ext.commands.models import load_model, load_skeleton, load_tokenizer, own_tokenizer
from rasa_ext.commands.options import RECORD, FinetuneOptions, check_loop
from rasa_ext.commands.output import working
from rasa_ext.commands.parsing import parse_yaml
from rasa_ext.commands.results import write_results
from rasa_ext.commands.trainer import IGNORE, AdapterTrainer, dataset
from rasa_ext.methods import AdapterConfig, checked_choice, read_method
from rasa_ext.patching.grouping import as_saved

OPEN, CLOSE = ">>>", "<<<"  # around trained text in the printed example
_SHOWN = 400  # characters; longer text without loss is shortened in the middle
# Options that may change on a resume, because no step depends on them.
_HARMLESS = frozenset({"output", "gradient_checkpointing", "eval_steps", "save_steps"})


def train(
    options: FinetuneOptions, console: Console, *, model: Any = None, tokenizer: Any = None
) -> dict[str, Any]:
    """Fine-tune a causal language model and write the adapter into `options.output`.

    The directory gets the adapter (`adapter_config.json`, `adapter_model.safetensors`), its card
    (`README.md`), the tokenizer, `metrics.jsonl`, `loss.png`, `summary.json`, the options in
    `finetune.yaml`, and checkpoints. Ctrl-C stops the run after the current step, with a
    checkpoint. Returns the content of `summary.json`.

    Args:
        options: options of the run.
        console: prints the progress.
        model: a loaded model, which is unpatched afterwards; None loads it by name.
        tokenizer: None loads the one saved with `options.init_adapter`, or else the model's.

    Raises ValueError, whose message names the option or the line of data, or FileNotFoundError.
    """
    output = Path(options.output)
    resumed = newest_whole(output, console) if options.resume else None
    if tokenizer is None and options.init_adapter is not None:
        tokenizer = own_tokenizer(Path(options.init_adapter))
    if tokenizer is None:
        tokenizer = load_tokenizer(options.model)
    of_trl = parse_yaml("training_arguments", options.training_arguments)
    if (path := of_trl.get("chat_template_path")) is not None:
        tokenizer.chat_template = _template(str(path))
    names = options.prompt_field, options.completion_field
    asked = {"data": options.data, "eval_data": options.eval_data}
    examples = {name: read_examples(s, *names, name) for name, s in asked.items() if s is not None}
    if options.test_split is not None:
        parts = split(examples["data"], options.test_split, options.seed)
        examples = dict(zip(("data", "test_split"), parts, strict=True))
    rows, marks = rows_for_sft(list(examples.values()), tokenizer, options.template)
    plain = "text" in rows[0][0]
    if plain:  # evaluate and generate read this in the record
        options = copy.copy(options)  # without the checks, which refuse the folder that is reserved
        object.__setattr__(options, "template", False)
    record = {
        **options.to_dict(),
        "processes": processes(),
        "rows of the data, as sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }
    state = None
    if resumed is not None:
        _check_run(resumed, record)
        state = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME))
    arguments = _arguments(options, marks, plain)
    loaded = model is None
    if loaded:
        _check_plan(options)
        model = _load(options)
    config, start = _adapter(options, model)
    if model.dtype == torch.float16:
        arguments = _arguments(options, marks, plain, fp16=True)
    with warnings.catch_warnings():
        if loaded:  # _check_plan has printed these warnings
            warnings.filterwarnings("ignore", "(rank|groups): ")
        trainer = AdapterTrainer(
            model,
            arguments,
            adapter=as_saved(config) if start else config,
            warmup=options.warmup,
            train_dataset=dataset(rows[0]),
            eval_dataset=dataset(rows[1]) if len(rows) > 1 else None,
            processing_class=tokenizer,
        )
    if start:
        load_tensors_into(trainer.base_model, config, start, str(options.init_adapter))
        sizes = {name: getattr(config, name) for name in ("rank", "k") if hasattr(config, name)}
        size = "".join(f", {name} {value}" for name, value in sizes.items())
        console.print(f"Starting from {options.init_adapter}: {config.title}{size}.")
    trainer.record = json.dumps(record)
    trainer.remove_callback(PrinterCallback)
    trainer.counts = {name: counted(each) for name, each in examples.items()}
    prepared = (trainer.train_dataset, trainer.eval_dataset)
    for name, given, learnt in zip(examples, rows, prepared, strict=False):
        source = ", ".join(asked.get(name) or [f"--test-split {options.test_split}"])
        describe_rows(f"{source}: {trainer.counts[name]}", len(given), learnt, options, console)
    seen = set(map(json.dumps, rows[0]))
    if both := sum(json.dumps(row) in seen for each in rows[1:] for row in each):
        console.print(f"{both:,} held-out examples are also trained on.", style="yellow")
    show_example(trainer.train_dataset[0], tokenizer, console, plain=plain)
    trained = _describe_adapter(trainer.base_model, console)

    steps = config.callbacks(trainer.base_model)
    for callback in steps:
        trainer.add_callback(callback)
    if state is not None and state.global_step >= state.max_steps:
        trainer.state, stopped = state, False
        console.print(f"The run in {output} is complete: {state.global_step} steps.")
        if arguments.load_best_model_at_end:
            trainer._load_best_model()
        else:
            trainer._load_from_checkpoint(str(resumed))
        for callback in steps:
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
    else:
        if trainer.is_world_process_zero():
            output.mkdir(parents=True, exist_ok=True)
            if options.overwrite:
                make_room(output)
            text = yaml.safe_dump(options.to_dict(), sort_keys=False)
            (output / RECORD).write_text(text, encoding="utf-8")
        trainer.add_callback(MetricsCallback(output / "metrics.jsonl", console))
        with InterruptCallback(console) as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=resumed and str(resumed))
        stopped = stop.requested and trainer.state.global_step < trainer.state.max_steps
    result = write_results(trainer, options, stopped, trained)
    if not loaded:
        unpatch(model)
        vars(model).pop("forward", None)  # TRL's own forward, which can omit logits
    return result


def processes() -> int:
    """Return how many processes torchrun, or accelerate, has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_run(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the options, if a checkpoint's run had other options or data.

    The checkpoint's steps used its own options, so a run that continues with others would match
    neither. For example, the learning rate falls to zero over the total number of steps.
    """
    before = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
    other = [
        f"{name} ({before.get(name)!r} before, {value!r} now)"
        for name, value in record.items()
        if name not in _HARMLESS and before.get(name) != value
    ]
    if other:
        raise ValueError(
            f"resume: the run of {checkpoint} had other options: {'; '.join(other)}; pass the same "
            "options, or another --output without --resume."
        )


def _template(path: str) -> str:
    """Read a chat template's file, as TRL does, but before the data is converted."""
    if not (path.endswith((".jinja", ".j2")) and Path(path).is_file()):
        why = "that of another tokenizer may have tokens that the base lacks"
        raise ValueError(f"chat_template_path: expected a .jinja file, got {path!r}; {why}.")
    return Path(path).read_text(encoding="utf-8")


def _check_plan(options: FinetuneOptions) -> None:
    """Raise ValueError if the adapter does not fit the model, before its weights are loaded."""
    model = load_skeleton(options.model)
    config, _ = _adapter(options, model)
    patch_model(model, config=config)
    config.callbacks(model)


def _adapter(options: FinetuneOptions, model: Any) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return the adapter's config and initial tensors; a new adapter has no tensors here.

    Only names and shapes of ``model`` are used, so it may be on the meta device.
    """
    if options.init_adapter is None:
        return options.adapter(), {}
    settings, tensors = read_adapter(options.init_adapter)
    if settings.get("peft_type") == "LORA":
        read = read_lora(options.init_adapter)
        lora = convert_lora(model, read, options.init_adapter, options.k or 0)
        return dataclasses.replace(lora.config, template=options.template), lora.tensors
    if options.k is not None:
        raise ValueError(f"k: expected none, as init_adapter has its own, got {options.k}.")
    config = read_method(settings)
    check_loop(config, "init_adapter")
    return dataclasses.replace(config, template=options.template), tensors


def _load(options: FinetuneOptions) -> Any:
    with working(f"Loading {options.model}"):
        kind = next((n for n in ("load_in_4bit", "load_in_8bit") if getattr(options, n)), "")
        model = load_model(options.model, options.dtype, kind)
    if model.dtype == torch.float16 and not torch.cuda.is_available():
        if options.dtype == "float16":
            raise ValueError("dtype: float16 needs a GPU; on a CPU use float32 or bfloat16.")
        model = torch.nn.Module.float(model)  # transformers' own refuses quantized models
    return model


def _describe_adapter(model: Any, console: Console) -> int:
    """Print and return the number of trainable parameters."""
    report = summary(model)
    console.print(
        f"{report.trainable:,} of {report.total:,} parameters are trained ({len(report)} groups, "
        f"effective rank {max(row.R for row in report)})."
    )
    return report.trainable


def _arguments(options: FinetuneOptions, marks: bool, plain: bool, fp16: bool = False) -> SFTConfig:
    kinds = [kind.value for kind in SchedulerType]
    checked_choice("lr_scheduler_type", options.lr_scheduler_type, kinds)
    evaluate = bool(options.eval_data or options.test_split)
    usual = {
        "optim": "adamw_torch",
        "per_device_eval_batch_size": 2 * options.batch_size,  # no activations are stored
        "save_total_limit": 2,
        "report_to": [],
        "log_level_replica": "error",  # as the first process has it
        "packing_strategy": "bfd_split" if plain else "bfd",  # bfd cuts longer examples
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if processes() > 1 and not torch.accelerator.is_available():
        usual |= {"use_cpu": True, "ddp_backend": "gloo"}  # or each process would train alone
    given = parse_yaml("training_arguments", options.training_arguments)
    if (best := given.get("load_best_model_at_end")) and not evaluate:
        raise ValueError("training_arguments: load_best_model_at_end: expected eval_data with it.")
    ours: dict[str, Any] = {
        "output_dir": options.output,
        "max_steps": -1 if options.max_steps is None else options.max_steps,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.grad_accum,
        "learning_rate": options.lr,
        "lr_scheduler_type": options.lr_scheduler_type,
        "weight_decay": options.weight_decay,
        "max_length": options.seq_len,
        "packing": options.packing,
        "eval_packing": False,
        "assistant_only_loss": marks,
        "dataset_text_field": "text",  # whatever the data's fields are named
        "model_init_kwargs": None,  # the model is loaded before
        # Compute in the base's dtype; TRL's default is bfloat16.
        "bf16": False,
        "fp16": fp16,
        "gradient_checkpointing": options.gradient_checkpointing,
        "seed": options.seed,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "eval_strategy": "steps" if evaluate else "no",
        # Below 1 it is a share of the steps; 1 - 1e-9 evaluates only after the last step.
        "eval_steps": options.eval_steps or (options.save_steps if best else 1 - 1e-9),
        "eval_on_start": evaluate and not options.resume,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "disable_tqdm": True,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    for name, value in given.items():
        if name in ours:
            raise ValueError(f"training_arguments: {name} is set by the command.")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"training_arguments: SFTConfig has no {name}{hint}")
        if isinstance(defaults[name], int | float) and isinstance(value, str):
            raise ValueError(f"training_arguments: {name}: expected a number, got {value!r}.")
    try:
        arguments = SFTConfig(**{**usual, **given, **ours})
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"training_arguments: {error}") from error
    available = get_available_reporting_integrations()
    if missing := set(arguments.report_to) - {*available}:
        there, names = ", ".join(available) or "none is", ", ".join(missing)
        raise ValueError(f"training_arguments: report_to: {there} installed, pip install {names}.")
    if arguments.activation_offloading and not torch.cuda.is_available():
        raise ValueError("training_arguments: activation_offloading: expected a GPU, got none.")
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # with more, DataParallel would copy the model in every step
    return arguments


def describe_rows(
    counts: str, given: int, prepared: Any, options: FinetuneOptions, console: Console
) -> None:
    """Print the number of tokens with a loss, and of examples that were omitted or cut.

    Raises DataError if no example is left.
    """
    length = options.seq_len
    if not len(prepared):
        what = f"has a completion token within {length} tokens"
        raise DataError(f"seq_len: none of the {given} examples {what}; raise --seq-len.")
    labels = prepared["labels"]
    learnt = sum(label != IGNORE for row in labels for label in row)
    packed = options.packing and len(prepared) < given
    rows = f" in {len(prepared):,} rows" if packed else ""
    console.print(f"{counts}{rows}, {learnt:,} tokens to learn.")
    dropped, cut = given - len(prepared), sum(len(row) == length for row in labels)
    if not packed and (dropped or cut):
        console.print(
            f"--seq-len {length}: {dropped:,} examples have no completion token within this length "
            f"and are left out; {cut:,} more reach it and may be cut.",
            style="yellow",
        )


def show_example(
    row: Mapping[str, Any], tokenizer: Any, console: Console, *, plain: bool = False
) -> None:
    """Print a row as the model sees it, with trained text inside `OPEN` and `CLOSE`."""
    text = Text()
    for trained, stretch in marked(row, tokenizer):
        if trained:
            text.append(f"{OPEN}{stretch}{CLOSE}", style="bold green")
        elif len(stretch) <= _SHOWN:
            text.append(stretch)
        else:
            text.append(f"{stretch[: _SHOWN // 2]} [...] {stretch[-_SHOWN // 2 :]}")
    kind = "The first example, plain text without a chat template" if plain else "The first example"
    console.print(f"{kind}; trained text is inside {OPEN} {CLOSE}:", style="dim")
    console.print(text)


def marked(row: Mapping[str, Any], tokenizer: Any) -> list[tuple[bool, str]]:
    """Split a row's text into stretches with and without loss, as pairs (has loss, text)."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    return [
        (trained, tokenizer.decode([token for token, _ in stretch]))
        for trained, stretch in groupby(pairs, key=lambda pair: pair[1] != IGNORE)
    ]
