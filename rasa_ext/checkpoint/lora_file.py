"""What the file of an exported LoRA holds, whatever the adapter came from, and what readers take.

Factors are made when they are written, one layer's at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rasa_ext.checkpoint.card import Card
from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.checkpoint.lora_card import lora_card
from rasa_ext.checkpoint.lora_experts import (
    PEFT,
    Entry,
    Experts,
    entries_of,
    limits_of,
    parameters_of,
    taken_for_experts,
    targets_of,
)
from rasa_ext.checkpoint.lora_formats import PEFT_FILES, writer_of
from rasa_ext.checkpoint.lora_names import INSTEAD
from rasa_ext.checkpoint.lora_tokens import dropped_rows, token_setting
from rasa_ext.checkpoint.lora_truncated import truncated
from rasa_ext.methods.base import AdapterConfig, Place
from rasa_ext.ops import Pack
from rasa_ext.patching.targets import suffixes
from rasa_ext.patching.tokens import TokenRows


@dataclasses.dataclass(frozen=True)
class Pair:
    """An adapted linear layer, of which a pair of low rank is written."""

    place: Place
    transposed: bool
    weight: Tensor
    packed: Callable[[], Pack]
    """Makes Ap (R, in) and Bp (R, out) in float32."""


@dataclasses.dataclass(frozen=True)
class Export:
    """What a file is to hold, and what warnings of it depend on."""

    root: nn.Module
    """The model in which the names below lead somewhere."""
    config: AdapterConfig
    pairs: dict[str, Pair]
    rank: int
    saved: dict[str, Tensor]
    """Modules that were trained in full, and trained rows, by the names of their tensors."""
    modules_to_save: tuple[str, ...]
    task_type: str | None
    base: str | None
    experts: Experts = dataclasses.field(default_factory=list)
    layout: str | None = None
    tokens: tuple[TokenRows, ...] = ()
    """The tables of which rows were trained."""
    fast_path: bool = False
    """Whether torch's fast path would pass the adapted layers by, had it not been turned off."""

    @functools.cached_property
    def as_parameters(self) -> list[str]:
        """Linear layers whose weights stand in ``target_parameters``: see ``taken_for_experts``."""
        of_peft = self.layout in (None, PEFT)
        return taken_for_experts(self.pairs, self.root) if of_peft else []

    def entries(self) -> Iterator[Entry]:
        """List the factors, which are made when asked for."""
        for name, pair in self.pairs.items():
            yield from _linear(name, pair, self.rank)
        for path, experts in self.experts:
            yield from entries_of(path, experts, str(self.layout), self.rank)


def write_export(
    export: Export,
    directory: str | os.PathLike[str],
    *,
    rank: int | None = None,
    form: str = PEFT_FILES,
    allow_dropped: bool = False,
    default: bool = False,
    card: Card | None = None,
) -> int:
    """Write the files; give the rank that was written.

    ``default`` says that the layout of experts is nobody's choice. Raises and warns, at the caller
    of the caller, as ``export_lora`` does.
    """
    names = list(export.pairs)
    if export.experts and form != PEFT_FILES:
        raise ValueError(
            f"format: expected {PEFT_FILES!r} for a model with adapted experts, got {form!r}, "
            "which holds pairs of linear layers alone."
        )
    write = writer_of(form, export.root, names, export.saved)
    if form == PEFT_FILES:
        _warn(export, allow_dropped, default=default)
    tensors = {entry.key: entry.make() for entry in export.entries()}
    tensors.update((f"{PREFIX}{key}", tensor) for key, tensor in export.saved.items())
    written = export.rank
    if rank is not None and rank < written:
        tensors, written = truncated(tensors, rank), rank
    targets = suffixes([name for name in names if name not in export.as_parameters], export.root)
    if export.layout is not None and export.layout != PEFT:
        targets = list(dict.fromkeys([*targets, *targets_of(export.experts, export.layout)]))
    settings = plain_settings(
        written,
        task_type=export.task_type,
        base_model_name_or_path=export.base,
        target_modules=targets,
        modules_to_save=list(export.modules_to_save) or None,
        fan_in_fan_out=any(pair.transposed for pair in export.pairs.values()),
    )
    if tokens := token_setting(export.tokens):
        settings["trainable_token_indices"] = tokens
    stacked = export.experts if export.layout == PEFT else []
    if stacked or export.as_parameters:
        settings["target_parameters"] = parameters_of(stacked, export.as_parameters, export.root)
    told = None
    if card is not None:
        exact = written >= export.rank
        told = lora_card(
            export.root,
            settings,
            export.config,
            card,
            format=form,
            experts=export.layout,
            exact=exact,
        )
    write(directory, settings, tensors, told)
    return written


