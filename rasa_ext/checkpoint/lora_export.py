"""Writing a RaSA adapter as a plain LoRA, exactly: lora_A = Ap, lora_B = Bp^T, scale 1, rank R."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.checkpoint.adapter import base_name, saved_tensors, task_type
from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.checkpoint.lora_experts import (
    PEFT,
    Entry,
    Experts,
    chosen_layout,
    entries_of,
    limits_of,
    parameters_of,
    targets_of,
)
from rasa_ext.checkpoint.lora_formats import PEFT_FILES, writer_of
from rasa_ext.checkpoint.lora_tokens import dropped_rows, token_setting
from rasa_ext.checkpoint.lora_truncated import check_rank, truncated
from rasa_ext.nn.rasa import RasaLinear
from rasa_ext.patching.state import (
    adapted_experts,
    adapted_layers,
    owners,
    patch_state,
    unwrap,
)
from rasa_ext.patching.swap import FAST_PATH
from rasa_ext.patching.targets import suffixes
from rasa_ext.patching.tokens import row_tensors


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    pad_to: int | None = None,
    *,
    experts: str | None = None,
    rank: int | None = None,
    format: str = PEFT_FILES,
    allow_dropped: bool = False,
) -> int:
    """Write the adapter as a LoRA that PEFT, vLLM, SGLang, llama.cpp or mlx-lm read.

    Not every reader knows ranks and scales of single layers, so every layer is written at the
    largest effective rank, or at ``pad_to``, filled up with zeros, and with a scale of 1. The
    LoRA's product is this adapter's, in float32: lora_B = [B | B_pool] diag(d), (out, R), and
    lora_A = [A ; A_pool], (R, in), from the definition of dW (arXiv 2503.12576, section 3).

    What some reader refuses is warned of. What one would leave out and serve the rest, another
    function, is refused here: trained norms (llama.cpp), k or v without q, up without gate, and
    trained rows of an embedding (SGLang).

    For adapted experts there is no layout that all read. Written out, each expert has R ranks, its
    pool's included, which may make large files: ``export_size`` tells before anything is written.

    Args:
        model: a patched model.
        directory: made if it is missing; an adapter that is there is replaced.
        pad_to: the rank to write; the largest effective rank if None.
        experts: the layout of adapted experts. "peft" is that of PEFT's ``target_parameters``, for
            PEFT, and vLLM where it keeps a model's experts in three dimensions (gpt-oss);
            "per-expert" names the matrices of every expert as checkpoints do, for vLLM, SGLang and
            llama.cpp; "shared-outer" is SGLang's for experts that share what reads their input and
            what writes their output, and only for ``experts="shared"`` with k = rank. None is
            "peft", with a warning, and leaves models without adapted experts as they are.
        rank: the rank to write, which may be lower: each layer is then the nearest of that rank to
            its dW, and ``export_error`` tells how near. Not beside ``pad_to``.
        format: "peft" for PEFT, vLLM and SGLang, and llama.cpp's converter; "gguf" is what that
            converter writes, ``adapter.gguf``, and needs the package gguf; "mlx" is for mlx-lm.
            The last two hold low-rank pairs alone, of the families of models whose names they are
            checked for.
        allow_dropped: write what some reader leaves out all the same, with a warning; for others,
            such as PEFT.

    Returns:
        The rank that was written; a server's ``max_lora_rank`` must not be below it.

    Raises:
        TypeError, ValueError: the model is not patched, ``pad_to`` is not an integer, or below the
            largest effective rank, or the adapter has no such form as ``experts`` asks for.
        TypeError, ValueError: ``rank`` is no positive integer or comes with ``pad_to`` or adapted
            experts, or ``format`` is none of those or cannot hold the adapter.
        ImportError: ``format`` is "gguf", and the package is missing.
        ValueError: a reader would leave a part of the adapter out.

    Example:
        Two layers: R = 8 - 1 + 2 * 1 = 9.

        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> rasa_ext.export_lora(model, "lora")
        9
        >>> rasa_ext.export_lora(model, "lora", pad_to=16)  # one of the ranks that vLLM takes
        16
        >>> rasa_ext.export_lora(model, "lora", rank=4)  # no longer exact
        4
    """
    state, root = patch_state(model), unwrap(model)
    export = _make_export(model, pad_to, experts, rank)
    if export.experts and format != PEFT_FILES:
        raise ValueError(
            f"format: expected {PEFT_FILES!r} for a model with adapted experts, got {format!r}, "
            "which holds pairs of linear layers alone."
        )
    write = writer_of(format, root, export.names, export.saved)
    if format == PEFT_FILES:
        _warn(model, export, allow_dropped, default=experts is None)
    tensors = {entry.key: entry.make() for entry in export.entries()}
    tensors.update((f"{PREFIX}{key}", tensor) for key, tensor in export.saved.items())
    written = export.rank
    if rank is not None and rank < written:
        tensors, written = truncated(tensors, rank), rank
    layout = export.layout
    targets = suffixes(export.names, root)
    if layout is not None and layout != PEFT:
        targets = list(dict.fromkeys([*targets, *targets_of(export.experts, layout)]))
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        "r": written,
        "lora_alpha": written,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "modules_to_save": list(state.plan.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for _, layer in export.layers),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    if tokens := token_setting(state.plan):
        settings["trainable_token_indices"] = tokens
    if layout == PEFT:
        settings["target_parameters"] = parameters_of(export.experts, root)
    write(directory, settings, tensors)
    return written


def export_size(
    model: nn.Module,
    pad_to: int | None = None,
    *,
    experts: str | None = None,
    rank: int | None = None,
) -> int:
    """Count the bytes of the tensors that ``export_lora`` would write; makes none of them.

    Args:
        model: a patched model.
        pad_to, experts, rank: as in ``export_lora``.

    Returns:
        Bytes; the file has some more, for the tensors' names.

    Raises:
        TypeError, ValueError: as ``export_lora``, for the model and these arguments.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1, target_modules=["down_proj"])
        >>> rasa_ext.export_size(model)  # two layers of 9 * (48 + 32) numbers in float32
        5760
    """
    export = _make_export(model, pad_to, experts, rank)
    if rank is not None and rank < export.rank:
        export = dataclasses.replace(export, rank=rank)
    factors = sum(math.prod(entry.shape) for entry in export.entries())
    return factors * torch.float32.itemsize + sum(t.nbytes for t in export.saved.values())


@dataclasses.dataclass(frozen=True)
class _Export:
    """What a file is to hold."""

    layers: list[tuple[str, RasaLinear]]
    experts: Experts
    layout: str | None
    rank: int
    saved: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        """The names of the adapted linear layers."""
        return [name for name, _ in self.layers]

    def entries(self) -> Iterator[Entry]:
        """List the factors, which are made when asked for."""
        for name, layer in self.layers:
            yield from _linear(name, layer, self.rank)
        for path, experts in self.experts:
            yield from entries_of(path, experts, str(self.layout), self.rank)

    def limits(self, *, default: bool) -> Iterator[str]:
        """Name what some reader does with the experts' layout."""
        if self.layout is not None:
            yield from limits_of(self.experts, self.layout, default=default)


