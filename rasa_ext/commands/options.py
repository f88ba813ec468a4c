"""FinetuneOptions: every option of a fine-tuning run, declared once.

The command line, the help, the YAML file of ``--config`` and a run's record are made from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rasa_ext.commands.data import files_of
from rasa_ext.commands.output import console
from rasa_ext.commands.parsing import (
    check_differs,
    check_dtype,
    check_least,
    check_seed,
    parse_targets,
    parse_yaml,
)
from rasa_ext.commands.paths import SMOLLM2, check_adapter, check_model
from rasa_ext.writing import created

if TYPE_CHECKING:
    from rasa_ext.methods import AdapterConfig

RECORD = "finetune.yaml"  # the file in the output directory with the options of the run

# The options of a new adapter. With init_adapter they are read from adapter_config.json instead.
OF_AN_ADAPTER = (
    *("method", "rank", "rank_pattern", "experts", "alpha", "method_options", "dropout"),
    *("target_modules", "exclude_modules", "modules_to_save"),
)

# Names of options in transformers, PEFT and TRL, and our name for each.
OTHER_NAMES = {
    "model_name_or_path": "model",
    "output_dir": "output",
    "resume_from_checkpoint": "resume",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "learning_rate": "lr",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "activation_checkpointing": "gradient_checkpointing",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "torch_dtype": "dtype",
    "bf16": "dtype",
    "fp16": "dtype",
}

SAME = (
    *("model_name_or_path", "output_dir", "resume_from_checkpoint", "learning_rate"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "max_length",
)
"""Those that mean the same, which are taken for ours; for others, errors suggest ours."""


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Options of a fine-tuning run. The help on the command line is this text.

    Args:
        model: Hub id, local directory or .gguf file; or smollm2, the demo's model.
        data: Training data: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt; or packed, .gz), a
            pattern such as 'train*.jsonl', or a hub data set; repeat the option for several. Rows
            have prompt and completion, messages, conversations in ShareGPT's format, or text.
        output: Directory for the adapter.
        prompt_field: Name of the prompt's field in the data. With several names, separated by
            commas, the fields are joined by an empty line.
        completion_field: Name of the completion's field in the data.
        template: Format prompt and completion with the model's chat template, if it has one, as
            one user turn and one assistant turn. Otherwise the text is
            <prompt><completion><EOS>, so a space or line break between the two must be in the
            data.
        init_adapter: Directory of an adapter, or of a LoRA that PEFT wrote, to train further.
            It sets method, rank and layers, so omit those options. A tokenizer saved with it
            replaces the model's. With --k a LoRA goes on as a RaSA, from the same function.
        method: The adapter's method: rasa, lora, or another method of rasa_ext.methods or of an
            installed package.
        rank: LoRA rank r per layer.
        k: Ranks per layer that go to the shared pool, if the method has one. [default:
            rank // 8, at least 1, under rasa; else the method's own]
        rank_pattern: JSON or YAML file with the ranks of some layers by name pattern, for
            example one that `rasa-ext ranks` wrote, a command of `pip install ./research`.
        experts: Also adapt the stacked experts of a mixture of experts. Under rasa: slot, layer
            or shared, which sets the experts that share a pool. Under lora: own.
        alpha: LoRA's scale times the rank; under rasa, where the diagonal starts.
            [default: rank under rasa, or 8 with start: paper; 8 under other methods]
        method_options: Other fields of the method's config, as YAML:
            'trainable_token_indices: [5, 9]', or 'rslora: true, train_A: false' under lora.
        dropout: Dropout on the adapter's input, in [0, 1).
        target_modules: Layers to adapt: all-linear, name suffixes separated by commas, or
            regex: followed by a regular expression.
        exclude_modules: Layers to exclude from the targets: name suffixes separated by commas,
            or regex: followed by a regular expression.
        modules_to_save: Modules trained in full and saved with the adapter: name suffixes
            separated by commas, such as norm.
        lr: Peak learning rate. Small models need a higher one, up to 3e-3.
        lr_scheduler_type: How the rate falls after the warm-up: linear, cosine, constant, or
            another schedule of transformers.
        warmup: Share of the steps over which the rate rises to --lr.
        weight_decay: Weight decay of all trained parameters.
        max_steps: Number of optimizer steps; overrides --epochs.
        epochs: Passes over the data.
        batch_size: Examples per device and forward pass.
        grad_accum: Forward passes per optimizer step.
        seq_len: Maximum length of an example in tokens; the rest is cut off.
        packing: Join examples into rows of up to --seq-len tokens, without padding. Examples
            in a row do not attend to each other. A batch then has --batch-size such rows.
            Plain texts above --seq-len are split; other examples are cut.
        dtype: Dtype of the frozen base: float32, bfloat16, float16 (GPU), or auto (the stored
            dtype).
        load_in_4bit: Quantize the frozen base to NF4, with bitsandbytes.
        load_in_8bit: Quantize the frozen base to 8 bits, with bitsandbytes.
        gradient_checkpointing: Recompute activations in the backward: less memory, more
            time.
        eval_data: Held-out data, in the forms that --data takes.
        test_split: Share of the data to hold out at random, in place of --eval-data.
        eval_steps: Steps between evaluations; below 1, a share of all steps. [default: before
            and after training]
        save_steps: Steps between checkpoints; below 1, a share of all steps. The last two
            checkpoints are kept.
        seed: Seed of the adapter's initialization, the data order and dropout.
        training_arguments: Other arguments of TRL's SFTConfig, as YAML: 'report_to:
            tensorboard', or 'max_grad_norm: 0.5, optim: lion_32bit'.
        resume: Continue from the newest checkpoint in --output. All options must be those of
            that run, except --gradient-checkpointing, --eval-steps and --save-steps.
        overwrite: Replace an earlier run's checkpoints and adapter in the output directory; other
            files stay.

    Raises:
        ValueError: an option is invalid; the message names it, with the expected and the actual
            value.
        OSError: init_adapter is no adapter, or the output cannot be written (a ``WriteError``).
    """

    model: str
    data: list[str]
    output: str = "rasa-out"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    template: bool = True
    init_adapter: str | None = None
    method: str = "rasa"
    rank: int = 8
    k: int | None = None
    rank_pattern: str | None = None
    experts: str | None = None
    alpha: float | None = None
    method_options: str = ""
    dropout: float = 0.0
    target_modules: str = "all-linear"
    exclude_modules: str = ""
    modules_to_save: str = ""
    lr: float = 5e-4
    lr_scheduler_type: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    grad_accum: int = 1
    seq_len: int = 1024
    packing: bool = False
    dtype: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    gradient_checkpointing: bool = False
    eval_data: list[str] | None = None
    test_split: float | None = None
    eval_steps: float | None = None
    save_steps: float = 0.1
    seed: int = 0
    training_arguments: str = ""
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check everything that needs neither the model nor the data."""
        for name in ("data", "eval_data"):
            if isinstance(sources := getattr(self, name), str):  # one, from Python
                object.__setattr__(self, name, [sources])
        self._check_paths()
        check_least(
            batch_size=(self.batch_size, 1),
            grad_accum=(self.grad_accum, 1),
            max_steps=(self.max_steps, 1),
            seq_len=(self.seq_len, 2),
            weight_decay=(self.weight_decay, 0),
        )
        for name in ("lr", "epochs", "eval_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a number above 0, got {value}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share in [0, 1), got {self.warmup}.")
        check_dtype(self.dtype)
        check_seed(self.seed)
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_8bit: expected it without load_in_4bit, got both.")
        if self.test_split is not None and (self.eval_data or not 0 < self.test_split < 1):
            raise ValueError("test_split: expected a share in (0, 1), without eval_data.")
        if self.eval_steps is not None and not (self.eval_data or self.test_split):
            raise ValueError("eval_steps: expected eval_data or test_split with it, got none.")
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        for name in parse_yaml("training_arguments", self.training_arguments):
            if (ours := OTHER_NAMES.get(name, name)) in fields:
                raise ValueError(f"training_arguments: {name} is set by the option {ours}.")
        if self.init_adapter is None:
            self.adapter()
        elif given := [name for name in OF_AN_ADAPTER if getattr(self, name) != fields[name]]:
            got = getattr(self, given[0])
            raise ValueError(
                f"{given[0]}: expected none, as init_adapter has its own, got {got!r}."
            )

    def _check_paths(self) -> None:
        for option in ("data", "eval_data"):
            if (source := getattr(self, option)) is not None:
                files_of(source, option)
        if self.model != SMOLLM2:
            check_model(self.model)
        if self.init_adapter is not None:
            check_adapter(Path(self.init_adapter), "init_adapter")
        if self.rank_pattern is not None and not Path(self.rank_pattern).is_file():
            raise ValueError(f"rank_pattern: the file {self.rank_pattern} does not exist.")
        self._check_output()

    def adapter(self) -> AdapterConfig:
        """Return the new adapter's config. Raises ValueError if the options are invalid."""
        from rasa_ext import methods  # imports torch, which the help and path checks do not need

        config = methods.method_named(self.method)
        check_loop(config, "method")
        known = {field.name for field in dataclasses.fields(config)}
        given = parse_yaml("method_options", self.method_options)
        options = {
            "k": self.k,
            "experts": self.experts,
            "rank_pattern": _rank_pattern(self.rank_pattern),
            "exclude_modules": _names(self.exclude_modules),
            "modules_to_save": _names(self.modules_to_save),
        }
        given |= {name: value for name, value in options.items() if value is not None}
        for name in given.keys() - known:
            raise ValueError(
                f"{name}: expected none with the method {self.method!r}, got {given[name]!r}."
            )
        names = ("rank", "alpha", "dropout", "seed", "template")
        usual = {name: getattr(self, name) for name in names}
        usual["target_modules"] = parse_targets(self.target_modules)
        if config is methods.RasaConfig:
            usual["k"] = None  # the config then applies the paper's rule
        if self.alpha is None and getattr(config, "alpha", None) is not None:
            usual["alpha"] = 8.0
        return config(**{name: usual[name] for name in usual.keys() & known} | given)

    def _check_output(self) -> None:
        """Raise if this run must not write into the output directory."""
        output = Path(self.output)
        if os.environ.get("RANK", "0") != "0":  # the first process may have written by now
            return
        if self.resume and self.overwrite:
            raise ValueError("overwrite: expected it without resume, which continues a run.")
        trained = any(output.glob("checkpoint-*/trainer_state.json"))
        if trained and not (self.resume or self.overwrite):
            ways = "--resume continues it, --overwrite replaces it"
            raise ValueError(f"output: {output} holds checkpoints of an earlier run; {ways}.")
        sources = filter(None, (self.model, self.init_adapter))
        # A run that overwrites removes an earlier model (`make_room`).
        check_differs(sources, output, overwrite=self.resume or self.overwrite, beside=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by option name, for `finetune.yaml`.

        `resume` and `overwrite` are omitted, and with `init_adapter` the options that it sets.
        """
        left_out = {"resume", "overwrite", *(OF_AN_ADAPTER if self.init_adapter else ())}
        return {n: v for n, v in dataclasses.asdict(self).items() if n not in left_out}


@contextlib.contextmanager
def reserved(options: FinetuneOptions) -> Iterator[None]:
    """Keep other runs out of a run's output folder, by a lock on its record.

    After an error that came before the first step, nothing is left there.
    Raises ValueError if another run has the folder.
    """
    output, mode = Path(options.output), "a" if options.resume or options.overwrite else "x"
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with created(output), contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((output / RECORD).open(mode))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileExistsError, BlockingIOError):
            raise ValueError(f"output: another run writes {output}; choose another.") from None
        try:
            yield
        finally:
            if not (output / RECORD).stat().st_size:
                (output / RECORD).unlink()


def check_loop(config: AdapterConfig | type[AdapterConfig], argument: str) -> None:
    """Raise ValueError if a method needs more than an optimizer."""
    if config.loop:
        why = f"is not trained by an optimizer alone; use your own loop with {config.loop}"
        raise ValueError(f"{argument}: the method {config.method!r} {why}.")


def trained_with_template(name: str | Path) -> bool:
    """Return whether an adapter was trained with the chat template; True for other models."""
    from rasa_ext.checkpoint.files import CONFIG, read_config

    adapter = (Path(name) / CONFIG).is_file()
    return not adapter or bool(read_config(name).get("rasa_template", True))


def note_template(adapter: Path) -> None:
    """Print that an adapter was trained without a chat template."""
    if not trained_with_template(adapter):
        console.print(
            "The adapter was trained without a chat template: send it plain prompts, and pass "
            "--no-template to evaluate and generate."
        )


def _names(text: str) -> str | list[str] | None:
    """Parse suffixes separated by commas, or ``regex:`` and an expression; "" becomes None."""
    if text.startswith("regex:"):
        return text.removeprefix("regex:")
    return [name.strip() for name in text.split(",")] if text else None


def _rank_pattern(file: str | None) -> Any:
    """Read ranks from a file, at the top level or under ``rank_pattern``; the config checks them.

    None returns None.
    """
    if file is None:
        return None
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"rank_pattern: {file} is no JSON or YAML: {error}") from None
    return data.get("rank_pattern", data) if isinstance(data, dict) else data
