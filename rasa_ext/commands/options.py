"""The options of every training task: fields of TRL's configs, of the method's, and of the data.

An option has the name of its field. ``SHORT`` gives some of them second names.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import json
import os
import re
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rasa_ext.commands.parsing import check_dtype, check_least, check_seed, parse_targets


class Task(NamedTuple):
    """What a task trains on, and with which trainer of TRL."""

    kind: str
    """The start of the names of TRL's trainer and config."""
    about: str
    lr: float
    """The default rate. For sft it is this package's; for others ten times TRL's, whose default is
    for whole models, as TRL's guide to LoRA advises; a reward's is TRL's own."""
    rows: str


TASKS = {
    "sft": Task(
        "SFT",
        "Fine-tune a language model; only completions, or the assistant's turns, carry a loss.",
        5e-4,
        "prompt and completion, messages, conversations in ShareGPT's format, or text",
    ),
    "dpo": Task("DPO", "Train on pairs of answers, by DPO.", 1e-5, "prompt, chosen and rejected"),
    "kto": Task("KTO", "Train on rated answers, by KTO.", 1e-5, "prompt, completion and label"),
    "reward": Task(
        "Reward", "Train a reward model on pairs of answers.", 1e-4, "chosen and rejected"
    ),
    "grpo": Task(
        "GRPO", "Train on rewards for the model's own answers, by GRPO.", 1e-5, "prompt, and others"
    ),
    "rloo": Task(
        "RLOO", "Train on rewards for the model's own answers, by RLOO.", 1e-5, "prompt, and others"
    ),
}

SHORT = {
    "model_name_or_path": ("model",),
    "data": ("dataset_name",),
    "output_dir": ("output",),
    "learning_rate": ("lr",),
    "num_train_epochs": ("epochs",),
    "per_device_train_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("grad_accum",),
    "max_length": ("seq_len", "max_seq_length"),
    "warmup_steps": ("warmup", "warmup_ratio"),
    "test_split": ("test_split_size",),
    "dtype": ("torch_dtype",),
    "rank": ("lora_r", "r"),
    "k": ("rasa_k",),
    "alpha": ("rasa_alpha", "lora_alpha"),
    "start": ("rasa_start",),
    "dropout": ("rasa_dropout", "lora_dropout"),
    "experts": ("rasa_experts",),
    "target_modules": ("lora_target_modules",),
    "modules_to_save": ("lora_modules_to_save",),
}
"""Second names of options."""


def short(name: str) -> str:
    """Return the shorter of an option's two usual names, for people to read."""
    return min((name, *SHORT.get(name, (name,))[:1]), key=len)


_DEFAULTS: dict[str, Any] = {
    **{"output_dir": "rasa-out", "num_train_epochs": 1.0, "per_device_train_batch_size": 8},
    **{"warmup_steps": 0.03, "seed": 0, "optim": "adamw_torch", "report_to": "none"},
    **{"save_steps": 0.1, "save_total_limit": 2, "logging_steps": 1, "disable_tqdm": True},
    # Compute in the base's dtype; TRL's default is bfloat16, which a machine may not have.
    **{"bf16": False, "gradient_checkpointing": False, "logging_nan_inf_filter": False},
    "log_level_replica": "error",  # as the first process has it
}
"""Defaults that differ from TRL's."""

_SET = (
    *("model_init_kwargs", "eval_packing", "prediction_loss_only", "dataset_text_field"),
    "resume_from_checkpoint",
)
"""Fields of TRL's configs that the command sets."""

_OURS = ("resume", "overwrite", "dry_run")
"""Options that are no part of a run's record."""

_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "trainable_token_indices")


