"""The memory traffic of each variant of a training step: products and passes over named tensors.

A variant has lists of lines, forward and backward, for n linears that read one X:

    Y# = X W#'                  a product; ' is transposition
    Y# += X W#'                 a product that reads Y# and adds to it
    Y# = U# Bp# + b#            a product that adds a bias as it writes, if the linear has one
    pack: A* B* -> Ap Bp*       a pass: what it reads, and what it writes

``#`` is a linear's number; the lines of an inner tuple run for one linear after the other. ``*``
stands for all numbers. Lines that begin with ``?`` run only with dropout, with ``!`` only without
it, and with ``cast`` only if activations are not float32. For products with X, ``~`` marks what the
kernels of csrc/cuda/skinny.cuh do, and ``^`` what cuBLAS does without them. For products with G,
``2`` is one read for both products, ``1`` a read for each, and ``0`` cuBLAS.

A third list has what is launched once for all layers of a linear's group. A layer has a share of
the launch, and of the group's pool.

M tokens, ``in`` and ``out`` features, R the rank (Rp when padded), of which ``own`` ranks are
private to a layer and ``pooled`` belong to the pool. ``SHAPES`` has shapes and sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.shapes import Linear

MARKS = "?!~^210"
Lines = tuple  # of str, or of tuples of str: those are run for each linear

# Rows, columns, and the kind of element: "x" has the activations' size, "p" is a float32 parameter
# or gradient, "bit" and "byte" are of a mask. Names have no number here.
SHAPES: dict[str, tuple[str, str, str]] = {
    "X": ("M", "in", "x"),  # the input
    "Xk": ("M", "in", "x"),  # the input after dropout
    "dX": ("M", "in", "x"),
    "dXa": ("M", "in", "x"),  # the adapter's part of dX
    "mask": ("M", "in", "bit"),
    "bytes": ("M", "in", "byte"),  # torch's mask
    "noise": ("1", "2", "p"),
    "zero": ("1", "1", "p"),
    "Y": ("M", "out", "x"),  # the output
    "V": ("M", "out", "x"),  # the adapter's part of Y
    "Vs": ("M", "out", "x"),  # V, scaled
    "G": ("M", "out", "x"),  # the gradient of Y
    "Gs": ("M", "out", "x"),
    "W": ("out", "in", "x"),
    "b": ("1", "out", "x"),
    "U": ("M", "R", "x"),
    "Ud": ("M", "R", "x"),
    "dU": ("M", "R", "x"),
    "H": ("M", "R", "x"),
    # Partial sums of csrc/cuda/skinny.cuh.
    "Upart": ("M*u", "R", "p"),
    "Gpart": ("M*g", "R", "p"),
    "Hpart": ("M*h", "R", "p"),
    "Apart": ("R*a", "in", "p"),
    "Bpart": ("R*b", "out", "p"),
    "Bbpart": ("R*bb", "out", "p"),
    "Hu": ("M", "R", "x"),
    # Ours: the pack and its gradients, with ranks as rows.
    "Ap": ("R", "in", "x"),
    "Bp": ("R", "out", "x"),
    "dAp": ("R", "in", "p"),
    "dBp": ("R", "out", "p"),
    # The parameters, and their gradients.
    "A": ("own", "in", "p"),
    "B": ("own", "out", "p"),
    "A_pool": ("pooled", "in", "p"),
    "B_pool": ("pooled", "out", "p"),
    "d": ("1", "rank", "p"),
    "dA": ("own", "in", "p"),
    "dB": ("own", "out", "p"),
    "dA_pool": ("pooled", "in", "p"),
    "dB_pool": ("pooled", "out", "p"),
    "A_sum": ("pooled", "in", "p"),  # the pool's gradients, summed over the layers so far
    "B_sum": ("pooled", "out", "p"),
    "dd": ("1", "rank", "p"),
    # Joined by torch.cat, as parameters (p) and cast (x); B as (out, R).
    "Aj": ("R", "in", "p"),
    "Bj": ("out", "R", "p"),
    "Bd": ("out", "R", "p"),
    "Ax": ("R", "in", "x"),
    "Bx": ("out", "R", "x"),
    "dc": ("1", "rank", "x"),
    "dAx": ("R", "in", "x"),
    "dBx": ("out", "R", "x"),
    "dAj": ("R", "in", "p"),
    "dBj": ("out", "R", "p"),
    "dBd": ("out", "R", "p"),
    "dot": ("out", "R", "p"),
    "ddc": ("1", "rank", "x"),
}


@dataclass(frozen=True)
class Variant:
    """Forward and backward of n linears that read one X, and what runs once for a group."""

    forward: Lines
    backward: Lines
    group: Lines = ()
    compiled: bool = False  # runs the library's kernels and cuBLAS calls, no PyTorch operators
    sums_dx: bool = True  # whether autograd adds the linears' dX up


FROZEN = Variant(
    forward=(("Y# = X W#'",),),
    backward=(("dX# = G# W#",),),
)

# What autograd adds up if layers make their pool's gradients one by one.
_SUMS = ("sum_pool: dA_pool# A_sum# -> A_sum#", "sum_pool: dB_pool# B_sum# -> B_sum#")

# y = base(x) + ((x A^T) * d) B^T * 1.0, concatenated in every forward; benchmarks/baselines.py.
OFFICIAL = Variant(
    forward=(
        (
            "Y# = X W#'",
            "cat: A# A_pool# -> Aj#",
            "cast: Aj# -> Ax#",
            "cat: B# B_pool# -> Bj#",
            "cast: Bj# -> Bx#",
            "cast: d# -> dc#",
            "?dropout: X -> Xk# bytes#",
            "U# = Xs# Ax#'",
            "mul: U# dc# -> Ud#",
            "V# = Ud# Bx#'",
            "mul: V# -> Vs#",
            "add: Y# Vs# -> Y#",
        ),
    ),
    backward=(
        (
            "mul: G# -> Gs#",
            "H# = Gs# Bx#",
            "dBx# = Gs#' Ud#",
            "mul: H# dc# -> dU#",
            "mul: H# U# -> Hu#",
            "sum: Hu# -> ddc#",
            "dXa# = dU# Ax#",
            "dAx# = dU#' Xs#",
            "?dropout_backward: dXa# bytes# -> dXa#",
            "dX# = G# W#",
            "add: dX# dXa# -> dX#",
            "cast: ddc# -> dd#",
            "cast: dBx# -> dBj#",
            "cast: dAx# -> dAj#",
            "copy: dB# -> dB#",  # a slice of dBj, with gaps between its rows
            *_SUMS,
        ),
    ),
)

# result + lora_B(lora_A(dropout(x))) * scaling, adapters in the base's dtype.
PEFT = Variant(
    forward=(
        (
            "Y# = X W#'",
            "?dropout: X -> Xk# bytes#",
            "U# = Xs# Ax#'",
            "V# = U# Bx#'",
            "mul: V# -> Vs#",
            "add: Y# Vs# -> Y#",
        ),
    ),
    backward=(
        (
            "mul: G# -> Gs#",
            "H# = Gs# Bx#",
            "dBx# = Gs#' U#",
            "dXa# = H# Ax#",
            "dAx# = H#' Xs#",
            "?dropout_backward: dXa# bytes# -> dXa#",
            "dX# = G# W#",
            "add: dX# dXa# -> dX#",
        ),
    ),
)

# One autograd node with addmm_ for each linear. Autograd does concatenation, casts and d, in weight
# space.
ADDMM = Variant(
    forward=(
        (
            "cat: A# A_pool# -> Aj#",
            "cast: Aj# -> Ax#",
            "cat: B# B_pool# -> Bj#",
            "mul: Bj# d# -> Bd#",
            "cast: Bd# -> Bx#",
            "?dropout: X -> Xk# bytes#",
            "U# = Xs# Ax#'",
            "Y# = X W#'",
            "Y# += U# Bx#'",
        ),
    ),
    backward=(
        (
            "H# = G# Bx#",
            "dX# = G# W#",
            "!dX# += H# Ax#",
            "?dXa# = H# Ax#",
            "?dropout_backward: dXa# bytes# -> dXa#",
            "?add: dX# dXa# -> dX#",
            "dAx# = H#' Xs#",
            "dBx# = G#' U#",
            "cast: dAx# -> dAj#",
            "cast: dBx# -> dBd#",
            "mul: dBd# d# -> dBj#",
            "mul: dBd# Bj# -> dot#",
            "sum: dot# -> dd#",
            "copy: dB# -> dB#",
            *_SUMS,
        ),
    ),
)

# rasa_ext/nn/packs.py: the packs of a step's forward also serve its backward.
_PACKS = (
    (
        "pack: A# A_pool# B# B_pool# d# -> Ap# Bp#",
        "fill: -> zero#",  # the ports are expanded from this
        "pack_backward: dAp# dBp# B# B_pool# d# -> dA# dA_pool# dB# dB_pool# dd#",
    ),
)

_OF_G = (
    "2both: G# Bp# U# -> Hpart# Bbpart#",
    "2add_parts: Hpart# Bbpart# -> H# dBp#",
    "1down: G# Bp# -> Gpart#",
    "1grad: G# U# -> Bpart#",
    "1add_parts: Gpart# Bpart# -> H# dBp#",
    "0H# = G# Bp#'",
    "0dBp# = U#' G#",
)

# csrc/linear.cpp: the adapter first, the base last.
OURS = Variant(
    forward=(
        (
            "?randint: -> noise#",
            "?dropout: noise# -> mask#",
            "^?keep: X mask# -> Xk#",
            "^U# = Xs# Ap#'",
            "~!down: X Ap# -> Upart#",
            "~?down: X mask# Ap# -> Upart#",
            "~add_parts: Upart# -> U#",
            "Y# = U# Bp# + b#",
            "Y# += X W#'",
        ),
    ),
    backward=(
        (
            *_OF_G,
            "^?keep: X mask# -> Xk#",
            "^dAp# = H#' Xs#",
            "~!grad: X H# -> Apart#",
            "~?grad: X mask# H# -> Apart#",
            "~add_parts: Apart# -> dAp#",
            "dX# = H# Ap#",
            "?keep: dX# mask# -> dX#",
            "dX# += G# W#",
        ),
    ),
    group=_PACKS,
    compiled=True,
)

# csrc/projections.cpp: one U = X Ap^T, n ranks wide, and one dX.
FUSED = Variant(
    forward=(
        "?randint: -> noise",
        "?dropout: noise -> mask",
        "cat: Ap* -> Ap",
        "^?keep: X mask -> Xk",
        "^U = Xs Ap'",
        "~!down: X Ap -> Upart",
        "~?down: X mask Ap -> Upart",
        "~add_parts: Upart -> U",
        ("Y# = U# Bp# + b#",),
        ("Y# += X W#'",),
    ),
    backward=(
        _OF_G,
        "^?keep: X mask -> Xk",
        "^dAp = H' Xs",
        "~!grad: X H -> Apart",
        "~?grad: X mask H -> Apart",
        "~add_parts: Apart -> dAp",
        "dX = H Ap",
        "?keep: dX mask -> dX",
        ("dX += G# W#",),
    ),
    group=_PACKS,
    compiled=True,
    sums_dx=False,
)


def captured(variant: Variant) -> Variant:
    """Return a variant of ours as a CUDA graph runs it: no group of layers is packed at once."""
    return replace(variant, group=(*variant.group, _SUMS))


BY_NAME: dict[str, Variant] = {
    "frozen": FROZEN,
    "official": OFFICIAL,
    "peft": PEFT,
    "addmm": ADDMM,
    "ours": OURS,
    "ours fused": FUSED,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a step, identified by name."""

    name: str
    rows: int
    cols: int
    bytes: float