def _make_export(
    model: nn.Module, pad_to: int | None, experts: str | None, chosen: int | None
) -> _Export:
    """Check the arguments and look at the model, in which nothing changes.

    The rank is that of the pairs before they are cut to the ``chosen`` one.
    """
    state, banks = patch_state(model), adapted_experts(model)
    check_rank(model, chosen, pad_to)
    layout = chosen_layout(banks, experts)
    rank = max(owner.effective_rank for _, owner in owners(model))
    if pad_to is not None:
        if isinstance(pad_to, bool) or not isinstance(pad_to, int):
            raise TypeError(f"pad_to: expected an integer or None, got {pad_to!r}.")
        if pad_to < rank:
            raise ValueError(f"pad_to: expected at least the effective rank {rank}, got {pad_to}.")
        rank = pad_to
    saved = {**row_tensors(unwrap(model)), **saved_tensors(unwrap(model), state.plan)}
    return _Export(adapted_layers(model), banks, layout, max(rank, chosen or 0), saved)


def _linear(name: str, layer: RasaLinear, rank: int) -> Iterator[Entry]:
    packed, place = functools.cache(layer.packed_factors), layer.place
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


_INSTEAD = "save what rasa_ext.merge_and_unload(model) returns"


def _warn(model: nn.Module, export: _Export, allow_dropped: bool, *, default: bool) -> None:
    """Warn of what PEFT's files hold that some reader does not take, or raise ValueError."""
    root, plan = unwrap(model), patch_state(model).plan
    dropped = [*_dropped(root, export.names, export.saved), *dropped_rows(root, plan)]
    if dropped and not allow_dropped:
        raise ValueError(
            f"model: expected an adapter that no reader takes in part, but {dropped[0]}; "
            f"{_INSTEAD}, or pass allow_dropped=True (--allow-dropped) to write it for other "
            "readers."
        )
    for message in dropped:
        warnings.warn(f"{message}; for that reader, {_INSTEAD}.", stacklevel=3)
    for message in (*_limits(model, export.layers), *export.limits(default=default)):
        warnings.warn(message, stacklevel=3)


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


def _limits(model: nn.Module, layers: list[tuple[str, RasaLinear]]) -> Iterator[str]:
    """Name what some reader refuses, or reads only if told how, and what to do about it."""
    root, state = unwrap(model), patch_state(model)
    if any(layer.transposed for _, layer in layers):
        yield (
            "the model has Conv1D layers, whose LoRA PEFT reads but vLLM cannot serve; for vLLM, "
            f"{_INSTEAD}."
        )
    if state.plan.modules_to_save:
        yield (
            f"modules_to_save ({', '.join(state.plan.modules_to_save)}) are written for PEFT; vLLM "
            f"refuses them, and llama.cpp those that are no norms; for servers, {_INSTEAD}."
        )
    if alone := _alone("q_proj", "v_proj", root, [name for name, _ in layers]):
        yield (
            f"q_proj is adapted without v_proj in {alone} layers. SGLang computes them together "
            f"and refuses such a LoRA; for SGLang, adapt both, or {_INSTEAD}."
        )
    embeddings = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    tied = [name for name, layer in layers if id(layer.weight) in embeddings]
    if tied:
        yield (
            f"{tied[0]} is tied to the embedding, and llama.cpp refuses its LoRA; for llama.cpp, "
            "leave it out of target_modules, or untie the two and merge."
        )
    if any(name == FAST_PATH and usual for _, name, usual in state.attributes_before):
        yield (
            "the adapted layers are in an nn.TransformerEncoder, whose fast path in eval mode "
            "passes them by: PEFT then computes what the bare base does. After loading the LoRA, "
            f"call torch.backends.mha.set_fastpath_enabled(False), or {_INSTEAD}."
        )


def _alone(part: str, other: str, root: nn.Module, names: list[str]) -> int:
    """How many layers called ``part`` are adapted while ``other`` beside them is not."""
    beside = [n[: -len(part)] + other for n in names if n.endswith(f".{part}")]
    modules = {name for name, _ in root.named_modules()}
    return sum(name in modules and name not in names for name in beside)