def _option(default: Any, text: str, **more: Any) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=list, metadata={"help": text, **more})
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass
class Data:
    """What is trained on, and where a run begins."""

    data: list[str] = _option(
        [],
        "Training data: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt; or packed, .gz), a "
        "pattern such as 'train*.jsonl', or a hub data set; or several.",
        action="extend",
    )
    dataset_config: str | None = _option(None, "Configuration of the hub data set.")
    dataset_train_split: str = _option("train", "Split of the hub data set to train on.")
    dataset_test_split: str | None = _option(None, "Split of the hub data set to hold out.")
    eval_data: list[str] | None = _option(
        None, "Held-out data, in the forms that --data takes.", action="extend"
    )
    test_split: float | None = _option(
        None, "Share of the data to hold out at random, in place of --eval-data."
    )
    prompt_field: str = _option(
        "prompt",
        "Name of the prompt's field. With several names, separated by commas, the fields are "
        "joined by an empty line.",
    )
    completion_field: str = _option("completion", "Name of the completion's field.")
    template: bool = _option(
        True, "Use the model's chat template, if it has one, for prompts and answers that are text."
    )
    init_adapter: str | None = _option(
        None,
        "Directory of an adapter, or of a LoRA that PEFT wrote, to train further. It sets method, "
        "rank and layers, so omit those options. With --k a LoRA goes on as a RaSA.",
    )
    resume: bool = _option(
        False,
        "Continue from the newest whole checkpoint in --output. All other options must be those of "
        "that run.",
    )
    overwrite: bool = _option(
        False, "Replace an earlier run's checkpoints and adapter; other files in --output stay."
    )
    dry_run: bool = _option(
        False,
        "Read the data, print the first row, the adapter's layers and the memory that the run "
        "needs, and stop before weights are loaded.",
    )


@dataclasses.dataclass
class Rewards:
    """What rates the model's answers."""

    reward_funcs: list[str] | None = _option(
        None,
        "Reward functions: names of TRL's, such as accuracy_reward, or MODULE.FUNCTION of Python.",
        action="extend",
    )
    reward_model_name_or_path: str | None = _option(None, "A reward model.")


@dataclasses.dataclass
class BaseOptions:
    """The base model."""

    model_name_or_path: str = _option(
        "", "Hub id, local directory or .gguf file; or smollm2, the demo's model."
    )
    model_revision: str = _option("main", "Revision of the base on the hub.")
    dtype: str = _option(
        "auto",
        "Dtype of the frozen base: float32, bfloat16, float16 (GPU), or auto (the stored dtype).",
    )
    attn_implementation: str | None = _option(None, "Attention of the base, as transformers' name.")
    load_in_4bit: bool = _option(False, "Quantize the frozen base to NF4, with bitsandbytes.")
    load_in_8bit: bool = _option(False, "Quantize the frozen base to 8 bits, with bitsandbytes.")
    use_peft: bool = _option(True, "Nothing: an adapter is always trained.")


@dataclasses.dataclass
class Options:
    """The options of one run."""

    task: str
    data: Data
    training: Any
    """TRL's config."""
    base: BaseOptions
    rewards: Rewards
    adapter: dict[str, Any]
    """Fields of the method's config, and ``method``, as they were given."""
    values: dict[str, Any]
    """All options, by their shorter name."""
    given: dict[str, Any]
    """Those that differ from the defaults."""
    launcher: list[str]
    """Options of ``accelerate launch``."""

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.training.output_dir)

    @property
    def record(self) -> Path:
        """The file with the run's options."""
        return self.output / "options.yaml"

    @property
    def evaluates(self) -> bool:
        """Whether there is held-out data."""
        data = self.data
        return bool(data.eval_data or data.test_split or data.dataset_test_split)

    def config(self) -> Any:
        """Return the new adapter's config. Raises ValueError if a field is invalid."""
        from rasa_ext import methods

        given = dict(self.adapter)
        method = methods.method_named(given.pop("method", "rasa"))
        if method.loop:
            why = f"is not trained by an optimizer alone; use your own loop with {method.loop}"
            raise ValueError(f"method: the method {method.method!r} {why}.")
        fields = {field.name: field for field in dataclasses.fields(method)}
        if "rank_pattern" in given:
            given["rank_pattern"] = _rank_pattern(given["rank_pattern"])
        if method is methods.RasaConfig:
            given.setdefault("k", None)  # the paper's rule
        if getattr(method, "alpha", None) is not None:
            given.setdefault("alpha", 8.0)
        for name in ("template", "seed"):
            if name in fields:
                given[name] = getattr(self.data if name == "template" else self.training, name)
        return method(**given)