KERNELS = ("down", "grad", "both")  # of csrc/cuda/skinny.cuh


def down_parts(tokens: int, features: int, blocks: int = 132) -> int:
    """Return the number of partial sums of ``down``, as csrc/cuda/heuristics.cuh chooses it."""
    most = max(1, min(blocks // math.ceil(tokens / 128), features // 256))
    return math.ceil(features / (64 * math.ceil(math.ceil(features / most) / 64)))


def grad_groups(
    tokens: int, features: int, tile_tokens: int, tile_features: int, blocks: int = 132
) -> int:
    """Return the number of partial sums of ``grad``, as csrc/cuda/heuristics.cuh chooses it."""
    slices = math.ceil(features / tile_features)
    most = max(1, min(blocks // slices, 16, tokens // (4 * tile_tokens)))
    return math.ceil(tokens / (tile_tokens * math.ceil(math.ceil(tokens / most) / tile_tokens)))


@dataclass(frozen=True)
class Op:
    """A product or a pass: each tensor that it reads or writes crosses the bus once."""

    kind: str  # "product", or the name of the pass
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    added_to: Tensor | None = None  # the one of the reads that a product adds to
    inner: int = 0  # of a product (rows, inner) x (inner, cols)
    base: bool = False  # a product with W
    launches: float = 1.0

    @property
    def bytes(self) -> float:
        return sum(tensor.bytes for tensor in (*self.reads, *self.writes))

    @property
    def flops(self) -> float:
        if self.kind in KERNELS:
            wide, narrow = self.reads[0], self.reads[-1]
            rank = narrow.rows if self.kind == "down" else narrow.cols
            return 2.0 * wide.rows * wide.cols * rank * (1 + (self.kind == "both"))
        to = self.writes[0]
        return 2.0 * to.rows * to.cols * self.inner


@dataclass(frozen=True)
class Setting:
    """What decides the sizes, for one X and the linears that read it."""

    tokens: int
    rank: int
    pooled: int  # how many of these ranks
    itemsize: int  # of activations and weights
    multiple: int = 1  # ours pads the rank to a multiple of this
    dropout: bool = False
    biased: bool = False
    layers: int = 32  # layers that share a group's launch and pool
    kernels: bool = False  # whether csrc/cuda/skinny.cuh runs if it supports the shapes

    @property
    def padded(self) -> int:
        """The rank as ours pads it."""
        return self.rank + -self.rank % self.multiple

    def marks(self, wide: int) -> str:
        """Return the marks of the lines that run, with ``wide`` times the ranks beside X."""
        able = self.kernels and self.tokens >= 1024 and self.itemsize == 2
        of_X = "~" if able and self.padded * wide <= 160 else "^"
        of_G = "0" if not able or self.padded > 160 else "2" if self.padded <= 96 else "1"
        return of_X + of_G + ("?" if self.dropout else "!")


def ops(variant: Variant, linears: Sequence[Linear], setting: Setting) -> list[Op]:
    """Return the step of the linears that read one X, in order."""
    n = len(linears)
    lines = [*_expand(variant.forward, n), *_expand(variant.backward, n)]
    if variant.sums_dx:
        lines += [f"sum_dx: dX0 dX{i} -> dX0" for i in range(1, n)]
    listed = [(line, replace(setting, layers=1)) for line in lines]
    listed += [(line, setting) for line in _expand(variant.group, n)]
    marks = setting.marks(1 if variant.sums_dx else n)
    made = [_op(line, linears, its, variant) for line, its in listed if _runs(line, its, marks)]
    # A single sum is the result itself, so nothing adds parts up.
    return [op for op in made if not (op.kind == "add_parts" and op.reads == _alone(op))]


def _expand(lines: Lines, n: int) -> Iterator[str]:
    for line in lines:
        if isinstance(line, str):
            yield re.sub(r"(\w+)\*", lambda m: " ".join(f"{m[1]}{i}" for i in range(n)), line)
        else:
            for i in range(n):
                yield from (each.replace("#", str(i)) for each in line)


def _alone(op: Op) -> tuple[Tensor, ...]:
    return tuple(t for t in op.reads if t.name[0] == "A" and t.rows == op.writes[0].rows)


def _runs(line: str, setting: Setting, marks: str) -> bool:
    bare = line.lstrip(MARKS)
    if bare.startswith("cast:") and setting.itemsize == 4:
        return False
    return set(line[: len(line) - len(bare)]) <= set(marks)


def _op(line: str, linears: Sequence[Linear], setting: Setting, variant: Variant) -> Op:
    line = line.lstrip(MARKS)
    kind, colon, rest = line.partition(": ")

    def tensors(names: str) -> tuple[Tensor, ...]:
        return tuple(_tensor(name, linears, setting, variant) for name in names.split())

    if colon:
        read, _, written = rest.partition("->")
        return Op(kind, tensors(read), tensors(written), launches=1 / setting.layers)
    line, _, bias = line.partition(" + ")
    _, sign, left, right = line.split()
    to, a, b = tensors(line.replace("'", "").replace(sign, ""))
    a_shape = (a.cols, a.rows) if left.endswith("'") else (a.rows, a.cols)
    b_shape = (b.cols, b.rows) if right.endswith("'") else (b.rows, b.cols)
    if (a_shape[0], b_shape[1], a_shape[1]) != (to.rows, to.cols, b_shape[0]):
        raise ValueError(f"{line}: expected shapes that fit, got {a_shape} and {b_shape}")
    adds = sign == "+="
    added = (to,) if adds else tensors(bias) if setting.biased else ()
    return Op(
        "product",
        (a, b, *added),
        (to,),
        to if adds else None,
        inner=a_shape[1],
        base=right.startswith("W"),
    )


def _tensor(name: str, linears: Sequence[Linear], setting: Setting, variant: Variant) -> Tensor:
    plain, number = re.fullmatch(r"(\D+)(\d*)", name).groups()
    if plain == "Xs":  # the adapter's input
        return _tensor(f"Xk{number}" if setting.dropout else "X", linears, setting, variant)
    linear = linears[int(number or 0)]
    padded = setting.padded if variant.compiled else setting.rank
    # A tensor without a number has the ranks of all linears side by side.
    wide = 1 if number else len(linears)
    M, width, out = setting.tokens, linear.in_features, linear.out_features
    sizes: Mapping[str, int] = {
        "M*u": M * down_parts(M, width),
        "M*g": M * down_parts(M, out),
        "M*h": M * math.ceil(out / 256),
        "R*a": padded * wide * grad_groups(M, width, 64, 128),
        "R*b": padded * grad_groups(M, out, 64, 128),
        "R*bb": padded * grad_groups(M, out, 32, 256),
        "1": 1,
        "2": 2,
        "M": M,
        "in": width,
        "out": out,
        "R": padded * wide,
        "rank": setting.rank,
        "own": setting.rank - setting.pooled,
        "pooled": setting.pooled,
    }
    rows, cols, element = SHAPES[plain]
    size = {"x": setting.itemsize, "p": 4, "byte": 1, "bit": 1 / 8}[element]
    count = sizes[rows] * sizes[cols] / (setting.layers if plain.endswith("_pool") else 1)
    return Tensor(name, sizes[rows], sizes[cols], math.ceil(count * size))
