"""Experts in checkpoints of the official code: a layer for each matrix of each expert.

That is how transformers 4 has them, and the pool of ``experts.3.w1`` is that of expert 3's over the
model's layers. Stacked, gate and up are one matrix of twice the rows, and so

    A = [A_gate ; A_up]    B = [B_gate  0 ; 0  B_up]    d = [private: gate, up | pooled: gate, up]

for the private ranks and, likewise, for the pool: dW is the same, of twice the ranks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.experts import bank_names, bank_shape, is_experts
from rasa_ext.base_layers.linear import is_linear
from rasa_ext.checkpoint.adapter import own_key, pool_key
from rasa_ext.checkpoint.expert_names import names_in_checkpoint, path_in_checkpoint, rows_of
from rasa_ext.checkpoint.files import PREFIX, check_tensors
from rasa_ext.config import RasaConfig
from rasa_ext.patching.targets import matches

_LAYER = re.compile(r"^base_model\.model\.(?P<name>.+)\.rasa_A\.weight$")


def kind_of(name: str) -> str:
    """``model.layers.3.self_attn.q_proj`` to ``self_attn__q_proj``: the name of its pool."""
    return re.sub(r"^.*?\blayers\.\d+\.", "", name).replace(".", "__")


@dataclasses.dataclass(frozen=True)
class _Bank:
    """A stacked weight whose experts' matrices are in a checkpoint."""

    name: str
    path: str
    """Of the experts in the checkpoint."""
    shape: tuple[int, int, int]
    """(experts, out, in)"""
    parts: dict[str, slice]
    """The matrices that the checkpoint has, and their rows."""

    def layer(self, expert: int, part: str) -> str:
        """Name one expert's matrix in the checkpoint."""
        return f"{self.path}.{expert}.{part}"

    @property
    def group(self) -> tuple[str, tuple[str, ...]]:
        """What banks that share pools have in common."""
        return kind_of(self.path), tuple(self.parts)


def stack_experts(
    model: nn.Module, config: RasaConfig, tensors: Mapping[str, Tensor], where: str
) -> tuple[RasaConfig, dict[str, Tensor]]:
    """Give config and tensors for stacked experts, those under the package's own names.

    Both are given back as they are where the model stacks no experts, or the file has none.
    ValueError, beginning with ``where``, where experts of the file do not fit the model.
    """
    banks = list(_banks_in(model, tensors))
    if not banks:
        return config, dict(tensors)
    _check_no_router({bank.path for bank in banks}, tensors, where)
    groups: dict[tuple[str, tuple[str, ...]], list[_Bank]] = {}
    for bank in banks:
        groups.setdefault(bank.group, []).append(bank)
    _check(config, groups, tensors, where)
    kept, stacked, used = {}, {}, set[str]()
    for members in groups.values():
        own, pooled = config.ranks(len(members))
        for index, bank in enumerate(members):
            source = _Source(bank, tensors, own, pooled, used)
            stacked.update(source.own())
            if index == 0:
                stacked.update(source.pool())
            if (count := len(bank.parts)) > 1:
                kept[bank.name] = (count * own, count * pooled, count * pooled)
                stacked[own_key(bank.name, "slots")] = torch.arange(count * pooled)
    rest = {key: tensor for key, tensor in tensors.items() if key not in used}
    targets = _targets(model, config, banks, rest)
    config = dataclasses.replace(config, experts="slot", kept=kept, target_modules=targets)
    return config, {**rest, **stacked}


def _experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """List stacked experts under the names that they have, or had, in the plain model."""
    for path, module in model.named_modules():
        if is_experts(module):
            yield path.removesuffix(".base_layer"), module


def _banks_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[_Bank]:
    for path, module in _experts_of(model):
        there = path_in_checkpoint(path, module)
        for name in bank_names(module):
            shape = bank_shape(module, name)
            rows = zip(names_in_checkpoint(module, name), rows_of(module, name), strict=True)
            parts = {
                part: chosen
                for part, chosen in rows
                if any(
                    f"{PREFIX}{there}.{expert}.{part}.rasa_A.weight" in tensors
                    for expert in range(shape[0])
                )
            }
            if parts:
                yield _Bank(f"{path}.{name}", there, shape, parts)


def _check_no_router(experts: set[str], tensors: Mapping[str, Tensor], where: str) -> None:
    """ValueError where the file adapts what chooses the experts as well."""
    for name in (match["name"] for match in map(_LAYER.match, tensors) if match):
        parent, _, last = name.rpartition(".")
        if last == "gate" and f"{parent}.experts" in experts:
            raise ValueError(
                f"{where}: the file adapts {name!r}, the router of experts, which is no linear "
                "layer in transformers 5, so that nothing can take it here; merge this adapter "
                "where it was trained, or train one that leaves gate out of its target_modules."
            )


