"""Operators: schema, fake kernel and PyTorch kernel side by side; compiled code only adds kernels.

The functions of this module are what the package calls. Where no compiled kernel exists they run
the PyTorch kernels without a trip through the dispatcher, which costs several microseconds an
operator; under ``torch.compile`` they are always the operators, opaque to the compiler.
"""

from __future__ import annotations

import torch

from rasa_ext.ops import fake, reference
from rasa_ext.ops.heuristics import (
    diagonal_in_pack,
    noise_words,
    pool_in_packs,
    rank_multiple,
    share_siblings,
)
from rasa_ext.ops.library import COMPILED, cuda_status
from rasa_ext.ops.schemas import LIBRARY, SCHEMAS, accumulation_dtype

NAMES: tuple[str, ...] = tuple(schema.partition("(")[0] for schema in SCHEMAS)


def _operator_kernel(name: str):
    """The PyTorch kernel with what an operator promises: strides, and memory of its own."""
    direct = getattr(reference, name)
    if name != "pack_backward":
        return direct

    def fresh(*args):
        dA, dA_pool, dB, dB_pool, dd = direct(*args)
        column_major = dB_pool.t().clone(memory_format=torch.contiguous_format).t()
        return dA, dA_pool.clone(), dB, column_major, dd

    return fresh


for _name in NAMES:
    LIBRARY.impl(_name, _operator_kernel(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rasa_ext::{_name}", getattr(fake, _name), lib=LIBRARY)


def _entry(name: str):
    operator = getattr(torch.ops.rasa_ext, name).default
    direct = getattr(reference, name)
    if COMPILED:
        return operator

    def call(*args):
        return operator(*args) if torch.compiler.is_compiling() else direct(*args)

    call.__name__ = name
    call.__doc__ = direct.__doc__
    return call


pack = _entry("pack")
pack_backward = _entry("pack_backward")
low_rank_linear = _entry("low_rank_linear")
low_rank_add = _entry("low_rank_add")
low_rank_linear_backward = _entry("low_rank_linear_backward")
pack_siblings = _entry("pack_siblings")
siblings_linear = _entry("siblings_linear")
siblings_linear_backward = _entry("siblings_linear_backward")
dropout_mask = _entry("dropout_mask")
pack_layers = _entry("pack_layers")
pack_layers_backward = _entry("pack_layers_backward")
delta_layers = _entry("delta_layers")
merge_layers = _entry("merge_layers")
linear_layers = _entry("linear_layers")
linear_layers_backward = _entry("linear_layers_backward")

__all__ = [
    *NAMES,
    "NAMES",
    "accumulation_dtype",
    "cuda_status",
    "diagonal_in_pack",
    "noise_words",
    "pool_in_packs",
    "rank_multiple",
    "share_siblings",
]
