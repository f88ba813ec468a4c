"""train: check, load, train with a trainer of TRL, and write one folder."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
import yaml
from rich.console import Console
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from rasa_ext import patch_model, summary, unpatch
from rasa_ext.checkpoint import convert_lora, read_adapter, read_lora
from rasa_ext.commands.callbacks import InterruptCallback, Progress
from rasa_ext.commands.data import counted, read_examples, rows_for_sft, rows_for_task, split
from rasa_ext.commands.fit import described
from rasa_ext.commands.models import load_model, load_skeleton, load_tokenizer, own_tokenizer
from rasa_ext.commands.options import Options
from rasa_ext.commands.output import INTERRUPTED, working
from rasa_ext.commands.results import describe, figures, write_folder
from rasa_ext.commands.run_folder import (
    check_output,
    check_run,
    make_room,
    newest_whole,
    processes,
    reserved,
)
from rasa_ext.commands.shown import describe_adapter, show_data, show_row, source_of
from rasa_ext.commands.trainer import make_trainer
from rasa_ext.methods import AdapterConfig, read_method
from rasa_ext.writing import WriteError, is_full, write_error

_HARMLESS = ("output", "gradient_checkpointing", "eval_steps", "eval_strategy", "save_steps")
"""Options that may change on a resume, because no step depends on them."""


def run(options: Options, console: Console) -> None:
    """Train, alone in the run's folder, and print what came of it."""
    if options.data.dry_run:
        _train(options, console)
        return
    check_output(options)
    new = not (options.data.resume or options.data.overwrite)
    try:
        with reserved(options.output, options.record, new=new):
            result = _train(options, console)
    except Exception as error:
        told = write_error(options.output, error, "what was written before is whole")
        if told is None or isinstance(error, WriteError) or not is_full(error):
            raise
        raise told from error  # a library wrote
    if result["interrupted"]:
        several = f" in {processes()} processes" if processes() > 1 else ""
        console.print(
            f"Stopped after step {result['step']} of {result['total_steps']}. "
            f"Continue{several} with:\n  rasa-ext {options.task} --config "
            f"{shlex.quote(str(options.record))} --resume",
            markup=False,
        )
        raise typer.Exit(INTERRUPTED)
    console.print(f"adapter, card, loss.png, all_results.json: {options.output}", markup=False)
    for line in describe(result):
        console.print(line)


def train(
    options: Options, console: Console, *, model: Any = None, tokenizer: Any = None
) -> dict[str, Any]:
    """Train an adapter, and write it into the run's folder.

    The folder gets the adapter, its card (`README.md`), the tokenizer, `loss.png`, the options,
    checkpoints, and Trainer's own `trainer_state.json` and `all_results.json`. Ctrl-C stops the run
    after the current step, with a checkpoint. Returns the content of `all_results.json`.

    Args:
        options: options of the run.
        console: prints the progress.
        model: a loaded model, which is unpatched afterwards; None loads it by name.
        tokenizer: None loads the one saved with `init_adapter`, or else the model's.

    Raises ValueError, whose message names the option or the line of data, or FileNotFoundError.
    """
    check_output(options)
    return _train(options, console, model, tokenizer)


def launch(options: Options, words: Sequence[str]) -> None:
    """Run a task in the processes of ``accelerate launch``."""
    launcher: Any = importlib.import_module("accelerate.commands.launch")
    config: Any = importlib.import_module("trl.cli.accelerate_config")
    elastic: Any = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    theirs = config.resolve_accelerate_config_argument(options.launcher)
    given = [*theirs, "--module", "rasa_ext.commands", options.task, *words]
    parsed = launcher.launch_command_parser().parse_args(given)
    if parsed.num_processes is not None and parsed.num_processes < 1:
        raise ValueError(f"num_processes: expected at least 1, got {parsed.num_processes}.")
    try:
        launcher.launch_command(parsed)
    except (subprocess.CalledProcessError, elastic.ChildFailedError) as error:
        code = getattr(error, "returncode", 1)  # the process has said why
        raise typer.Exit(INTERRUPTED if code == INTERRUPTED else 1) from None


