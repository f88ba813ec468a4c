"""Experts in checkpoints of the official code: one layer for each matrix of each expert.

Transformers 4 stores experts this way. The layers of the model share one pool for each matrix of
each expert, such as ``experts.3.w1``. A stacked weight joins gate and up into one matrix with twice
the rows, so

    A = [A_gate ; A_up]    B = [B_gate  0 ; 0  B_up]    d = [private: gate, up | pooled: gate, up]

for private ranks and likewise for the pool. dW stays equal, with twice the ranks.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from rasa_ext import RasaConfig
from rasa_ext.checkpoint import (
    StackedWeight,
    check_tensors,
    load_official_tensors,
    official_name,
    own_key,
    pool_key,
    read_adapter,
    stacked_weights,
)
from rasa_ext.patching import unwrap
from rasa_research.methods import GatedRasaConfig

_LAYER = re.compile(r"^base_model\.model\.(?P<name>.+)\.rasa_A\.weight$")


def load_official_experts(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint of the official code with adapted experts into a model that stacks them.

    In transformers 4, each matrix of each expert was one layer (``experts.3.w1``). The result
    computes equal outputs, with ``experts="slot"``. One adapter with twice the ranks holds the
    ranks of gate and up, on separate rows; its config is a ``GatedRasaConfig``. A checkpoint
    without experts is loaded like with ``rasa_ext.load_official``.

    Args:
        model: the base that the adapter was trained on, or a model patched with an equal config.
        directory: a directory with ``adapter_config.json`` and ``adapter_model.safetensors`` or
            ``adapter_model.bin``.

    Returns:
        The same object.

    Raises:
        FileNotFoundError, ValueError: a file is missing, unsafe or damaged, or does not fit the
            model; the model is unchanged.
        RuntimeError: the model is merged.

    Example:
        >>> from rasa_research.checkpoint import load_official_experts
        >>> model = load_official_experts(model, "checkpoint")
        >>> rasa_ext.save_adapter(model, "adapter")  # in this package's format
    """
    settings, found = read_adapter(directory)
    config, where = RasaConfig.from_dict(settings), str(directory)
    config, tensors = stack_experts(unwrap(model), config, found, where)
    return load_official_tensors(model, config, tensors, where)


def stack_experts(
    model: nn.Module, config: RasaConfig, tensors: Mapping[str, Tensor], where: str
) -> tuple[RasaConfig, dict[str, Tensor]]:
    """Return config and tensors for stacked experts, with this package's tensor names.

    If the model stacks no experts, or the file has none, both are returned unchanged. Raises
    ValueError, starting with ``where``, if experts of the file do not fit the model.
    """
    weights = _adapted(model, tensors)
    if not weights:
        return config, dict(tensors)
    _check_no_router({weight.path for weight in weights}, tensors, where)
    groups: dict[tuple[str, tuple[str, ...]], list[StackedWeight]] = {}
    for weight in weights:
        kind = official_name(pool_key(weight.path, "A"))  # layers of one kind share a pool
        groups.setdefault((kind, tuple(weight.parts)), []).append(weight)
    _check(config, groups.values(), tensors, where)
    kept, stacked, used = {}, {}, set[str]()
    for members in groups.values():
        own, pooled = config.ranks(len(members))
        for index, weight in enumerate(members):
            source = _Source(weight, tensors, own, pooled, used)
            stacked.update(source.layer_tensors())
            if index == 0:
                stacked.update(source.group_tensors())
            if (count := len(weight.parts)) > 1:
                kept[weight.name] = (count * own, count * pooled, count * pooled)
                stacked[own_key(weight.name, "slots")] = torch.arange(count * pooled)
    rest = {key: tensor for key, tensor in tensors.items() if key not in used}
    fields = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    fields |= {"experts": "slot", "target_modules": _targets(model, config, weights, rest)}
    chosen = GatedRasaConfig(**fields, kept=kept) if kept else RasaConfig(**fields)
    return chosen, {**rest, **stacked}


def _layer(weight: StackedWeight, expert: int, part: str) -> str:
    """Return the name of one expert's matrix in the checkpoint."""
    return f"{weight.path}.{expert}.{part}"


