"""train: check, load, train with a trainer of TRL, and write one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
import logging
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import typer
import yaml
from rich.console import Console
from rich.text import Text
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

import rasa_ext.peft
from rasa_ext import patch_model, summary, unpatch
from rasa_ext.checkpoint import convert_lora, read_adapter, read_lora
from rasa_ext.checkpoint.loading import load_tensors_into
from rasa_ext.commands.callbacks import InterruptCallback, Progress
from rasa_ext.commands.checkpoints import RUN, make_room, newest_whole
from rasa_ext.commands.data import (
    DataError,
    conversation,
    counted,
    read_examples,
    rows_for_sft,
    rows_for_task,
    split,
    templated,
)
from rasa_ext.commands.fit import described
from rasa_ext.commands.measuring import greedy_answers
from rasa_ext.commands.models import load_model, load_skeleton, load_tokenizer, own_tokenizer
from rasa_ext.commands.options import TASKS, Options
from rasa_ext.commands.output import INTERRUPTED, working
from rasa_ext.commands.parsing import check_differs
from rasa_ext.commands.results import describe, figures, write_folder
from rasa_ext.commands.trainer import IGNORE, AdapterTrainer, dataset, trainer_of
from rasa_ext.methods import AdapterConfig, read_method
from rasa_ext.patching.grouping import as_saved
from rasa_ext.writing import WriteError, created, is_full, write_error

OPEN, CLOSE = ">>>", "<<<"  # around trained text in the printed example
_SHOWN = 400  # characters; longer text without loss is shortened in the middle
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


def check_output(options: Options) -> None:
    """Raise if this run must not write into its folder."""
    output, data = options.output, options.data
    if _is_another():
        return  # the first process may have written by now
    trained = any(output.glob("checkpoint-*/trainer_state.json"))
    if trained and not (data.resume or data.overwrite):
        ways = "--resume continues it, --overwrite replaces it"
        raise ValueError(f"output: {output} holds checkpoints of an earlier run; {ways}.")
    sources = filter(None, (options.base.model_name_or_path, data.init_adapter))
    check_differs(sources, output, overwrite=data.resume or data.overwrite, beside=())


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
            console.print(f"{_source(options, name)}: {counted(each)}.", markup=False)
        _show_row(rows[0][0], console)
        console.print(str(summary(skeleton)), markup=False)
        console.print(described(skeleton, options), markup=False)
        return {"dry_run": True}
    set_seed(options.training.seed)
    model = _load(options) if loaded else model
    trainer = _trainer(options, model, tokenizer, config, tensors, rows, marks)
    trainer.record, trainer.skeleton = json.dumps(record), skeleton
    trainer.remove_callback(PrinterCallback)
    trainer.counts = {name: counted(each) for name, each in examples.items()}
    if tensors:
        sizes = {name: getattr(config, name) for name in ("rank", "k") if hasattr(config, name)}
        size = "".join(f", {name} {value}" for name, value in sizes.items())
        console.print(f"Starting from {data.init_adapter}: {config.title}{size}.")
    _show(options, trainer, rows, console)
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
        trainer.asked = _asked(options, trainer, list(examples.values())[-1][0])
        result = write_folder(trainer, options, stopped, trained, progress)
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


def _trainer(
    options: Options,
    model: Any,
    tokenizer: Any,
    config: AdapterConfig,
    tensors: Mapping[str, Any],
    rows: Sequence[list[dict[str, Any]]],
    marks: bool,
) -> Any:
    """Return the task's trainer, over the model with the adapter."""
    arguments = options.training
    given: dict[str, Any] = {
        "train_dataset": dataset(rows[0]),
        "eval_dataset": dataset(rows[1]) if len(rows) > 1 else None,
        "processing_class": tokenizer,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(rasa_)?(rank|groups): ")  # the skeleton gave them
        if options.task == "sft":
            plain = "text" in rows[0][0]
            if plain:  # evaluate and generate read this in the config
                config = dataclasses.replace(config, template=False)
            _for_sft(arguments, marks, plain)
            adapter = as_saved(config) if tensors else config
            trainer = AdapterTrainer(model, arguments, adapter=adapter, **given)
            if tensors:
                load_tensors_into(
                    trainer.base_model, config, tensors, str(options.data.init_adapter)
                )
            return trainer
        if options.task in ("grpo", "rloo"):
            given["reward_funcs"] = _rewards(options)
        given |= _peft(options, model, config)
        return trainer_of(TASKS[options.task].kind)(args=arguments, **given)


def _for_sft(arguments: Any, marks: bool, plain: bool) -> None:
    arguments.assistant_only_loss = marks
    arguments.packing_strategy = "bfd_split" if plain else "bfd"  # bfd cuts longer examples
    arguments.eval_packing, arguments.prediction_loss_only = False, True


def _peft(options: Options, model: Any, config: AdapterConfig) -> dict[str, Any]:
    """Return the trainer's model and adapter under PEFT, which gives TRL its reference."""
    given = options.data.init_adapter
    kind = "SEQ_CLS" if options.task == "reward" else "CAUSAL_LM"
    if given is None:
        peft_config = rasa_ext.peft.RasaConfig.of(config, task_type=kind)
        if why := peft_config.why_not_trained():
            raise ValueError(f"method: expected one for {options.task}, but {why}.")
        return {"model": model, "peft_config": peft_config}
    if read_adapter(given)[0].get("peft_type") == "LORA":
        return {"model": rasa_ext.peft.import_lora(model, given, options.adapter.get("k") or 0)}
    peft: Any = importlib.import_module("peft")
    return {"model": peft.PeftModel.from_pretrained(model, given, is_trainable=True)}


def _rewards(options: Options) -> list[Any]:
    """Return the reward functions by name: TRL's, or those of a module in the working folder."""
    rewards: Any = importlib.import_module("trl.rewards")
    known = {name: getattr(rewards, name) for name in rewards.__all__}
    if "get_soft_overlong_punishment" in known:
        make = known["get_soft_overlong_punishment"]
        known["get_soft_overlong_punishment"] = make(1280, 256)  # as TRL's script
    found: list[Any] = [name for name in [options.rewards.reward_model_name_or_path] if name]
    for name in options.rewards.reward_funcs or ():
        module, _, function = name.rpartition(".")
        if name in known:
            found.append(known[name])
            continue
        if not module:
            names = f"MODULE.FUNCTION or one of {', '.join(known)}"
            raise ValueError(f"reward_funcs: expected {names}, got {name!r}.")
        sys.path.insert(0, str(Path.cwd()))
        try:
            found.append(getattr(importlib.import_module(module), function))
        except (ImportError, AttributeError) as error:
            raise ValueError(f"reward_funcs: {name}: {error}.") from None
    return found


def _show(options: Options, trainer: Any, rows: Sequence[Any], console: Console) -> None:
    """Print how many rows there are, and the first as the model sees it."""
    learnt = [trainer.train_dataset, trainer.eval_dataset]
    for (name, count), given, prepared in zip(trainer.counts.items(), rows, learnt, strict=False):
        text = f"{_source(options, name)}: {count}"
        if options.task == "sft":
            args = options.training
            describe_rows(text, len(given), prepared, args.max_length, args.packing, console)
        else:
            console.print(f"{text}.", markup=False)
    seen = set(map(json.dumps, rows[0]))
    if both := sum(json.dumps(row) in seen for each in rows[1:] for row in each):
        console.print(f"{both:,} held-out examples are also trained on.", style="yellow")
    if options.task == "sft":
        plain = "text" in rows[0][0]
        show_example(trainer.train_dataset[0], trainer.processing_class, console, plain=plain)
        return
    _show_row(rows[0][0], console)


def _asked(options: Options, trainer: Any, row: dict[str, Any]) -> str:
    """Return a held-out question with the trained model's answer, for the card."""
    if options.task == "reward" or "text" in row or trainer.args.world_size > 1:
        return ""
    tokenizer, prompt = trainer.processing_class, row.get("prompt")
    turns = conversation(row)[:-1] if "messages" in row else prompt
    if turns is None:
        return ""
    uses = options.data.template and tokenizer.chat_template
    if isinstance(turns, str) and uses:
        turns = [{"role": "user", "content": turns}]
    asked = str(turns)
    if not isinstance(turns, str):
        more = {"add_generation_prompt": True, "tools": row.get("tools")}
        asked, prompt = templated(tokenizer, turns, "data", **more), turns[-1]["content"]
    special = isinstance(turns, str)
    with working("Asking a question"):
        (answer,) = greedy_answers(trainer.base_model, tokenizer, [asked], 48, 1, special)
    quoted = "\n".join(f"> {line}" for line in str(prompt).splitlines())
    return f"{quoted}\n\n{answer}"


def _source(options: Options, name: str) -> str:
    """Return where rows are from, given the option that named it."""
    value = getattr(options.data, name)
    listed = value if isinstance(value, list) else [f"--{name.replace('_', '-')} {value}"]
    return ", ".join(str(each["path"] if isinstance(each, dict) else each) for each in listed)


def _show_row(row: Mapping[str, Any], console: Console) -> None:
    console.print("The first example:", style="dim")
    for key, value in row.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        console.print(f"  {key}: {text[:_SHOWN]}", markup=False)


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as YAML writes them."""
    plain: dict[str, Any] = json.loads(json.dumps(given, default=str))
    return plain


@contextlib.contextmanager
def reserved(output: Path, record: Path, *, new: bool) -> Iterator[None]:
    """Keep other runs out of a run's output folder, by a lock on its record.

    After an error that came before the first step, nothing is left there.
    Raises ValueError if another run has the folder.
    """
    if _is_another():
        yield
        return
    with created(output), contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(record.open("x" if new else "a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileExistsError, BlockingIOError):
            raise ValueError(f"output: another run writes {output}; choose another.") from None
        try:
            yield
        finally:
            if not record.stat().st_size:
                record.unlink()


def _is_another() -> bool:
    """Return whether this is another process than the first."""
    return os.environ.get("RANK", "0") != "0"


def processes() -> int:
    """Return how many processes torchrun, or accelerate, has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_run(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the options, if a checkpoint's run had other options or data.

    The checkpoint's steps used its own options, so a run that continues with others would match
    neither. For example, the learning rate falls to zero over the total number of steps.
    """
    before = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
    other = [
        f"{name} ({before[name]!r} before, {value!r} now)"
        for name, value in record.items()
        if name in before and before[name] != value
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


def describe_adapter(model: Any, console: Console) -> int:
    """Print and return the number of trainable parameters."""
    report = summary(model)
    console.print(
        f"{report.trainable:,} of {report.total:,} parameters are trained ({len(report)} groups, "
        f"effective rank {max(row.R for row in report)})."
    )
    return report.trainable


def describe_rows(
    counts: str, given: int, prepared: Any, length: int, packing: bool, console: Console
) -> None:
    """Print the number of tokens with a loss, and of examples that were omitted or cut.

    Raises DataError if no example is left.
    """
    if not len(prepared):
        what = f"has a completion token within {length} tokens"
        raise DataError(f"seq_len: none of the {given} examples {what}; raise --seq-len.")
    labels = prepared["labels"]
    learnt = sum(label != IGNORE for row in labels for label in row)
    packed = packing and len(prepared) < given
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