def plain_settings(rank: int, **told: Any) -> dict[str, Any]:
    """Give PEFT's settings of a LoRA of one rank and a scale of 1.

    Args:
        rank: of every layer.
        told: further settings, such as ``target_modules``.

    Returns:
        The content of ``adapter_config.json``.

    Example:
        >>> rasa_ext.checkpoint.plain_settings(8, target_modules=["q_proj"])["lora_alpha"]
        8
    """
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **told,
    }


def _linear(name: str, pair: Pair, rank: int) -> Iterator[Entry]:
    packed, place = functools.cache(pair.packed), pair.place
    yield Entry(
        f"{PREFIX}{name}.lora_A.weight",
        (rank, place.in_features),
        lambda: nn.functional.pad(packed().Ap, (0, 0, 0, rank - packed().Ap.shape[0])),
    )
    yield Entry(
        f"{PREFIX}{name}.lora_B.weight",
        (place.out_features, rank),
        lambda: nn.functional.pad(packed().Bp.t(), (0, rank - packed().Bp.shape[0])),
    )


def _warn(export: Export, allow_dropped: bool, *, default: bool) -> None:
    """Warn of what PEFT's files hold that some reader does not take, or raise ValueError."""
    dropped = [*_dropped(export.root, list(export.pairs), export.saved)]
    dropped += dropped_rows(export.root, export.tokens)
    if dropped and not allow_dropped:
        raise ValueError(
            f"model: expected an adapter that no reader takes in part, but {dropped[0]}; "
            f"{INSTEAD}, or pass allow_dropped=True (--allow-dropped) to write it for other "
            "readers."
        )
    for message in dropped:
        warnings.warn(f"{message}; for that reader, {INSTEAD}.", stacklevel=4)
    limits = [*_limits(export)]
    if export.layout is not None:
        limits += limits_of(export.experts, export.layout, default=default)
    for message in limits:
        warnings.warn(message, stacklevel=4)


def _dropped(root: nn.Module, names: list[str], saved: Mapping[str, Tensor]) -> Iterator[str]:
    """Name what a reader leaves out without an error, and so serves another function."""
    norms = [key for key in saved if "_layernorm" in key or ".norm" in f".{key}"]
    if norms:
        yield (
            f"llama.cpp takes the trained norms of modules_to_save ({', '.join(norms[:3])}"
            f"{', ...' if len(norms) > 3 else ''}) and leaves them out without a word"
        )
    for part, other in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        if alone := _alone(part, other, root, names):
            yield (
                f"{part} is adapted without {other} in {alone} layers, and SGLang, which computes "
                f"them together, leaves {part} out with no more than a line in its log (older "
                "versions refuse it)"
            )
            break


def _limits(export: Export) -> Iterator[str]:
    """Name what some reader refuses, or reads only if told how, and what to do about it."""
    root, pairs = export.root, export.pairs
    if any(pair.transposed for pair in pairs.values()):
        yield (
            "the model has Conv1D layers, whose LoRA PEFT reads but vLLM cannot serve; for vLLM, "
            f"{INSTEAD}."
        )
    if export.modules_to_save:
        yield (
            f"modules_to_save ({', '.join(export.modules_to_save)}) are written for PEFT; vLLM "
            f"refuses them, and llama.cpp those that are no norms; for servers, {INSTEAD}."
        )
    if alone := _alone("q_proj", "v_proj", root, list(pairs)):
        yield (
            f"q_proj is adapted without v_proj in {alone} layers. SGLang computes them together "
            f"and refuses such a LoRA; for SGLang, adapt both, or {INSTEAD}."
        )
    if export.as_parameters and export.layout is None:
        yield (
            f"{export.as_parameters[0]} and {len(export.as_parameters) - 1} more layers stand in "
            "target_parameters, since PEFT takes such names in target_modules for experts; start "
            "SGLang, which reads target_modules alone, with --lora-target-modules all."
        )
    embeddings = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    tied = [name for name, pair in pairs.items() if id(pair.weight) in embeddings]
    if tied:
        yield (
            f"{tied[0]} is tied to the embedding, and llama.cpp refuses its LoRA; for llama.cpp, "
            "leave it out of target_modules, or untie the two and merge."
        )
    if export.fast_path:
        yield (
            "the adapted layers are in an nn.TransformerEncoder, whose fast path in eval mode "
            "passes them by: PEFT then computes what the bare base does. After loading the LoRA, "
            f"call torch.backends.mha.set_fastpath_enabled(False), or {INSTEAD}."
        )


def _alone(part: str, other: str, root: nn.Module, names: list[str]) -> int:
    """How many layers called ``part`` are adapted while ``other`` beside them is not."""
    beside = [n[: -len(part)] + other for n in names if n.endswith(f".{part}")]
    modules = {name for name, _ in root.named_modules()}
    return sum(name in modules and name not in names for name in beside)