class _Parser(argparse.ArgumentParser):
    """A parser that raises ValueError, with the option as it was typed."""

    words: Sequence[str] = ()
    method = ""

    def error(self, message: str) -> typing.NoReturn:
        """Raise ValueError for a value of the wrong kind, or for one that is missing."""
        names, _, what = message.removeprefix("argument ").partition(": ")
        typed = [name for name in names.split("/") if name in self.words]
        name = (typed or names.split("/"))[0]
        if names == "unrecognized arguments":
            raise ValueError(f"unexpected {what!r}; quote texts with blanks.")
        if wrong := re.fullmatch(r"invalid (\w+) value: (.*)", what):
            what = f"expected {_KINDS.get(wrong[1], wrong[1])}, got {wrong[2]}"
        elif wrong := re.match(r"invalid choice: (.*) \(choose from (.*)\)", what):
            what = f"expected one of {wrong[2]}, got {wrong[1]}"
        elif wrong := re.match(r"Truthy value expected: got (.*) but", what):
            what = f"expected true or false, got {wrong[1]!r}"
        raise ValueError(f"{name}: {what or 'not understood'}.")


_KINDS = {"int": "an integer", "float": "a number", "string_to_bool": "true or false"}


def make_parser(task: str, method: str = "rasa") -> Any:
    """Return the parser of a task's options, with the fields of a method's config."""
    trl: Any = importlib.import_module("trl")
    parsing: Any = importlib.import_module("transformers.hf_argparser")
    kinds = [getattr(trl, f"{TASKS[task].kind}Config"), Data, BaseOptions, _adapter_fields(method)]
    kinds += [Rewards] if task in ("grpo", "rloo") else []
    made = type("Parser", (_Parser, parsing.HfArgumentParser), {})
    parser = made(kinds, prog=f"rasa-ext {task}", allow_abbrev=False, add_help=False)
    parser.method = method
    parser.set_defaults(**_DEFAULTS, learning_rate=TASKS[task].lr)
    parser.set_defaults(dataloader_pin_memory=_has_accelerator())
    known = {action.dest: action for action in parser._actions}
    for action in parser._actions:
        if action.type is parsing.string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True  # a name alone means true
    for name, others in SHORT.items():
        if (action := known.get(name)) is not None:
            _rename(parser, action, others)
    _rename(parser, known["output_dir"], (), "-o")
    return parser


def _rename(parser: Any, action: Any, names: Sequence[str], *short: str) -> None:
    for name in (*(f"--{name}" for each in names for name in _spellings(each)), *short):
        action.option_strings.append(name)
        parser._option_string_actions[name] = action


def _spellings(name: str) -> set[str]:
    return {name, name.replace("_", "-")}


def _adapter_fields(method: str) -> type:
    """Return a dataclass of the fields of a method's config that a command line can express."""
    from rasa_ext import methods

    config = methods.method_named(method)
    hints = typing.get_type_hints(config)
    fields: list[Any] = []
    for field in dataclasses.fields(config):
        kind: Any = hints[field.name]
        if field.name in _LISTS:
            kind = list[int] if field.name == "trainable_token_indices" else list[str]
        elif field.name in ("rank_pattern", "adapter_dtype"):
            kind = str
        elif not set(typing.get_args(kind) or (kind,)) <= {int, float, str, bool, type(None)}:
            continue
        if field.name not in ("template", "seed"):
            text = field.metadata.get("help", "").replace("%", "%%")
            given = dataclasses.field(default=None, metadata={"help": text})
            fields.append((field.name, kind | None, given))
    text = "The adapter's method: rasa, lora, or another of rasa_ext.methods or of a package."
    fields.append(("method", str, dataclasses.field(default=method, metadata={"help": text})))
    return dataclasses.make_dataclass("Adapter", fields)


def parse(task: str, words: Sequence[str]) -> Options:
    """Parse a task's options, from a command line and the YAML file that it names.

    Raises ValueError, naming the option, the expected and the actual value.
    """
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    before, words = first.parse_known_args(words)
    file = before.config
    settings = _read(file) if file else {}
    first.add_argument("--method", default=str(settings.get("method", "rasa")))
    method = first.parse_known_args(words)[0].method
    parser = make_parser(task, method)
    known = parser._option_string_actions
    mixture = settings.pop("datasets", None)
    over = {known[name].dest for word in words if (name := word.partition("=")[0]) in known}
    of_file = list(_words_of(settings, known, over, f"{file}: "))
    parser.words = words
    for each in (of_file, words):
        _check_once(each, known)
    of_file, launcher = _apart(of_file, parser, f"{file}: ")
    of_line, more = _apart(words, parser, "")
    values, defaults = (vars(parser.parse_args(each)) for each in ([*of_file, *of_line], []))
    defaults["method"] = "rasa"
    given = {name: value for name, value in values.items() if value != defaults[name]}
    if mixture is not None:
        given["datasets"] = values["datasets"] = mixture
    return _options(parser, task, values, given, [*launcher, *more])


