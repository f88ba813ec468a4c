"""Adapted experts in the files of a LoRA: the layouts that its readers have for them.

    peft          A (E*R, in) and B (out, R*E) of a stacked weight, as PEFT's target_parameters has
                  them: A by expert, then rank, and the columns of B by rank, then expert
    per-expert    A (R, in) and B (out, R) of every expert's matrices, as if they were layers
    shared-outer  A (1, R, in) and B (E, out, R) on the experts' input, A (E, R, in) and
                  B (1, out, R) on their output, of pools that all experts read

In each, B A of an expert is its dW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.experts import bank_names, is_experts, is_transposed
from rasa_ext.checkpoint.expert_names import (
    is_concatenated,
    is_stacked,
    names_in_checkpoint,
    path_in_checkpoint,
    rows_of,
)
from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.nn.rasa_experts import RasaBank, RasaExperts
from rasa_ext.patching.targets import shortest_suffixes

PEFT, PER_EXPERT, SHARED_OUTER = LAYOUTS = ("peft", "per-expert", "shared-outer")

_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})

Experts = list[tuple[str, RasaExperts]]
"""Adapted experts, with their names in the model."""


class Entry(NamedTuple):
    """A tensor of a file that is not made yet, float32."""

    key: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def chosen_layout(experts: Experts, given: str | None) -> str | None:
    """Give the layout for a model's adapted experts, None where it has none.

    Raises TypeError or ValueError, naming the argument, for one that it cannot have.
    """
    if given is not None and not isinstance(given, str):
        raise TypeError(f"experts: expected a string or None, got {given!r}.")
    if given is not None and given not in LAYOUTS:
        raise ValueError(f"experts: expected {' or '.join(map(repr, LAYOUTS))}, got {given!r}.")
    if not experts:
        if given is not None:
            raise ValueError(
                f"experts: expected a model with adapted experts for the layout {given!r}, but it "
                "has none; leave out experts."
            )
        return None
    if given == SHARED_OUTER:
        _check_shared(experts)
    return given or PEFT


def _check_shared(experts: Experts) -> None:
    for path, module in experts:
        for name, bank in module.banks().items():
            A, A_pool, _, _, _ = bank.adapter().factors()
            if A_pool is None or A_pool.dim() == 3 or A.shape[1]:
                raise ValueError(
                    "experts: expected experts that read one pool and have no ranks of their own "
                    f"for the layout {SHARED_OUTER!r}, as experts='shared' with k = rank makes "
                    f"them, but '{path}.{name}' has others; take {PEFT!r} or {PER_EXPERT!r}."
                )


def entries_of(path: str, experts: RasaExperts, layout: str, rank: int) -> Iterator[Entry]:
    """List the tensors of one module's adapted experts in a layout, every rank being ``rank``."""
    inner = path
    for name in nested(experts):
        bank = experts.banks()[name]
        if layout == PEFT:
            yield from _stacked(inner, experts.base_layer, bank, rank)
        elif layout == PER_EXPERT:
            yield from _single(path, experts.base_layer, name, bank, rank)
        else:
            yield from _shared(path, experts.base_layer, name, bank, rank)
        inner += ".base_layer"


def nested(experts: RasaExperts) -> list[str]:
    """Name a module's adapted weights as PEFT wraps them: the outermost, the last one, first."""
    names = [name for name, _ in experts.base_layer.named_parameters(recurse=False)]
    return sorted(experts.banks(), key=names.index, reverse=True)


def targets_of(experts: Experts, layout: str) -> list[str]:
    """Name the matrices in a layout, as ``target_modules`` has them."""
    found: dict[str, None] = {}
    for _, module in experts:
        for name in module.banks():
            base = module.base_layer
            whole = layout == SHARED_OUTER and is_concatenated(base)
            parts = (name,) if whole else names_in_checkpoint(base, name)
            found.update(dict.fromkeys(parts))
    return list(found)


def taken_for_experts(names: Iterable[str], root: nn.Module) -> list[str]:
    """Choose the linear layers that PEFT would take for experts, if it had them as modules.

    In a model of many families it reads the names below, in ``target_modules``, as what experts
    and routers were called before they were stacked. As parameters it takes them as they stand.
    """
    if not any(is_experts(module) for module in root.modules()):
        return []
    return [name for name in names if name.rpartition(".")[2] in _OF_EXPERTS]


def parameters_of(experts: Experts, linears: Iterable[str], root: nn.Module) -> list[str]:
    """Name adapted weights, as ``target_parameters`` has them: by suffixes of no other."""
    adapted = [f"{path}.{name}" for path, module in experts for name in module.banks()]
    adapted += [f"{name}.weight" for name in linears]
    others = {name.replace(".base_layer", "") for name, _ in root.named_parameters()}
    others -= set(adapted)
    return shortest_suffixes(adapted, others)


def limits_of(experts: Experts, layout: str, *, default: bool) -> Iterator[str]:
    """Name what some reader of a layout refuses or computes otherwise, and what to do about it."""
    if default:
        yield (
            "the experts are written in PEFT's layout, for PEFT and for models whose experts vLLM "
            f"keeps in three dimensions, such as gpt-oss; pass experts={PER_EXPERT!r} (--experts "
            f"{PER_EXPERT}) for others of vLLM, which misreads it, and for SGLang and llama.cpp, "
            f"or experts={PEFT!r} to say that this is meant."
        )
    if layout == PER_EXPERT and any(is_stacked(m.base_layer) for _, m in experts):
        yield (
            "the model's own checkpoints stack its experts, gate and up in one matrix; vLLM reads "
            f"experts={PEFT!r} (--experts {PEFT}) where it keeps them so, and llama.cpp no LoRA of "
            "them at all: for that, save what rasa_ext.merge_and_unload(model) returns."
        )
    alone = [
        f"{path}.{name}"
        for path, module in experts
        for name in module.banks()
        if len(module.banks()) < len(bank_names(module.base_layer))
    ]
    if alone:
        yield (
            f"{alone[0]} is adapted without the other weight of its experts, and vLLM and "
            "llama.cpp refuse such a LoRA; for these, adapt both, or save what "
            "rasa_ext.merge_and_unload(model) returns."
        )


