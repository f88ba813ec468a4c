"""Adapted experts in LoRA files, in the layouts that readers know.

    peft          A (E*R, in) and B (out, R*E) of a stacked weight, as for PEFT's target_parameters:
                  rows of A by expert, then rank; columns of B by rank, then expert
    per-expert    A (R, in) and B (out, R) of every expert's matrices, as if they were layers
    shared-outer  A (1, R, in) and B (E, out, R) on the experts' input, A (E, R, in) and
                  B (1, out, R) on the output, from pools that all experts read

In each layout, B A of an expert is dW.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.experts import expert_weight_names, is_experts
from rasa_ext.checkpoint.expert_names import is_concatenated, parts_of, path_in_checkpoint
from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.checkpoint.lora_view import Adapted, Export
from rasa_ext.methods.base import checked_choice
from rasa_ext.patching.targets import shortest_suffixes, suffixes

PEFT, PER_EXPERT, SHARED_OUTER = LAYOUTS = ("peft", "per-expert", "shared-outer")

_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def checked_layout(experts: Mapping[str, Adapted], given: str | None) -> str | None:
    """Return the layout for a model's adapted experts, or None without any.

    Raises ValueError, naming the argument, if the layout is not possible.
    """
    if given is not None:
        checked_choice("expert_layout", given, LAYOUTS)
    if not experts:
        if given is not None:
            raise ValueError(
                "expert_layout: expected a model with adapted experts for the layout "
                f"{given!r}, but it has none; leave out expert_layout."
            )
        return None
    if given == SHARED_OUTER:
        _check_shared(experts)
    return given or PEFT


def _check_shared(experts: Mapping[str, Adapted]) -> None:
    for path, stack in experts.items():
        for name, (A, A_pool, _, _, _) in stack.factors.items():
            if A_pool is None or A_pool.dim() == 3 or A.shape[1]:
                raise ValueError(
                    "expert_layout: expected experts that read one pool and have no private ranks "
                    f"for the layout {SHARED_OUTER!r}, as experts='shared' with k = rank makes "
                    f"them, but '{path}.{name}' differs; use {PEFT!r} or {PER_EXPERT!r}."
                )


def expert_factors(
    path: str, stack: Adapted, layout: str, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module's adapted experts in a layout, at rank ``rank``."""
    inner = path
    for name in _nested(stack):
        if layout == SHARED_OUTER:
            yield from _shared_outer(path, stack, name, rank)
        else:
            Ap, Bp = (
                nn.functional.pad(pack, (0, 0, 0, rank - pack.shape[1]))
                for pack in ops.differentiable_pack(stack.factors[name], torch.float32)
            )
            if layout == PEFT:
                yield from _peft_pair(inner, stack.base, Ap, Bp)
            else:
                yield from _per_expert(path, stack.base, name, Ap, Bp)
        inner += ".base_layer"


def _nested(stack: Adapted) -> list[str]:
    """Return the adapted weights in PEFT's wrapping order: the outermost, the last one, first."""
    names = [name for name, _ in stack.base.named_parameters(recurse=False)]
    names += expert_weight_names(stack.base)  # Triton's tensors are no parameters
    return sorted(stack.factors, key=names.index, reverse=True)


def _peft_pair(path: str, base: Any, Ap: Tensor, Bp: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield PEFT's layout, in which target_parameters wraps the module ``path``.

    PEFT assumes (experts, out, in) unless a module states that it is transposed; Llama 4's does
    not.
    """
    turned = type(base).__name__ == "Llama4TextExperts"
    first, second = (Bp, Ap) if turned else (Ap, Bp)
    yield f"{PREFIX}{path}.lora_A.weight", first.flatten(0, 1)
    yield f"{PREFIX}{path}.lora_B.weight", second.permute(2, 1, 0).flatten(1)


def _per_expert(
    path: str, base: Any, name: str, Ap: Tensor, Bp: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield a pair for every matrix of every expert; gate and up have equal A."""
    path, parts = path_in_checkpoint(path, base), parts_of(base, name)
    for expert, (A, B) in enumerate(zip(Ap, Bp, strict=True)):
        for part, rows in parts.items():
            key = f"{PREFIX}{path}.{expert}.{part}.lora_"
            yield f"{key}A.weight", A
            yield f"{key}B.weight", B.t()[rows]


def _shared_outer(path: str, stack: Adapted, name: str, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Yield SGLang's layout: factors that all experts share, once, and the others times d.

    Where gate and up rows alternate, they are written apart, under unambiguous names.
    """
    own, A, _, B, d = stack.factors[name]
    assert A is not None  # checked by checked_layout
    assert B is not None
    fill = (0, rank - A.shape[0])
    gates = A.new_ones((own.shape[0], A.shape[0])) if d is None else d
    A, B = nn.functional.pad(A, (0, 0, *fill)).float(), nn.functional.pad(B, fill).float()
    gates = nn.functional.pad(gates, fill).float()
    if name == "down_proj":  # (E, rank, in) and (1, out, rank)
        A, B = gates.unsqueeze(2) * A, B.unsqueeze(0)
    else:  # (1, rank, in) and (E, out, rank)
        A, B = A.unsqueeze(0), B * gates.unsqueeze(1)
    whole = is_concatenated(stack.base)
    parts = {name: slice(None)} if whole else parts_of(stack.base, name)
    for part, rows in parts.items():
        key = f"{PREFIX}{path_in_checkpoint(path, stack.base)}.{part}.lora_"
        yield f"{key}A.weight", A
        yield f"{key}B.weight", B[:, rows]


def targets_of(export: Export, layout: str | None) -> tuple[list[str], list[str]]:
    """Return ``target_modules`` and ``target_parameters`` for PEFT's config.

    In many families with stacked experts, PEFT treats the names `_OF_EXPERTS` in ``target_modules``
    as experts and routers from before stacking. In ``target_parameters`` it takes linear layers of
    these names as they are.
    """
    of_peft = layout in (None, PEFT)
    stacks = of_peft and any(is_experts(module) for module in export.root.modules())
    taken = [n for n in export.linears if stacks and n.rpartition(".")[2] in _OF_EXPERTS]
    modules = suffixes([name for name in export.linears if name not in taken], export.root)
    stacked = export.experts.items() if layout == PEFT else ()
    adapted = [f"{path}.{name}" for path, stack in stacked for name in stack.factors]
    adapted += [f"{name}.weight" for name in taken]
    for base, factors in () if of_peft else export.experts.values():
        for name in factors:
            whole = layout == SHARED_OUTER and is_concatenated(base)
            modules += (name,) if whole else parts_of(base, name)
    others = {name.replace(".base_layer", "") for name, _ in export.root.named_parameters()}
    return list(dict.fromkeys(modules)), shortest_suffixes(adapted, others - set(adapted))
