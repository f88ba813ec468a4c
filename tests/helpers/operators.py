"""What the operators' tests share: drawn adapters, and the checks of every operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasa_ext import ops
from rasa_ext.nn.packs import Packed, pack_layers, ports
from rasa_ext.ops import Factors
from tests.helpers.oracle import Adapter

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
P = 0.25


# (tokens, in, out, private ranks, pool ranks): odd, k = r, no tokens, k = 0, one.
SHAPES = ((5, 9, 7, 3, 6), (3, 17, 2, 0, 5), (0, 6, 4, 2, 4), (8, 16, 24, 4, None), (1, 1, 1, 1, 1))


def floor(dtype: torch.dtype) -> float:
    """An error that no sum in ``dtype`` is asked to stay below."""
    known = {torch.float64: 1e-14, torch.float32: 1e-6}
    return known.get(dtype, torch.finfo(dtype).eps)


def pack(A, A_pool, B, B_pool, d, dtype, multiple=1) -> tuple[Tensor, Tensor]:
    """The pack of one layer, by the operator for groups."""
    given = [A], A_pool, [B], B_pool, [] if d is None else [d]
    (Ap,), (Bp,) = ops.pack_group(*given, dtype, multiple)
    return Ap, Bp


def draw_adapter(width, out, own, pooled, device="cpu", dtype=torch.float32) -> Adapter:
    """B is stored by ranks; ``pooled`` is None where there is no pool."""

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    pools = (None, None) if pooled is None else (draw(pooled, width), draw(pooled, out).t())
    return Adapter(
        draw(own, width), pools[0], draw(own, out).t(), pools[1], draw(own + (pooled or 0))
    )


def random_mask(x: Tensor) -> Tensor:
    """A bit for each element of x, as dropout's."""
    return torch.randint(256, (-(-x.numel() // 8),), dtype=torch.uint8, device=x.device)


def unpacked(mask: Tensor, shape: torch.Size) -> Tensor:
    """The bits of a mask as booleans."""
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.reshape(-1)[: shape.numel()].view(shape).bool()


def drop(x: Tensor, kept: Tensor | None, p: float = P) -> Tensor:
    """Dropout by its definition; ``kept`` None is none."""
    return x if kept is None else torch.where(kept, x / (1 - p), 0)


def draw_group(layers, *sizes, device="cpu", dtype=torch.float32) -> list[Adapter]:
    """Adapters of a group's layers, which share a pool."""
    first, *others = (draw_adapter(*sizes, device, dtype) for _ in range(layers))
    return [first, *(each._replace(A_pool=first.A_pool, B_pool=first.B_pool) for each in others)]


def lists(adapters: Sequence[Adapter]) -> tuple:
    """A, A_pool, B, B_pool, d of a group as the operators take them."""
    A, _, B, _, d = map(list, zip(*adapters, strict=True))
    return A, adapters[0].A_pool, B, adapters[0].B_pool, [] if d[0] is None else d


def packed(factors: Factors, dtype: torch.dtype) -> Packed:
    """One layer's pack, with ports by which gradients come to the factors."""
    Ap, Bp = pack_layers([factors], dtype)
    return Packed(Ap[0], Bp[0], *ports((Ap, Bp), [factors])[0])


def check_operator(name: str, *args) -> None:
    """Schema (nothing is mutated or aliased unsaid), fake kernel and compilation of an operator."""
    opcheck(getattr(torch.ops.rasa_ext, name).default, args)


_traced: set[tuple] = set()


def opcheck(operator: torch._ops.OpOverload, args: tuple) -> None:
    """torch.library.opcheck, but one trace under dynamic shapes for calls of one form.

    That trace is nine tenths of the time, and sees which arguments are given, of how many
    dimensions. What the fake kernel says of sizes, strides and dtypes, and the schema, are checked
    of every call.
    """
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    traced = (operator, _form(args))
    # Operators over other kernels have the fakes of the package's, which are traced as these.
    if operator.namespace == "rasa_ext" and traced not in _traced:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, args, test_utils=checks)
    _traced.add(traced)  # only now: it has passed


def _form(value: object) -> object:
    if isinstance(value, Tensor):
        return value.ndim
    if isinstance(value, list):  # of alike tensors, one or more
        return frozenset(map(_form, value))
    if isinstance(value, tuple):
        return tuple(map(_form, value))
    return type(value)