def _options(
    parser: Any, task: str, values: dict[str, Any], given: dict[str, Any], launcher: list[str]
) -> Options:
    config, data, base, adapter, *rewards = (
        {field.name: values[field.name] for field in dataclasses.fields(kind) if field.init}
        for kind in parser.dataclass_types
    )
    of_data = Data(**data)
    if mixture := values.get("datasets"):
        of_data.data = list(mixture)
    _check(task, of_data, BaseOptions(**base), values)
    of_adapter = {name: value for name, value in adapter.items() if value is not None}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if name in of_adapter:
            of_adapter[name] = parse_targets(",".join(of_adapter[name]), name)
    made = Options(
        task,
        of_data,
        None,
        BaseOptions(**base),
        Rewards(*(rewards or [{}])[0].values()),
        of_adapter,
        _shortened(values),
        _shortened(given),
        launcher,
    )
    _schedule(made, config)
    if task == "sft":
        config["include_num_input_tokens_seen"] = "non_padding"
    try:
        made.training = parser.dataclass_types[0](**config)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(str(error).partition("\n")[0]) from error
    integrations: Any = importlib.import_module("transformers.integrations")
    available = integrations.get_available_reporting_integrations()
    if missing := set(made.training.report_to) - {*available, "none"}:
        there, lacking = ", ".join(available) or "none is", ", ".join(missing)
        raise ValueError(f"report_to: {there} installed, pip install {lacking}.")
    if (rate := made.training.learning_rate) < TASKS[task].lr / 10:
        usual = f"an adapter for {task} usually learns at about {TASKS[task].lr:g}"
        warnings.warn(f"lr: {rate:g} is a rate for whole models; {usual}.", stacklevel=2)
    if made.training.n_gpu > 1:
        made.training._n_gpu = 1  # with more, DataParallel would copy the model in every step
    if made.data.init_adapter is None:
        made.config()
    elif names := [name for name in adapter if name != "k" and name in given]:
        got = given[names[0]]
        raise ValueError(f"{names[0]}: expected none, as init_adapter has its own, got {got!r}.")
    return made


def _shortened(values: Mapping[str, Any]) -> dict[str, Any]:
    return {short(name): value for name, value in values.items() if name not in _OURS}


def _check(task: str, data: Data, base: BaseOptions, values: Mapping[str, Any]) -> None:
    """Check what TRL does not, and what it would check late."""
    from rasa_ext.commands.data import files_of
    from rasa_ext.commands.paths import SMOLLM2, check_adapter, check_model

    if not base.model_name_or_path:
        raise ValueError("--model: expected a model, got none.")
    if not data.data:
        raise ValueError(f"--data: expected rows with {TASKS[task].rows}, got no data.")
    if not base.use_peft:
        raise ValueError("use_peft: expected true, since an adapter is trained.")
    for name in ("data", "eval_data"):
        if "datasets" not in values and getattr(data, name):
            files_of(getattr(data, name), name)
    if base.model_name_or_path != SMOLLM2:
        check_model(base.model_name_or_path)
    if data.init_adapter is not None:
        check_adapter(Path(data.init_adapter), "init_adapter")
    for name in ("learning_rate", "num_train_epochs", "eval_steps", "save_steps"):
        if values[name] is not None and not 0 < values[name] < float("inf"):
            raise ValueError(f"{short(name)}: expected a number above 0, got {values[name]}.")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        check_least(**{short(name): (values[name], 1)})
    check_least(seq_len=(values.get("max_length"), 2), weight_decay=(values["weight_decay"], 0))
    if name := next((name for name in _SET if values.get(name) not in (None, False, "text")), ""):
        raise ValueError(f"{name}: expected none, since the command sets it.")
    torch: Any = importlib.import_module("torch")
    if values.get("activation_offloading") and not torch.cuda.is_available():
        raise ValueError("activation_offloading: expected a GPU, got none.")
    if values["max_steps"] == 0:
        raise ValueError("max_steps: expected at least 1, got 0.")
    check_dtype(base.dtype)
    check_seed(values["seed"])
    if base.load_in_4bit and base.load_in_8bit:
        raise ValueError("load_in_8bit: expected it without load_in_4bit, got both.")
    if data.test_split is not None and (data.eval_data or not 0 < data.test_split < 1):
        raise ValueError("test_split: expected a share in (0, 1), without eval_data.")
    if "datasets" in values:
        for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
            if (got := getattr(data, name)) != getattr(Data, name):
                raise ValueError(f"{name}: expected none with a mixture, got {got!r}.")
    if data.resume and data.overwrite:
        raise ValueError("overwrite: expected it without resume, which continues a run.")
    if task in ("grpo", "rloo") and not (
        values["reward_funcs"] or values["reward_model_name_or_path"]
    ):
        raise ValueError("reward_funcs: expected a reward function or a reward model, got none.")


