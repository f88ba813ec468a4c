"""FinetuneOptions: every choice of a fine-tuning run, declared once.

The command line, its help, the YAML file of ``--config`` and the record of a run are made from it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rasa_ext import methods

RECORD = "finetune.yaml"
"""The file in the output directory that holds the options of its run."""

METHODS = ("rasa", "lora")
"""Those that need nothing between the steps of an optimizer."""

DTYPES = ("auto", "float32", "bfloat16", "float16")

# What may change on a resume without changing the losses that follow.
_HARMLESS = frozenset({"resume", "report_to", "output"})


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


def _required(text: str) -> Any:
    return dataclasses.field(metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Options of `finetune`. Each field's ``metadata["help"]`` is the help of its option.

    Raises ValueError, naming the option, what was expected and what came.
    """

    model: str = _required("Hub id, local directory, .gguf file, or smollm2: the demo's model.")
    data: str = _required(
        "JSONL file with prompt and completion, or messages, a line; or a hub data set."
    )
    output: str = _option("rasa-out", "Directory for the adapter.")
    prompt_field: str = _option(
        "prompt", "Name of the prompt's field in the data; several are joined by an empty line."
    )
    completion_field: str = _option("completion", "Name of the completion's field in the data.")
    template: bool = _option(
        True,
        "Put prompt and completion through the model's chat template, if it has one, as a turn of "
        "the user and one of the assistant. Without, the text is <prompt><completion><EOS>, joined "
        "as it stands: a space or line break between the two must be in the data.",
    )
    method: str = _option("rasa", f"The adapter's method: {', '.join(METHODS)}.")
    rank: int = _option(8, "LoRA rank r per layer.")
    k: int | None = _option(
        None, "How many of them go to the shared pool, under RaSA. [default: rank // 8, at least 1]"
    )
    alpha: float = _option(
        8.0,
        "Under RaSA the size of the initial diagonal; the paper has 8 and 32. Under LoRA its scale "
        "times the rank.",
    )
    dropout: float = _option(0.0, "On the adapter's input, in [0, 1).")
    target_modules: str = _option(
        "all-linear", "all-linear, name suffixes with commas, or regex: and a regular expression."
    )
    lr: float = _option(5e-4, "Peak learning rate; RaSA likes it higher than LoRA does.")
    warmup: float = _option(
        0.03, "Share of the steps over which the rate rises to --lr; it falls to zero afterwards."
    )
    max_steps: int | None = _option(None, "Optimizer steps; overrides --epochs.")
    epochs: float = _option(1.0, "Passes over the data.")
    batch_size: int = _option(8, "Examples per device and forward pass.")
    grad_accum: int = _option(1, "Forward passes per optimizer step.")
    seq_len: int = _option(1024, "Tokens after which an example is cut.")
    packing: bool = _option(
        False,
        "Join examples into rows of up to --seq-len tokens, without padding; each still sees only "
        "itself. A batch then has --batch-size such rows.",
    )
    dtype: str = _option(
        "auto",
        "Of the frozen base: float32, bfloat16, float16 (GPU), or auto, as it is stored.",
    )
    gradient_checkpointing: bool = _option(
        False, "Recompute activations in the backward: less memory, more time."
    )
    eval_data: str | None = _option(None, "Held-out data, in the form of --data.")
    eval_every: int | None = _option(
        None, "Steps between evaluations. [default: before and after training]"
    )
    seed: int = _option(0, "Of the adapter's start, the order and dropout.")
    resume: bool = _option(False, "Go on from the newest checkpoint in --output.")
    report_to: str = _option(
        "none", "none, or trackers of transformers, such as tensorboard,wandb."
    )

    def __post_init__(self) -> None:
        """Check all that can be checked without the model and the data."""
        for name in ("batch_size", "grad_accum", "max_steps", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}.")
        if self.seq_len < 2:
            raise ValueError(f"seq_len: expected at least 2, got {self.seq_len}.")
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a number above 0, got {value}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share in [0, 1), got {self.warmup}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.eval_every is not None and self.eval_data is None:
            raise ValueError("eval_every: expected eval_data to evaluate on as well, got none.")
        self.adapter()
        check_folder("output", Path(self.output))

    def adapter(self) -> methods.AdapterConfig:
        """The adapter's config. Raises ValueError where its options are no good."""
        common: dict[str, Any] = {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "target_modules": parse_targets(self.target_modules),
        }
        if self.method not in METHODS:
            raise ValueError(
                f"method: expected one of {', '.join(METHODS)}, got {self.method!r}; others take "
                "steps of their own, in a loop of yours: see rasa_ext.training."
            )
        if self.method == "rasa":
            return methods.RasaConfig(k=self.k, **common)
        if self.k is not None:
            raise ValueError(f"k: expected none with the method {self.method!r}, got {self.k}.")
        return methods.LoraConfig(**common)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the option names, for `finetune.yaml`; without `resume`."""
        values = dataclasses.asdict(self)
        del values["resume"]
        return values

    def changes_from(
        self, earlier: Mapping[str, Any], names: Collection[str] | None = None
    ) -> list[str]:
        """List what differs from an earlier run's `to_dict` and makes a resumed run another run.

        ``names`` are the options to look at; by default all that change a run.
        """
        now = self.to_dict()
        return [
            f"{name} ({earlier[name]!r} before, {now[name]!r} now)"
            for name in (now if names is None else names)
            if name not in _HARMLESS and name in earlier and earlier[name] != now[name]
        ]


def parse_targets(text: str) -> str | list[str]:
    """Parse `--target-modules`: "all-linear"; suffixes with commas; `regex:` and an expression.

    Raises ValueError where it is none of these.
    """
    if text == "all-linear":
        return text
    if text.startswith("regex:"):
        expression = text.removeprefix("regex:")
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(
                f"target_modules: expected a regular expression after 'regex:', got "
                f"{expression!r}: {error}."
            ) from None
        return expression
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(
            "target_modules: expected 'all-linear', names separated by commas, or 'regex:' and a "
            f"regular expression, got {text!r}."
        )
    return names


def check_folder(option: str, path: Path) -> None:
    """Raise ValueError, naming the option, where no file could be written into a directory."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{option}: expected a directory, but {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{option}: nothing can be written into {there}; choose another directory or change "
            "its permissions."
        )
