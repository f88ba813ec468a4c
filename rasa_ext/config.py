"""RasaConfig: what an adapter is, checked once, and its form in ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

ALL_LINEAR = "all-linear"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class RasaConfig:
    """The choices of one RaSA adapter. Each field's ``metadata["help"]`` says what it does.

    Raises TypeError or ValueError, naming the field, what was expected and what came.
    """

    rank: int = _field(
        8, "Ranks r that every layer pays for. Trainable numbers grow with it as in LoRA."
    )
    k: int | None = _field(
        1,
        "How many of the r ranks every layer gives to its group's shared pool, 0 <= k <= rank; 0 "
        "is plain LoRA, None max(rank // 8, 1). The effective rank is r - k + L*k for L layers.",
    )
    alpha: float = _field(
        8.0,
        "Sets the initial diagonal: alpha/2/(r-k) on the private and alpha/2/(L*k) on the pooled "
        "ranks. The diagonal is trained, so alpha acts at the start only.",
    )
    dropout: float = _field(0.0, "Dropout on the adapter's input in training, in [0, 1).")
    target_modules: str | tuple[str, ...] = _field(
        ALL_LINEAR,
        "'all-linear' (every linear layer but output heads), a sequence of name suffixes, or a "
        "string: a regular expression that matches whole module names.",
    )
    exclude_modules: str | tuple[str, ...] = _field(
        (), "Layers to leave out of the targets: name suffixes, or a regular expression."
    )
    modules_to_save: tuple[str, ...] = _field(
        (), "Name suffixes of modules that are trained in full and saved with the adapter."
    )
    adapter_dtype: torch.dtype = _field(
        torch.float32,
        "Dtype of the trained numbers. Computation casts them to the activations' dtype; bfloat16 "
        "here saves memory but rounds away small optimiser steps.",
    )

    def __post_init__(self) -> None:
        """Check every field and bring it into its canonical form."""
        rank = _integer("rank", self.rank)
        if rank < 1:
            raise ValueError(f"rank: expected an integer >= 1, got {rank}.")
        k = max(rank // 8, 1) if self.k is None else _integer("k", self.k)
        if not 0 <= k <= rank:
            raise ValueError(f"k: expected 0 <= k <= rank (rank is {rank}), got {k}.")
        alpha = _number("alpha", self.alpha)
        if not math.isfinite(alpha) or alpha == 0:
            raise ValueError(f"alpha: expected a finite number other than 0, got {alpha}.")
        dropout = _number("dropout", self.dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}.")
        targets = _names("target_modules", self.target_modules, regex=True)
        if not targets:
            raise ValueError(
                "target_modules: expected 'all-linear', a sequence of name suffixes or a regular "
                f"expression, got an empty {type(self.target_modules).__name__}."
            )
        saved = self.modules_to_save
        saved = _names("modules_to_save", (saved,) if isinstance(saved, str) else saved)
        canonical = {
            "rank": rank,
            "k": k,
            "alpha": alpha,
            "dropout": dropout,
            "target_modules": targets,
            "exclude_modules": _names("exclude_modules", self.exclude_modules, regex=True),
            "modules_to_save": saved,
            "adapter_dtype": _dtype("adapter_dtype", self.adapter_dtype),
        }
        for name, value in canonical.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values under the names of the published RaSA code."""
        return {
            "peft_type": "RASA",
            "r": self.rank,
            "rasa_k": self.k,
            "rasa_alpha": self.alpha,
            "rasa_dropout": self.dropout,
            "target_modules": _listed(self.target_modules),
            "exclude_modules": _listed(self.exclude_modules) or None,
            "modules_to_save": _listed(self.modules_to_save) or None,
            "bias": "none",
            "adapter_dtype": str(self.adapter_dtype).removeprefix("torch."),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RasaConfig:
        """Read what ``to_dict``, or the published code, wrote.

        Raises ValueError where the file is not a RaSA adapter's or asks for a trained bias.
        """
        kind = data.get("peft_type")
        if kind != "RASA":
            raise ValueError(f"adapter_config.json: expected peft_type 'RASA', got {kind!r}.")
        if data.get("bias", "none") != "none":
            raise ValueError(
                f"adapter_config.json: expected bias 'none', got {data['bias']!r}; trained biases "
                "are not supported, name their modules in modules_to_save instead."
            )
        if data.get("layers_to_transform") is not None:
            raise ValueError(
                "adapter_config.json: layers_to_transform is not supported; name the layers in "
                "target_modules as a regular expression instead."
            )
        missing = [key for key in ("r", "rasa_k", "target_modules") if data.get(key) is None]
        if missing:
            raise ValueError(f"adapter_config.json: {', '.join(missing)} missing.")
        return cls(
            rank=data["r"],
            k=data["rasa_k"],
            alpha=data.get("rasa_alpha", 8.0),
            dropout=data.get("rasa_dropout", 0.0),
            target_modules=data["target_modules"],
            exclude_modules=data.get("exclude_modules") or (),
            modules_to_save=data.get("modules_to_save") or (),
            adapter_dtype=data.get("adapter_dtype", torch.float32),
        )

    def initial_diagonal(self, layers: int) -> torch.Tensor:
        """d of a layer in a group of ``layers``: (r-k+L*k,) float32, private entries first."""
        own, pooled = self.rank - self.k, layers * self.k
        share = self.alpha if 0 in (own, pooled) else self.alpha / 2
        values = [share / n for n in (own, pooled) for _ in range(n)]
        return torch.tensor(values, dtype=torch.float32)

    def differences(self, other: RasaConfig) -> list[str]:
        """The fields in which two configs differ, as ``name: mine, theirs``."""
        return [
            f"{field.name}: {getattr(self, field.name)!r}, {getattr(other, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


RasaConfig.__doc__ = f"{RasaConfig.__doc__}\n    Fields:\n" + "".join(
    f"        {field.name}: {field.metadata['help']}\n" for field in dataclasses.fields(RasaConfig)
)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__}).")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__}).")
    return float(value)


def _names(name: str, value: Any, regex: bool = False) -> str | tuple[str, ...]:
    if isinstance(value, str) and regex:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{name}: expected a regular expression, got {value!r} ({error})."
            ) from None
        return value
    kinds = "a string or a sequence of strings" if regex else "a sequence of strings"
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise TypeError(f"{name}: expected {kinds}, got {value!r} ({type(value).__name__}).")
    value = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    for item in value:
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name}: expected {kinds}, got the item {item!r}.")
    return value


def _dtype(name: str, value: Any) -> torch.dtype:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {value!r} ({type(value).__name__}).")
    if dtype not in _DTYPES:
        raise ValueError(
            f"{name}: expected one of {', '.join(str(d) for d in _DTYPES)}, got {dtype}."
        )
    return dtype


def _listed(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)