def _adapted(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[StackedWeight]:
    """Return the stacked weights that the checkpoint adapts, with only the adapted parts."""
    found = []
    for weight in stacked_weights(model):
        parts = {
            part: rows
            for part, rows in weight.parts.items()
            if any(
                official_name(own_key(_layer(weight, expert, part), "A")) in tensors
                for expert in range(weight.shape[0])
            )
        }
        if parts:
            found.append(dataclasses.replace(weight, parts=parts))
    return found


def _check_no_router(experts: set[str], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError if the file also adapts the router, which is no linear layer here."""
    for name in (match["name"] for match in map(_LAYER.match, tensors) if match):
        parent, _, last = name.rpartition(".")
        if last == "gate" and f"{parent}.experts" in experts:
            raise ValueError(
                f"{where}: the file adapts {name!r}, the router of the experts, which is not a "
                "linear layer in transformers 5 and cannot be adapted; merge this adapter with "
                "the code that trained it, or train one without gate in target_modules."
            )


def _check(
    config: RasaConfig,
    groups: Iterable[list[StackedWeight]],
    tensors: Mapping[str, Tensor],
    where: str,
) -> None:
    """Raise ValueError, with the file's keys, if experts are missing or have wrong shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    for members in groups:
        own, pooled = config.ranks(len(members))
        for weight in members:
            experts, out_features, in_features = weight.shape
            for part, chosen in weight.parts.items():
                rows = len(range(out_features)[chosen])
                for expert in range(experts):
                    layer = _layer(weight, expert, part)
                    expected[official_name(own_key(layer, "A"))] = (own, in_features)
                    expected[official_name(own_key(layer, "B"))] = (rows, own)
                    expected[official_name(own_key(layer, "d"))] = (own + pooled,)
                    if pooled:
                        expected[official_name(pool_key(layer, "A"))] = (pooled, in_features)
                        expected[official_name(pool_key(layer, "B"))] = (rows, pooled)
    found = {key: tensor for key, tensor in tensors.items() if key in expected}
    check_tensors(found, expected, where)


@dataclasses.dataclass(frozen=True)
class _Source:
    """One weight's tensors in a checkpoint; ``used`` collects the keys that were read."""

    weight: StackedWeight
    tensors: Mapping[str, Tensor]
    private: int
    pooled: int
    used: set[str]

    def layer_tensors(self) -> dict[str, Tensor]:
        """Stack A, B and d of all experts."""
        down, up, mixing = (self._each(own_key, field) for field in "ABd")
        d = [
            torch.cat([each[: self.private] for each in of] + [each[self.private :] for each in of])
            for of in mixing
        ]
        return {
            own_key(self.weight.name, "A"): torch.stack([torch.cat(of) for of in down]),
            own_key(self.weight.name, "B"): torch.stack([self._diagonal(of) for of in up]),
            own_key(self.weight.name, "d"): torch.stack(d),
        }

    def group_tensors(self) -> dict[str, Tensor]:
        """Stack the pools of all experts; return nothing if k = 0."""
        if not self.pooled:
            return {}
        down, up = self._each(pool_key, "A"), self._each(pool_key, "B")
        return {
            pool_key(self.weight.name, "A"): torch.stack([torch.cat(of) for of in down]),
            pool_key(self.weight.name, "B"): torch.stack([self._diagonal(of) for of in up]),
        }

    def _each(self, key_of: Callable[[str, str], str], field: str) -> list[list[Tensor]]:
        """Read one factor for every matrix of every expert."""
        return [
            [
                self._take(official_name(key_of(_layer(self.weight, expert, part), field)))
                for part in self.weight.parts
            ]
            for expert in range(self.weight.shape[0])
        ]

    def _take(self, key: str) -> Tensor:
        self.used.add(key)
        return self.tensors[key]

    def _diagonal(self, factors: list[Tensor]) -> Tensor:
        """Place each matrix's B on the matrix's rows and on separate columns; zeros elsewhere."""
        out_features, columns = self.weight.shape[1], sum(each.shape[1] for each in factors)
        found = factors[0].new_zeros((out_features, columns))
        begin = 0
        for chosen, each in zip(self.weight.parts.values(), factors, strict=True):
            found[chosen, begin : begin + each.shape[1]] = each
            begin += each.shape[1]
        return found


def _targets(
    model: nn.Module, config: RasaConfig, weights: list[StackedWeight], rest: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Return target_modules: the file's layers that still exist, and the stacked weights."""
    stacked = [weight.name for weight in weights]
    given = config.target_modules
    if isinstance(given, str):  # a regular expression, which only matches names of transformers 4
        return (*(match["name"] for match in map(_LAYER.match, rest) if match), *stacked)
    parts = {part for weight in weights for part in weight.parts}
    layers = {name.rpartition(".")[2] for name, each in model.named_modules() if _is_layer(each)}
    gone = parts - layers
    return (*(each for each in given if each.rpartition(".")[2] not in gone), *stacked)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)