def _stacked(path: str, experts: nn.Module, bank: RasaBank, rank: int) -> Iterator[Entry]:
    """PEFT's: as its target_parameters wraps the module ``path``.

    A weight that does not say that it is transposed it takes for (experts, out, in), as Llama 4's.
    """
    E, packed = bank.place.experts, _packed(bank, rank)
    sides = bank.place.in_features, bank.place.out_features
    turned = is_transposed(experts) and not getattr(experts, "is_transposed", False)
    first, second = (1, 0) if turned else (0, 1)
    yield Entry(
        f"{PREFIX}{path}.lora_A.weight",
        (E * rank, sides[first]),
        lambda: packed()[first].reshape(E * rank, -1),
    )
    yield Entry(
        f"{PREFIX}{path}.lora_B.weight",
        (sides[second], rank * E),
        lambda: packed()[second].permute(2, 1, 0).reshape(-1, rank * E),
    )


def _single(path: str, experts: nn.Module, name: str, bank: RasaBank, rank: int) -> Iterator[Entry]:
    """A pair for each matrix of each expert; gate and up have the same A."""
    path, packed = path_in_checkpoint(path, experts), _packed(bank, rank)
    parts = _rows_by_name(experts, name)
    rows = bank.place.out_features // len(parts)
    for expert in range(bank.place.experts):
        for part, chosen in parts.items():
            key = f"{PREFIX}{path}.{expert}.{part}.lora_"
            yield Entry(f"{key}A.weight", (rank, bank.place.in_features), _at(packed, expert))
            yield Entry(f"{key}B.weight", (rows, rank), _at(packed, expert, chosen))


def _shared(path: str, experts: nn.Module, name: str, bank: RasaBank, rank: int) -> Iterator[Entry]:
    """SGLang's: what all experts share stands once, and d goes to the other side.

    Where gate and up take turns as rows, they stand apart, under names that leave no doubt.
    """
    outward, place, packed = name == "down_proj", bank.place, _pool(bank, rank)
    path, whole = path_in_checkpoint(path, experts), is_concatenated(experts)
    parts = {name: slice(None)} if whole else _rows_by_name(experts, name)
    E, rows = place.experts, place.out_features // len(parts)
    for part, chosen in parts.items():
        key = f"{PREFIX}{path}.{part}.lora_"
        yield Entry(
            f"{key}A.weight",
            (E if outward else 1, rank, place.in_features),
            functools.partial(_shared_A, packed, scaled=outward),
        )
        yield Entry(
            f"{key}B.weight",
            (1 if outward else E, rows, rank),
            functools.partial(_shared_B, packed, chosen, scaled=not outward),
        )


def _rows_by_name(experts: nn.Module, name: str) -> Mapping[str, slice]:
    return dict(zip(names_in_checkpoint(experts, name), rows_of(experts, name), strict=True))


def _packed(bank: RasaBank, rank: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Pack all experts, once and when asked: Ap (E, rank, in) and Bp (E, rank, out)."""

    @functools.cache
    @torch.no_grad()
    def make() -> tuple[Tensor, Tensor]:
        pack = ops.pack_experts(*bank.adapter().factors().with_pool_of_each(), torch.float32)
        Ap, Bp = (nn.functional.pad(t, (0, 0, 0, rank - t.shape[1])) for t in pack)
        return Ap, Bp

    return make


def _at(
    packed: Callable[[], tuple[Tensor, Tensor]], expert: int, rows: slice | None = None
) -> Callable[[], Tensor]:
    """Give A of an expert or, with rows, those of its B."""
    if rows is None:
        return lambda: packed()[0][expert]
    return lambda: packed()[1][expert].t()[rows]


def _pool(bank: RasaBank, rank: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Give A_pool (rank, in), B_pool (out, rank) and d (E, rank), filled up, when asked."""

    @functools.cache
    @torch.no_grad()
    def make() -> tuple[Tensor, Tensor, Tensor]:
        A, A_pool, _, B_pool, d = bank.adapter().factors()
        assert A_pool is not None  # chosen_layout has looked
        assert B_pool is not None
        fill = (0, rank - A_pool.shape[0])
        gates = A_pool.new_ones((A.shape[0], A_pool.shape[0])) if d is None else d
        found = (
            nn.functional.pad(A_pool, (0, 0, *fill)),
            nn.functional.pad(B_pool, fill),
            nn.functional.pad(gates, fill),
        )
        down, up, gates = (t.float() for t in found)
        return down, up, gates

    return make


def _shared_A(pool: Callable[[], tuple[Tensor, Tensor, Tensor]], *, scaled: bool) -> Tensor:
    A, _, d = pool()
    return d.unsqueeze(2) * A if scaled else A.unsqueeze(0)


def _shared_B(
    pool: Callable[[], tuple[Tensor, Tensor, Tensor]], rows: slice, *, scaled: bool
) -> Tensor:
    _, B, d = pool()
    return B[rows] * d.unsqueeze(1) if scaled else B[rows].unsqueeze(0)
