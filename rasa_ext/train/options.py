"""FinetuneOptions: every choice of a fine-tuning run, declared once.

The command line, its help, the YAML file of ``--config`` and the record of a run are made from it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rasa_ext import methods

__all__ = ["check_differs", "parse_targets"]

RECORD = "finetune.yaml"
"""The file in the output directory that holds the options of its run."""

DTYPES = ("auto", "float32", "bfloat16", "float16")

# What may be another on a resume: no step depends on it.
_HARMLESS = frozenset({"output", "gradient_checkpointing", "eval_every", "report_to"})


# 1e-3, which YAML 1.1 reads as text: it wants a point.
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


def _required(text: str) -> Any:
    return dataclasses.field(metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Options of `finetune`. Each field's ``metadata["help"]`` is the help of its option.

    Raises ValueError, naming the option, what was expected and what came; for an output that cannot
    be written `WriteError`.
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
    method: str = _option(
        "rasa",
        "The adapter's method: rasa, lora or another that rasa_ext.methods or an installed package "
        "has, by the name in its files.",
    )
    rank: int = _option(8, "LoRA rank r per layer.")
    k: int | None = _option(
        None,
        "How many of them go to the shared pool, under methods that have one. [default: rank // 8, "
        "at least 1, under rasa; else the method's]",
    )
    experts: str | None = _option(
        None,
        "Under rasa: slot, layer or shared adapts the stacked experts of a mixture of experts as "
        "well, and says which of them share a pool; under lora: own.",
    )
    alpha: float = _option(
        8.0,
        "Under rasa the size of the initial diagonal; the paper has 8 and 32. Under the others the "
        "scale times the rank.",
    )
    method_options: str = _option(
        "",
        "Other fields of the method's config, as YAML: 'rslora: true, train_A: false' under lora.",
    )
    dropout: float = _option(0.0, "On the adapter's input, in [0, 1).")
    target_modules: str = _option(
        "all-linear", "all-linear, name suffixes with commas, or regex: and a regular expression."
    )
    trainable_token_indices: str = _option(
        "",
        "Tokens, by index and with commas, whose rows of the embedding are trained as well. "
        "[default: none]",
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
    resume: bool = _option(
        False, "Go on from the newest checkpoint in --output, with the options of its run."
    )
    overwrite: bool = _option(False, "Replace what the output directory holds.")
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
        self._check_output()

    def adapter(self) -> methods.AdapterConfig:
        """The adapter's config. Raises ValueError where its options are no good."""
        config = methods.method_named(self.method)
        if config.loop:
            raise ValueError(
                f"method: expected one that an optimizer trains, got {self.method!r}: train it in "
                f"a loop of yours, by {config.loop}."
            )
        known = {field.name for field in dataclasses.fields(config)}
        given = parse_method_options(self.method_options)
        given |= {n: v for n, v in (("k", self.k), ("experts", self.experts)) if v is not None}
        for name in given.keys() - known:
            raise ValueError(
                f"{name}: expected none with the method {self.method!r}, got {given[name]!r}."
            )
        usual = {
            "rank": self.rank,
            "k": self.k,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "target_modules": parse_targets(self.target_modules),
            "trainable_token_indices": parse_tokens(self.trainable_token_indices),
            "seed": self.seed,
        }
        if self.k is None and config is not methods.RasaConfig:  # whose own default None is not
            del usual["k"]
        return config(**{name: usual[name] for name in usual.keys() & known} | given)

    def _check_output(self) -> None:
        """Raise where the output is no place for this run."""
        from rasa_ext.train.checkpoints import checkpoints_in  # needs torch, as help does not

        output = Path(self.output)
        if self.resume and self.overwrite:
            raise ValueError("overwrite: expected it without resume, which goes on with a run.")
        if not (self.resume or self.overwrite) and checkpoints_in(output):
            raise ValueError(
                f"output: {output} holds checkpoints of an earlier run; pass --resume to continue "
                "it, --overwrite to replace it, or choose another --output."
            )
        check_differs((self.model,), output, overwrite=self.resume or self.overwrite)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the option names, less `resume` and `overwrite`: `finetune.yaml`."""
        values = dataclasses.asdict(self)
        del values["resume"], values["overwrite"]
        return values


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List what differs between the records of two runs, less what no step depends on."""
    return [
        f"{name} ({before.get(name)!r} before, {now[name]!r} now)"
        for name in now
        if name not in _HARMLESS and before.get(name) != now[name]
    ]


def parse_method_options(text: str) -> dict[str, Any]:
    """Parse `--method-options`; ValueError where it is no YAML of names and values."""
    try:
        found = yaml.safe_load(f"{{{text}}}")
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or None in found.values():
        raise ValueError(f"method_options: expected YAML such as 'rslora: true', got {text!r}.")
    numbers = {n: float(v) for n, v in found.items() if _EXPONENT.fullmatch(str(v))}
    return {**found, **numbers}


def parse_tokens(text: str) -> list[int]:
    """Parse `--trainable-token-indices`; ValueError where it is no list of integers."""
    try:
        return [int(index) for index in text.split(",") if index.strip()]
    except ValueError:
        raise ValueError(
            f"trainable_token_indices: expected integers separated by commas, got {text!r}."
        ) from None


def parse_targets(text: str) -> str | list[str]:
    """Parse `--target-modules`: "all-linear"; suffixes with commas; `regex:` and an expression.

    Args:
        text: the option's value.

    Returns:
        The field ``target_modules`` of a config.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> from rasa_ext.train.options import parse_targets
        >>> parse_targets("q_proj, v_proj")
        ['q_proj', 'v_proj']
    """
    if text == "all-linear":
        return text
    if text.startswith("regex:"):
        return text.removeprefix("regex:")  # which the config checks
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(
            "target_modules: expected 'all-linear', names separated by commas, or 'regex:' and a "
            f"regular expression, got {text!r}."
        )
    return names


def check_differs(sources: Iterable[str | Path], output: Path, *, overwrite: bool) -> None:
    """Check that ``output`` can be written, and is none of the folders that it is made from.

    Args:
        sources: what it is made from; names that are no folder may stand among them.
        output: the folder to write.
        overwrite: whether it may hold files.

    Raises:
        ValueError: it is one of the sources, or holds files.
        OSError: it cannot be written (a ``WriteError``).

    Example:
        >>> from pathlib import Path
        >>> from rasa_ext.train.options import check_differs
        >>> check_differs(["checkpoint"], Path("new"), overwrite=False)
    """
    from rasa_ext.checkpoint.writing import check_output  # needs torch, as help does not

    for source in sources:
        if Path(source).resolve() == output.resolve():
            raise ValueError(
                f"output: expected another directory than that of what it is made from, got "
                f"{output}."
            )
    check_output(output, overwrite=overwrite)
