"""FinetuneOptions: every choice of a fine-tuning run, with its default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rasa_ext.train.model_loading import DTYPES

RECORD = "finetune.yaml"
"""The file in the output directory that holds the options of its run."""

# What may change on a resume without changing the losses that follow.
_HARMLESS = frozenset({"resume", "report_to", "output"})


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Options of `finetune`; the names are those of the command's options and of its YAML file.

    The learning rate is the paper's; RaSA likes it higher than LoRA does.

    Raises ValueError, naming the option, what was expected and what came.
    """

    model: str
    data: str
    output: str = "rasa-out"
    rank: int = 8
    k: int | None = None
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    lr: float = 5e-4
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    grad_accum: int = 1
    seq_len: int = 1024
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    eval_data: str | None = None
    eval_every: int | None = None
    seed: int = 0
    resume: bool = False
    report_to: str = "none"

    def __post_init__(self) -> None:
        """Check what the adapter's own config does not."""
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
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.eval_every is not None and self.eval_data is None:
            raise ValueError("eval_every: expected eval_data to evaluate on as well, got none.")

    def targets(self) -> str | list[str]:
        """`target_modules` as `patch_model` takes it.

        "all-linear"; names with commas, which are suffixes; or `regex:` and a regular expression.
        """
        return parse_targets(self.target_modules)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the option names, for `finetune.yaml`; without `resume`."""
        values = dataclasses.asdict(self)
        del values["resume"]
        return values

    def changes_from(self, earlier: Mapping[str, Any]) -> list[str]:
        """List what differs from an earlier run's `to_dict` and makes a resumed run another run."""
        return [
            f"{name} ({earlier[name]!r} before, {value!r} now)"
            for name, value in self.to_dict().items()
            if name not in _HARMLESS and name in earlier and earlier[name] != value
        ]


def parse_targets(text: str) -> str | list[str]:
    """Parse `--target-modules`: see `FinetuneOptions.targets`."""
    if text == "all-linear":
        return text
    if text.startswith("regex:"):
        return text.removeprefix("regex:")
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(
            "target_modules: expected 'all-linear', names separated by commas, or 'regex:' and a "
            f"regular expression, got {text!r}."
        )
    return names
