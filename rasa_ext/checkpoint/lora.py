"""Reading a LoRA that PEFT wrote, and converting it to the equal RaSA adapter."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.checkpoint.adapter import own_key, pool_key, saved_tensors
from rasa_ext.checkpoint.files import PREFIX, check_finite, check_tensors, read_adapter
from rasa_ext.checkpoint.loading import AdapterState
from rasa_ext.methods.base import checked_integer, checked_number, fresh_A, fresh_B
from rasa_ext.methods.patterns import check_pattern, matches_end
from rasa_ext.methods.rasa import RasaConfig
from rasa_ext.nn.adapter import LayerSpec
from rasa_ext.patching.patch import plan_layers
from rasa_ext.patching.targets import Plan, matches
from rasa_ext.patching.tokens import ROWS, rows_key

_FACTOR = re.compile(r"^(?P<name>.+)\.lora_(?P<part>[AB])(\.default)?\.weight$")
_MERGE = "merge it with PEFT's merge_and_unload instead"

# Settings that make an adapter different from W + scale * B A.
_VARIANTS = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
)

# Initializations that subtract the first B A from the base's weights.
_MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Lora:
    """A plain LoRA, which changes layer ``name`` by ``scales[name] * B A``."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """(B, A) of shapes (out, r) and (r, in), by the layer's name in the model."""
    scales: dict[str, float]
    saved: dict[str, Tensor]
    """Parameters of modules that were trained in full, by name in the model."""
    rows: dict[str, Tensor]
    """Trained embedding rows, by PEFT's keys without prefix."""
    config: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every layer, by name."""
        return {name: (B.shape[0], A.shape[1]) for name, (B, A) in self.factors.items()}

    @property
    def rank(self) -> int:
        """Largest rank of any layer."""
        return max(A.shape[0] for _, A in self.factors.values())

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all factors."""
        return sum(B.numel() + A.numel() for B, A in self.factors.values())


def read_lora(directory: str | os.PathLike[str]) -> Lora:
    """Read the directory of a LoRA in PEFT's format.

    Args:
        directory: what PEFT's ``save_pretrained`` or ``export_lora`` wrote.

    Returns:
        Factors and scale of each layer, and what else was trained.

    Raises:
        FileNotFoundError, ValueError: a file is missing, unsafe or damaged, or is not a plain LoRA
            of linear layers; the message says what to do.

    Example:
        >>> rasa_ext.export_lora(rasa_ext.patch_model(model, rank=8, k=1), "lora")
        9
        >>> rasa_ext.checkpoint.read_lora("lora").rank
        9
    """
    config, tensors = read_adapter(directory)
    _check_config(config, str(directory))
    parts: dict[str, dict[str, Tensor]] = {}
    saved, rows = {}, {}
    check_finite(tensors, str(directory))
    for key, tensor in tensors.items():
        match = _FACTOR.match(key)
        if match:
            parts.setdefault(match["name"].removeprefix(PREFIX), {})[match["part"]] = tensor
        elif key.endswith(ROWS):
            rows[key.removeprefix(PREFIX)] = tensor
        elif re.search(r"\.(lora_|token_adapter\.)", key):
            raise ValueError(
                f"{directory}: expected lora_A and lora_B of linear layers, got {key}; {_MERGE}."
            )
        elif ".base_layer." not in key:  # the base's own weight, which PEFT writes for heads
            saved[key.removeprefix(PREFIX).replace(".modules_to_save.", ".")] = tensor
    if not parts:
        raise ValueError(f"{directory}: expected lora_A and lora_B of some layers, found none.")
    factors = {name: _factors(name, pair, str(directory)) for name, pair in parts.items()}
    scales = {name: _scale(name, A.shape[0], config) for name, (_, A) in factors.items()}
    return Lora(factors, scales, saved, rows, config)