def _check(
    config: RasaConfig,
    groups: Mapping[Any, list[_Bank]],
    tensors: Mapping[str, Tensor],
    where: str,
) -> None:
    """ValueError, naming the file's own keys, where experts are not all there or misshapen."""
    expected: dict[str, tuple[int, ...]] = {}
    for members in groups.values():
        own, pooled = config.ranks(len(members))
        for bank in members:
            experts, out_features, in_features = bank.shape
            for part, chosen in bank.parts.items():
                rows = len(range(out_features)[chosen])
                for expert in range(experts):
                    layer = bank.layer(expert, part)
                    key = f"{PREFIX}{layer}.rasa_"
                    expected[f"{key}A.weight"] = (own, in_features)
                    expected[f"{key}B.weight"] = (rows, own)
                    expected[f"{key}mixing.weight"] = (own + pooled,)
                    if pooled:
                        expected[_pool("A", layer)] = (pooled, in_features)
                        expected[_pool("B", layer)] = (rows, pooled)
    found = {key: tensor for key, tensor in tensors.items() if key in expected}
    check_tensors(found, expected, where)


def _pool(part: str, layer: str) -> str:
    return f"base_model.rasa_shared_{part}.{kind_of(layer)}.weight"


@dataclasses.dataclass(frozen=True)
class _Source:
    """One bank's tensors in a checkpoint; ``used`` collects the keys that were read."""

    bank: _Bank
    tensors: Mapping[str, Tensor]
    private: int
    pooled: int
    used: set[str]

    def own(self) -> dict[str, Tensor]:
        """Stack A, B and d of all experts."""
        down = self._each("A", shared=False)
        up = self._each("B", shared=False)
        mixing = [
            [self._take(f"{PREFIX}{self.bank.layer(expert, part)}.rasa_mixing.weight")
             for part in self.bank.parts]
            for expert in range(self.bank.shape[0])
        ]  # fmt: skip
        d = [
            torch.cat([each[: self.private] for each in of] + [each[self.private :] for each in of])
            for of in mixing
        ]
        return {
            own_key(self.bank.name, "A"): torch.stack([torch.cat(of) for of in down]),
            own_key(self.bank.name, "B"): torch.stack([self._diagonal(of) for of in up]),
            own_key(self.bank.name, "d"): torch.stack(d),
        }

    def pool(self) -> dict[str, Tensor]:
        """Stack the pools of all experts; nothing where k = 0."""
        if not self.pooled:
            return {}
        down, up = self._each("A", shared=True), self._each("B", shared=True)
        return {
            pool_key(self.bank.name, "A"): torch.stack([torch.cat(of) for of in down]),
            pool_key(self.bank.name, "B"): torch.stack([self._diagonal(of) for of in up]),
        }

    def _each(self, field: str, *, shared: bool) -> list[list[Tensor]]:
        """Read a factor for every expert and each of its matrices."""
        found = []
        for expert in range(self.bank.shape[0]):
            layers = [self.bank.layer(expert, part) for part in self.bank.parts]
            found.append(
                [
                    self._take(
                        _pool(field, each) if shared else f"{PREFIX}{each}.rasa_{field}.weight"
                    )
                    for each in layers
                ]
            )
        return found

    def _take(self, key: str) -> Tensor:
        self.used.add(key)
        return self.tensors[key]

    def _diagonal(self, factors: list[Tensor]) -> Tensor:
        """Put B's of matrices on their rows and on columns of their own, with zeros elsewhere."""
        out_features, columns = self.bank.shape[1], sum(each.shape[1] for each in factors)
        found = factors[0].new_zeros((out_features, columns))
        begin = 0
        for chosen, each in zip(self.bank.parts.values(), factors, strict=True):
            found[chosen, begin : begin + each.shape[1]] = each
            begin += each.shape[1]
        return found


def _targets(
    model: nn.Module, config: RasaConfig, banks: list[_Bank], rest: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Name the layers that the file has: as its config does, and the stacked weights."""
    adapted = [bank.name for bank in banks]
    every = [f"{path}.{name}" for path, m in _experts_of(model) for name in bank_names(m)]
    short = tuple(dict.fromkeys(".".join(name.split(".")[-2:]) for name in adapted))
    more = short if [name for name in every if matches(name, short)] == adapted else tuple(adapted)
    given = config.target_modules
    if isinstance(given, str):  # a regular expression for names of transformers 4
        return (*(match["name"] for match in map(_LAYER.match, rest) if match), *more)
    parts = {part for bank in banks for part in bank.parts}
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    of_linears = (
        each
        for each in given
        if each.rpartition(".")[2] not in parts or any(matches(name, (each,)) for name in linears)
    )
    return (*of_linears, *more)