def _train(
    options: Options, console: Console, model: Any = None, tokenizer: Any = None
) -> dict[str, Any]:
    task, data, output = options.task, options.data, options.output
    checkpoint = newest_whole(output, console) if data.resume else None
    if tokenizer is None and data.init_adapter is not None:
        tokenizer = own_tokenizer(Path(data.init_adapter))
    tokenizer = tokenizer or load_tokenizer(options.base.model_name_or_path)
    if (path := getattr(options.training, "chat_template_path", None)) is not None:
        tokenizer.chat_template = _template(str(path))
    examples = _examples(options)
    marks = False
    if task == "sft":
        rows, marks = rows_for_sft(list(examples.values()), tokenizer, data.template)
    else:
        rows = rows_for_task(list(examples.values()), tokenizer, data.template)
    record = {
        **_plain({name: v for name, v in options.values.items() if name not in _HARMLESS}),
        "processes": processes(),
        "rows of the data, as sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }
    if checkpoint is not None:
        check_run(checkpoint, record)
    score, loaded = task == "reward", model is None
    skeleton = load_skeleton(options.base.model_name_or_path, score=score)
    config, tensors = _adapter(options, skeleton)
    whole = (*config.modules_to_save, *(["score"] if score else []))
    patch_model(skeleton, config=dataclasses.replace(config, modules_to_save=whole))
    config.callbacks(skeleton)
    if data.dry_run:
        for name, each in examples.items():
            console.print(f"{source_of(options, name)}: {counted(each)}.", markup=False)
        show_row(rows[0][0], console)
        console.print(str(summary(skeleton)), markup=False)
        console.print(described(skeleton, options), markup=False)
        return {"dry_run": True}
    set_seed(options.training.seed)
    model = _load(options) if loaded else model
    trainer = make_trainer(options, model, tokenizer, config, tensors, rows, marks)
    trainer.record, trainer.skeleton = json.dumps(record), skeleton
    trainer.remove_callback(PrinterCallback)
    trainer.counts = {name: counted(each) for name, each in examples.items()}
    if tensors:
        sizes = {name: getattr(config, name) for name in ("rank", "k") if hasattr(config, name)}
        size = "".join(f", {name} {value}" for name, value in sizes.items())
        console.print(f"Starting from {data.init_adapter}: {config.title}{size}.")
    show_data(options, trainer, rows, console)
    trained = describe_adapter(skeleton, console)
    steps = config.callbacks(trainer.base_model) if task == "sft" else ()
    for callback in steps:
        trainer.add_callback(callback)
    progress = Progress(console, figures(task))
    result: dict[str, Any] = {}
    state = checkpoint and TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state and state.global_step >= state.max_steps:
        console.print(f"The run in {output} is complete: {state.global_step} steps.")
        trainer.state, stopped = state, False
        if options.training.load_best_model_at_end:
            trainer._load_best_model()
        else:
            trainer._load_from_checkpoint(str(checkpoint))
        for callback in steps:
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
        result = _result_of(output)
    else:
        if trainer.is_world_process_zero():
            output.mkdir(parents=True, exist_ok=True)
            if data.overwrite:
                make_room(output)
            text = yaml.safe_dump(_plain(options.given), sort_keys=False)
            options.record.write_text(text, encoding="utf-8")
        trainer.add_callback(progress)
        with InterruptCallback(console) as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        stopped = stop.requested and trainer.state.global_step < trainer.state.max_steps
    if result.get("step") != trainer.state.global_step:
        trainer.model.eval()
        row = list(examples.values())[-1][0]
        result = write_folder(trainer, options, stopped, trained, progress, row)
    if not loaded:
        unpatch(model)
        vars(model).pop("forward", None)  # TRL's own forward, which can omit logits
    return result


def _result_of(output: Path) -> dict[str, Any]:
    """Return the numbers that a run wrote at the end, or none."""
    path = output / "all_results.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _examples(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Read the rows to train on, and those that are held out, by option."""
    data = options.data
    of_hub = {"name": data.dataset_config} if data.dataset_config else {}

    def read(source: Any, option: str, split_name: str = "train") -> list[dict[str, Any]]:
        fields = data.prompt_field, data.completion_field
        more = {**of_hub, "split": split_name}
        return read_examples(source, *fields, option, options.task, **more)

    found = {"data": read(data.data, "data", data.dataset_train_split)}
    if data.eval_data:
        found["eval_data"] = read(data.eval_data, "eval_data")
    elif data.dataset_test_split:
        found["dataset_test_split"] = read(data.data, "data", data.dataset_test_split)
    elif data.test_split is not None:
        parts = split(found["data"], data.test_split, options.training.seed)
        found = dict(zip(("data", "test_split"), parts, strict=True))
    return found


def _adapter(options: Options, skeleton: Any) -> tuple[AdapterConfig, dict[str, Any]]:
    """Return the adapter's config and initial tensors; a new adapter has no tensors here."""
    given, k = options.data.init_adapter, options.adapter.get("k")
    if given is None:
        return options.config(), {}
    settings, tensors = read_adapter(given)
    if settings.get("task_type") == "SEQ_CLS" and options.task != "reward":
        why = f"expected a language model's adapter, but {given} is a reward model's"
        raise ValueError(f"init_adapter: {why}; `rasa-ext reward` trains it further.")
    if settings.get("peft_type") == "LORA":
        lora = convert_lora(skeleton, read_lora(given), given, k or 0)
        return dataclasses.replace(lora.config, template=options.data.template), lora.tensors
    if k is not None:
        raise ValueError(f"k: expected none, as init_adapter has its own, got {k}.")
    return dataclasses.replace(read_method(settings), template=options.data.template), tensors


def _load(options: Options) -> Any:
    base = options.base
    more = {"attn_implementation": base.attn_implementation} if base.attn_implementation else {}
    more |= {"revision": base.model_revision} if base.model_revision != "main" else {}
    kind = next((n for n in ("load_in_4bit", "load_in_8bit") if getattr(base, n)), "")
    with working(f"Loading {base.model_name_or_path}"):
        score = options.task == "reward"
        model = load_model(base.model_name_or_path, base.dtype, kind, score=score, **more)
    if model.dtype == torch.float16 and not torch.cuda.is_available():
        if base.dtype == "float16":
            raise ValueError("dtype: float16 needs a GPU; on a CPU use float32 or bfloat16.")
        model = torch.nn.Module.float(model)  # transformers' own refuses quantized models
    return model


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as YAML writes them."""
    plain: dict[str, Any] = json.loads(json.dumps(given, default=str))
    return plain


def _template(path: str) -> str:
    """Read a chat template's file, as TRL does, but before the data is converted."""
    if not (path.endswith((".jinja", ".j2")) and Path(path).is_file()):
        why = "that of another tokenizer may have tokens that the base lacks"
        raise ValueError(f"chat_template_path: expected a .jinja file, got {path!r}; {why}.")
    return Path(path).read_text(encoding="utf-8")