def _check_config(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        way = f"if PEFT wrote it, {_MERGE}"
        if kind == "RASA":
            way = (
                "this is a RaSA adapter already: read it with rasa_ext.load_adapter(model, "
                "directory), or with the commands merge and export-lora"
            )
        raise ValueError(f"{where}: expected peft_type 'LORA' in the config, got {kind!r}; {way}.")
    if reason := next(_beyond_lora(config), None):
        raise ValueError(f"{where}: expected a plain LoRA, but the config has {reason}; {_MERGE}.")
    for name, kind in (("use_rslora", bool), ("alpha_pattern", dict), ("modules_to_save", list)):
        if not isinstance(value := config.get(name) or kind(), kind):
            raise ValueError(
                f"{where}: expected {name} in the config as PEFT writes it, got {value!r}."
            )
    alphas = {"": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}
    for pattern, alpha in alphas.items():
        check_pattern("alpha_pattern", pattern)
        if not math.isfinite(checked_number("lora_alpha", alpha)):
            raise ValueError(f"{where}: expected a finite lora_alpha, got {alpha}.")


def _beyond_lora(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings that make an adapter more than a LoRA of the base's linear layers."""
    for name in _VARIANTS:
        if config.get(name):
            yield f"{name} {config[name]!r}"
    # target_parameters may name weights of linear layers; stacked weights have other names in PEFT.
    if stacked := [n for n in config.get("target_parameters") or () if n[-7:] != ".weight"]:
        yield f"stacked experts as well ({', '.join(stacked[:3])})"
    if config.get("bias", "none") != "none":
        yield f"bias {config['bias']!r}, and an adapter cannot hold trained biases"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVED_BASES):
        yield (
            f"init_lora_weights {start!r}, which changes the base's own weights; save it with "
            "PEFT's path_initial_model_for_weight_conversion"
        )


def _factors(name: str, pair: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    missing = {"A", "B"} - set(pair)
    if missing:
        raise ValueError(f"{where}: of {name}, lora_{missing.pop()} is missing.")
    B, A = pair["B"], pair["A"]
    if A.dim() != 2 or B.dim() != 2 or not A.shape[0] == B.shape[1] > 0:
        raise ValueError(
            f"{where}: expected lora_A (r, in) and lora_B (out, r) of {name}, got "
            f"{tuple(A.shape)} and {tuple(B.shape)}; convolutions are not supported."
        )
    return B, A


def _scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """Return a layer's scale: alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA."""
    alpha: float = config.get("lora_alpha", 8)
    for key, value in (config.get("alpha_pattern") or {}).items():
        if matches_end(key, name):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def import_lora(model: nn.Module, directory: str | os.PathLike[str], k: int = 0) -> AdapterState:
    """Patch a model, in place, with a LoRA that PEFT wrote.

    The adapter equals the LoRA exactly: RaSA with diagonals of the LoRA's scale, and the largest
    rank of any layer. Modules that were trained in full become ``modules_to_save``, trained
    embedding rows become ``trainable_token_indices``. The LoRA's dropout is used too.

    With k > 0 every layer gives the first k ranks of the LoRA to the group's pool, where the other
    layers' diagonals are 0. Training goes on at rank r-k+L*k, from the same function.

    Args:
        model: an unpatched base model.
        directory: what PEFT's ``save_pretrained`` wrote.
        k: how many ranks every layer gives to a pool, 0 <= k <= the LoRA's rank.

    Returns:
        The adapter with which the model was patched.

    Raises:
        FileNotFoundError, ValueError, TypeError: a file is missing or damaged, does not fit the
            model, or is not a plain LoRA; the message says what to do, and the model is unchanged.

    Example:
        >>> import copy
        >>> rasa_ext.export_lora(rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1), "lora")
        9
        >>> adapter = rasa_ext.import_lora(model, "lora", k=1)
        >>> adapter.config.rank, adapter.config.k
        (9, 1)
    """
    adapter = convert_lora(model, read_lora(directory), str(directory), k)
    adapter.install(model)
    return adapter


@torch.no_grad()
def convert_lora(model: nn.Module, lora: Lora, where: str, k: int = 0) -> AdapterState:
    """Convert a LoRA to a RaSA adapter that computes an equal function.

    Args:
        model: the unpatched base, for names and shapes; it may be on the meta device.
        lora: result of ``read_lora``.
        where: start of errors.
        k: as in ``import_lora``.

    Returns:
        The adapter; ``model`` is unchanged.

    Raises:
        TypeError, ValueError: the LoRA does not fit the model, or ``k`` the LoRA.

    Example:
        >>> import copy
        >>> rasa_ext.export_lora(rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1), "lora")
        9
        >>> from rasa_ext.checkpoint import convert_lora, read_lora
        >>> convert_lora(model, read_lora("lora"), "lora").save(model, "adapter")
    """
    config = RasaConfig(
        rank=lora.rank,
        k=checked_integer("k", k),
        alpha=_alpha(lora),
        dropout=lora.config.get("lora_dropout") or 0.0,
        modules_to_save=_saved_modules(model, lora, where),
        trainable_token_indices=lora.config.get("trainable_token_indices"),
    )
    plan = plan_layers(model, config, lora.shapes, where)
    tensors = _padded_factors(lora, plan, k)
    expected = {name: tuple(t.shape) for name, t in saved_tensors(model, plan).items()}
    expected |= {rows_key(rows.names[0]): (len(rows.ids), rows.width) for rows in plan.tokens}
    others = {**lora.saved, **lora.rows}
    check_tensors(others, expected, where)
    tensors.update((f"{PREFIX}{name}", others[name]) for name in expected)
    return AdapterState(plan, tensors)


def _padded_factors(lora: Lora, plan: Plan, k: int) -> dict[str, Tensor]:
    """Return the LoRA's factors, padded to one rank with a fresh A and a B of zeros.

    The first k ranks of every layer are the pool's, and other layers begin with 0 for them.
    """
    tensors = {}
    for group in plan.groups:
        given = []
        for index, name in enumerate(group.names):
            B, A = (factor.float() for factor in lora.factors[name])
            spec = LayerSpec(0, len(group.names), *group.shape, A.device)
            fresh, zeros = (make(lora.rank - len(A), spec, A.dtype) for make in (fresh_A, fresh_B))
            A, B = torch.cat([A, fresh]), torch.cat([B, zeros], 1)
            d = A.new_zeros(lora.rank - k + k * len(group.names))
            own = lora.rank - k
            d[:own] = d[own + index * k : own + index * k + k] = lora.scales[name]
            tensors[own_key(name, "A")] = A[k:]
            tensors[own_key(name, "B")] = B[:, k:].contiguous()
            tensors[own_key(name, "d")] = d
            given.append((A[:k], B[:, :k]))
        if k:
            down, up = zip(*given, strict=True)
            tensors[pool_key(group.names[0], "A")] = torch.cat(down)
            tensors[pool_key(group.names[0], "B")] = torch.cat(up, 1)
    return tensors


def _alpha(lora: Lora) -> float:
    """Return an alpha with which a new adapter has the LoRA's scale, if it has one."""
    scales = set(lora.scales.values())
    scale = scales.pop() if len(scales) == 1 else 0.0
    return scale * lora.rank if scale > 0 else 8.0


def _saved_modules(model: nn.Module, lora: Lora, where: str) -> tuple[str, ...]:
    """Return the names of the modules that the LoRA's file holds in full."""
    modules = {name for name, _ in model.named_modules() if name}
    listed = [m for m in modules if matches(m, tuple(lora.config.get("modules_to_save") or ()))]
    owners: dict[str, None] = {}
    for key in lora.saved:
        owner = next((m for m in listed if key.startswith(f"{m}.")), key.rpartition(".")[0])
        if owner not in modules:
            raise ValueError(
                f"{where}: expected tensors of this model, which has no {owner!r} for {key}."
            )
        owners[owner] = None
    return tuple(owners)
