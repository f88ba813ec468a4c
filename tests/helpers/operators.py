"""Helpers for tests of operators: random adapters, memory layouts, and checks."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rasa_ext import ops
from rasa_ext.nn.adapter import Packed
from rasa_ext.nn.packs import pack_layers, ports
from rasa_ext.ops import Factors
from tests.helpers.adapters import Errors, excesses
from tests.helpers.oracle import Adapter

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
P = 0.25


# (tokens, in, out, private ranks, pool ranks): odd sizes, k = r, no tokens, k = 0, all sizes one.
SHAPES = ((5, 9, 7, 3, 6), (3, 17, 2, 0, 5), (0, 6, 4, 2, 4), (8, 16, 24, 4, None), (1, 1, 1, 1, 1))


def floor(dtype: torch.dtype) -> float:
    """Return the smallest error limit for sums in ``dtype``."""
    known = {torch.float64: 1e-14, torch.float32: 1e-6}
    return known.get(dtype, torch.finfo(dtype).eps)


def pack(A, A_pool, B, B_pool, d, dtype, multiple=1) -> tuple[Tensor, Tensor]:
    """Pack one layer with the operator for groups."""
    given = [A], A_pool, [B], B_pool, [] if d is None else [d]
    (Ap,), (Bp,) = ops.pack_group(*given, dtype, multiple)
    return Ap, Bp


def draw_adapter(width, out, own, pooled, device="cpu", dtype=torch.float32) -> Adapter:
    """Draw an adapter; without a pool if ``pooled`` is None."""

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    pools = (None, None) if pooled is None else (draw(pooled, width), draw(out, pooled))
    return Adapter(draw(own, width), pools[0], draw(out, own), pools[1], draw(own + (pooled or 0)))


def random_mask(x: Tensor) -> Tensor:
    """Draw a mask of one bit for each element of x, like dropout's."""
    return torch.randint(256, (-(-x.numel() // 8),), dtype=torch.uint8, device=x.device)


def unpacked(mask: Tensor, shape: torch.Size) -> Tensor:
    """Return the bits of a mask as booleans of ``shape``."""
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.reshape(-1)[: shape.numel()].view(shape).bool()


def draw_mask(x: Tensor, dropout: bool) -> tuple[tuple, Tensor | None]:
    """Return an operator's mask arguments, and the mask as booleans; () and None if no dropout."""
    if not dropout:
        return (), None
    mask = random_mask(x)
    return (mask, 1 / (1 - P)), unpacked(mask, x.shape)


def drop(x: Tensor, kept: Tensor | None, p: float = P) -> Tensor:
    """Apply dropout by definition; return x if ``kept`` is None."""
    return x if kept is None else torch.where(kept, x / (1 - p), 0)


def draw_group(layers, *sizes, device="cpu", dtype=torch.float32) -> list[Adapter]:
    """Draw adapters of a group's layers, which share a pool."""
    first, *others = (draw_adapter(*sizes, device, dtype) for _ in range(layers))
    return [first, *(each._replace(A_pool=first.A_pool, B_pool=first.B_pool) for each in others)]


def lists(adapters: Sequence[Adapter]) -> tuple:
    """Return A, A_pool, B, B_pool, d of a group in the form of the operators' arguments."""
    A, _, B, _, d = map(list, zip(*adapters, strict=True))
    return A, adapters[0].A_pool, B, adapters[0].B_pool, [] if d[0] is None else d


def packed(factors: Factors, dtype: torch.dtype) -> Packed:
    """Return one layer's pack, with ports that carry gradients to the factors."""
    Ap, Bp = pack_layers([factors], dtype)
    return Packed(Ap[0], Bp[0], *ports((Ap, Bp), [factors])[0])


def columns(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def part(t: Tensor) -> Tensor:
    """Return rows with gaps between them, inside a larger tensor."""
    return F.pad(t, (2, 1, 1, 1))[..., 1:-1, 2:-1]


def part_of_columns(t: Tensor) -> Tensor:
    return part(t.mT).mT


def every_other(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, ::2]


def one_row(t: Tensor) -> Tensor:
    return t[..., :1, :].expand_as(t)


def one_number(t: Tensor) -> Tensor:
    return t[..., :1, :1].expand_as(t)


def shifted(t: Tensor, offset: int = 1) -> Tensor:
    """Return a copy that starts ``offset`` elements after the beginning of its memory."""
    return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view_as(t)


# Layouts of one matrix or a stack; the last two repeat values.
LAYOUTS = (columns, part, part_of_columns, every_other, one_row, one_number)


def assert_within(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor],
    dtype: torch.dtype,
    roundings: int = 4,
) -> None:
    """Assert that every element is within a few roundings, relative to ``sizes``.

    ``sizes`` are the formulas over magnitudes. A mean over all elements would hide a wrong one.
    """
    info = torch.finfo(dtype)
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        error = (value.double() - expected[name]).abs()
        # Numbers below `tiny` are spaced eps * tiny apart.
        limit = info.eps * (roundings * sizes[name] + info.tiny)
        assert (error <= limit).all(), f"{name}: {(error / limit).max():.1f} times the limit"


def check_values(
    operators: Callable[..., dict[str, Tensor]],
    formulas: Callable[..., dict[str, Tensor]],
    tensors: Sequence,
    mask: tuple = (),
    kept: Tensor | None = None,
    roundings: int = 4,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute by the operators and by the float64 formulas, and ``assert_within`` that they agree.

    Returns both.
    """
    wide = tree_map_only(Tensor, Tensor.double, list(tensors))
    expected = formulas(*wide, kept)
    sizes = formulas(*tree_map_only(Tensor, Tensor.abs, wide), kept)
    found = operators(*tensors, *mask)
    assert_within(found, expected, sizes, tensors[0].dtype, roundings)
    return found, expected


def check_errors(cases, shape, dtype, dropout: bool, device: str, no_bias) -> dict[str, Tensor]:
    """Check values, and that RMS errors are at most twice plain PyTorch's; return the last results.

    ``cases`` is a module such as ``linear_cases``. Errors are pooled over draws, since one rounding
    error is random. Every second draw has ``no_bias``.
    """
    ours, theirs = Errors(), Errors()
    for turn in range(32):
        tensors = cases.draw(shape, dtype, device)
        if turn % 2:
            tensors[2] = no_bias
        mask, kept = draw_mask(tensors[0], dropout)
        if dropout:
            tensors[0][~kept] *= 1e3  # dropped elements must have no effect
        found, expected = check_values(cases.operators, cases.formulas, tensors, mask, kept)
        ours.add(found, expected)
        theirs.add(cases.formulas(*tensors, kept), expected)
    assert not excesses(ours, theirs, floor(dtype))[0]
    return found


_traced: set[tuple] = set()


def check_operator(name: str, *args) -> None:
    """Check an operator's schema, fake kernel and compilation with torch.library.opcheck.

    The schema, and the fake kernel's sizes, strides and dtypes, are checked for every call. The
    trace under dynamic shapes takes nine tenths of the time and depends only on which arguments are
    given and on their dimensions, so it runs once for each such form.
    """
    operator = getattr(ops, name)
    if not isinstance(operator, torch._ops.OpOverload):  # the PyTorch kernel, a function
        operator = getattr(torch.ops.rasa_ext, name).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    traced = (operator, _form(args))
    # Operators of other namespaces share the package's fake kernels, so their trace is equal.
    if operator.namespace == "rasa_ext" and traced not in _traced:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, args, test_utils=checks)
    _traced.add(traced)  # only after it passed


def _form(value: object) -> object:
    if isinstance(value, Tensor):
        return value.ndim
    if isinstance(value, list):  # one or more tensors of equal form
        return frozenset(map(_form, value))
    if isinstance(value, tuple):
        return tuple(map(_form, value))
    return type(value)