def _schedule(options: Options, config: dict[str, Any]) -> None:
    """Set when a run is evaluated, if the options do not say: before and after."""
    if options.evaluates:
        if config["eval_strategy"] == "no":
            config["eval_strategy"] = "steps"
        if config["eval_steps"] is None and config["eval_strategy"] == "steps":
            best = config["load_best_model_at_end"]  # a share below 1; 1 - 1e-9 is the last step
            config["eval_steps"] = config["save_steps"] if best else 1 - 1e-9
        config["eval_on_start"] = not options.data.resume
    elif config["load_best_model_at_end"] or config["eval_steps"] is not None:
        name = "eval_steps" if config["eval_steps"] is not None else "load_best_model_at_end"
        raise ValueError(f"{name}: expected eval_data or test_split with it, got none.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _has_accelerator():
        config |= {"use_cpu": True, "ddp_backend": "gloo"}  # or each process would train alone


def _has_accelerator() -> bool:
    torch: Any = importlib.import_module("torch")
    return bool(torch.accelerator.is_available())


def _read(path: str) -> dict[str, Any]:
    """Read a YAML file of options; set the variables under ``env``, as TRL does."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config: {path}: {str(error.strerror).lower()}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"{path}: expected YAML, but it does not parse: {line}") from None
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise ValueError(f"{path}: expected option names with values, got {kind}.")
    variables = data.pop("env", None) or {}
    if not isinstance(variables, dict):
        raise ValueError(f"{path}: env: expected names with values, got {variables!r}.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return {str(name).replace("-", "_"): value for name, value in data.items()}


def _words_of(
    settings: Mapping[str, Any], known: Mapping[str, Any], over: set[str], where: str
) -> Iterator[str]:
    """Yield a file's settings as words of a command line, without those that it overrides."""
    for name, value in settings.items():
        action = known.get(f"--{name}")
        if value is None or (action is not None and action.dest in over):
            continue
        if isinstance(value, list):
            if action is not None and action.nargs != "+":
                raise ValueError(f"{where}expected one value for {name!r}, got {value}.")
            yield from (f"--{name}", *map(str, value))
        elif isinstance(value, dict):
            yield f"--{name}={json.dumps(value)}"
        else:
            yield f"--{name}={value}"


def _check_once(words: Sequence[str], known: Mapping[str, Any]) -> None:
    """Raise ValueError if an option comes twice that takes the last value only."""
    seen = set()
    for word in words:
        action = known.get(word.partition("=")[0])
        if action is None or type(action).__name__ == "_ExtendAction":
            continue
        if action.dest in seen:
            raise ValueError(f"{word.partition('=')[0]}: expected this option once.")
        seen.add(action.dest)


def _apart(words: Sequence[str], parser: Any, where: str) -> tuple[list[str], list[str]]:
    """Return a task's words and those of ``accelerate launch``; refuse unknown names."""
    known: dict[str, Any] = parser._option_string_actions
    ours: list[str] = []
    theirs: list[str] = []
    into = ours
    for word in words:
        name = word.partition("=")[0]
        if re.fullmatch(r"--?[a-zA-Z][\w-]*", name):
            if name in known:
                into = ours
            elif name.replace("-", "_") == "__accelerate_config" or name in _of_accelerate():
                into = theirs
            else:
                if (field := _field_of(name)) in _fields_of_methods():
                    why = f"expected none with the method {parser.method!r}"
                    raise ValueError(f"{where}{field}: {why}.")
                plain = name.lstrip("-")
                near = difflib.get_close_matches(f"--{_field_of(name)}", _names_of(known), 1, 0.75)
                hint = f"; did you mean {near[0]}?" if near else "."
                what = f"unknown key {plain!r}" if where else f"unknown option {name}"
                raise ValueError(f"{where}{what}{hint}")
        elif into is ours and not ours:
            raise ValueError(f"expected an option, got {word!r}.")
        into.append(word)
    return ours, theirs


def _field_of(word: str) -> str:
    """Return the field that an option's name stands for."""
    name = word.lstrip("-").replace("-", "_")
    return next((field for field, names in SHORT.items() if name in names), name)


def _fields_of_methods() -> set[str]:
    from rasa_ext import methods

    every = methods.every_method().values()
    return {field.name for method in every for field in dataclasses.fields(method)}


def _names_of(known: Mapping[str, Any]) -> list[str]:
    return [name for name in known if name.startswith("--") and "-" not in name[2:]]


def _of_accelerate() -> set[str]:
    launch: Any = importlib.import_module("accelerate.commands.launch")
    found = launch.launch_command_parser()._option_string_actions
    return {name for name in found if name.startswith("--") and name != "--module"}


def _rank_pattern(file: str) -> Any:
    """Read ranks from a file, at the top level or under ``rank_pattern``."""
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"rank_pattern: the file {file} does not exist.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"rank_pattern: {file} is no JSON or YAML: {error}") from None
    return data.get("rank_pattern", data) if isinstance(data, dict) else data


HELP = {
    "Model and data": {
        "--model": "Base model: hub id, directory or .gguf file; or smollm2.",
        "--data": "Files, patterns of files, or a hub data set, with {rows}.",
        "--eval-data": "Held-out data, in the same forms.",
        "--test-split": "Or a share of the data to hold out.",
        "--output": "Folder of the run. [default: rasa-out]",
    },
    "Adapter": {
        "--rank": "LoRA rank r per layer. [default: 8]",
        "--k": "Ranks per layer that go to the shared pool. [default: rank // 8, at least 1]",
        "--alpha": "LoRA's scale times the rank. [default: rank]",
        "--target-modules": "Name suffixes, or regex:EXPRESSION. [default: all-linear]",
        "--method": "rasa, lora, or another method. [default: rasa]",
        "--init-adapter": "Adapter, or LoRA of PEFT, to train further.",
    },
    "Training": {
        "--lr": "Peak learning rate. [default: {lr}]",
        "--epochs": "Passes over the data. [default: 1]",
        "--max-steps": "Optimizer steps, in place of epochs.",
        "--batch-size": "Examples per device and forward pass. [default: 8]",
        "--grad-accum": "Forward passes per optimizer step. [default: 1]",
        "--seed": "Seed of the adapter, the order of the data, and dropout. [default: 0]",
    },
    "Run": {
        "--config": "YAML file with any of these options; the command line overrides it.",
        "--dry-run": "Print rows, layers and memory without loading weights.",
        "--resume": "Continue from the newest checkpoint in --output.",
        "--num-processes": "Processes, or other options of `accelerate launch`.",
    },
}
"""The options that matter, by group; ``--help-all`` prints every one."""


def help_of(task: str) -> dict[str, dict[str, str]]:
    """Return what ``HELP`` says of a task, by group and option."""
    kind = TASKS[task]
    found = {
        group: {name: text.format(rows=kind.rows, lr=f"{kind.lr:g}") for name, text in rows.items()}
        for group, rows in HELP.items()
    }
    if task in ("grpo", "rloo"):
        text = "Functions: MODULE.FUNCTION, or one of TRL's names."
        found["Model and data"]["--reward-funcs"] = text
    return found


def short_help(task: str) -> str:
    """Return the help of a task with the options that matter, without an import of TRL."""
    lines = [f"Usage: rasa-ext {task} [OPTIONS]", "", f"  {TASKS[task].about}"]
    for group, rows in help_of(task).items():
        lines += ["", f"{group}:", *(f"  {name:17}{text}" for name, text in rows.items())]
    more = "  --help-all lists every option of TRL's trainer, the model and the data."
    return "\n".join([*lines, "", more])
