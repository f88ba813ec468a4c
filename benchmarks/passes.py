"""What each variant of a training step does to memory: products and passes over named tensors.

A variant is lists of lines, forward and backward, for n linears that read one X:

    Y# = X W#'                  a product; ' is transposition
    Y# += X W#'                 one that reads what it adds to
    Y# = U# Bp# + b#            one that adds a bias as it writes, where the linear has one
    pack: A* B* -> Ap Bp*       a pass: what it reads, and what it writes

``#`` is a linear's number; the lines of an inner tuple are run for one linear after the other.
``*`` stands for all numbers. Lines that begin with ``?`` are run with dropout only, with ``!``
without it only, and with ``cast`` where activations are not float32.

A third list holds what is launched once for all layers of a linear's group. A layer has its share
of the launch, and of the group's pool.

M tokens, ``in`` and ``out`` features, R the rank (Rp as it is padded), of which ``own`` are a
layer's own and ``pooled`` the pool's. Shapes and sizes stand in ``SHAPES``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.shapes import Linear

Lines = tuple  # of str, or of tuples of str: those are run for each linear

# Rows, columns, and the kind of element: "x" of the activations' size, "p" a parameter or its
# gradient, in float32, "bit" and "byte" of a mask. One name without its number a line.
SHAPES: dict[str, tuple[str, str, str]] = {
    "X": ("M", "in", "x"),  # the input
    "Xk": ("M", "in", "x"),  # what dropout leaves of it
    "dX": ("M", "in", "x"),
    "dXa": ("M", "in", "x"),  # the adapter's part of it
    "mask": ("M", "in", "bit"),
    "bytes": ("M", "in", "byte"),  # torch's mask
    "noise": ("1", "2", "p"),
    "zero": ("1", "1", "p"),
    "Y": ("M", "out", "x"),  # the output
    "V": ("M", "out", "x"),  # the adapter's part of it
    "Vs": ("M", "out", "x"),  # that, scaled
    "G": ("M", "out", "x"),  # the gradient of Y
    "Gs": ("M", "out", "x"),
    "W": ("out", "in", "x"),
    "b": ("1", "out", "x"),
    "U": ("M", "R", "x"),
    "Ud": ("M", "R", "x"),
    "dU": ("M", "R", "x"),
    "H": ("M", "R", "x"),
    "Hu": ("M", "R", "x"),
    # Ours: the pack and its gradients, by ranks.
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
    "A_sum": ("pooled", "in", "p"),  # the pool's gradients of the layers so far
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
    """Forward and backward of n linears that read one X; what is run once for a group's layers."""

    forward: Lines
    backward: Lines
    group: Lines = ()
    compiled: bool = False  # the library's own kernels and cuBLAS calls, not PyTorch's operators
    sums_dx: bool = True  # whether autograd adds the linears' dX up


FROZEN = Variant(
    forward=(("Y# = X W#'",),),
    backward=(("dX# = G# W#",),),
)

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
            "sum_pool: dA_pool# A_sum# -> A_sum#",
            "sum_pool: dB_pool# B_sum# -> B_sum#",
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

# One autograd node and addmm_ a linear; concatenation, casts and d by autograd, in weight space.
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
            "sum_pool: dA_pool# A_sum# -> A_sum#",
            "sum_pool: dB_pool# B_sum# -> B_sum#",
        ),
    ),
)

# rasa_ext/nn/packs.py: the packs of a step's forward also serve its backward.
_PACKS = (
    (
        "pack: A# A_pool# B# B_pool# d# -> Ap# Bp#",
        "fill: -> zero#",  # what the ports are expanded from
        "pack_backward: dAp# dBp# B# B_pool# d# -> dA# dA_pool# dB# dB_pool# dd#",
    ),
)

# csrc/linear_plan.h: the adapter first, the base last.
OURS = Variant(
    forward=(
        (
            "?randint: -> noise#",
            "?dropout: noise# X -> mask# Xk#",
            "U# = Xs# Ap#'",
            "Y# = U# Bp# + b#",
            "Y# += X W#'",
        ),
    ),
    backward=(
        (
            "?keep: X mask# -> Xk#",
            "H# = G# Bp#'",
            "dBp# = U#' G#",
            "dAp# = H#' Xs#",
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
        "?dropout: noise X -> mask Xk",
        "cat: Ap* -> Ap",
        "U = Xs Ap'",
        ("Y# = U# Bp# + b#",),
        ("Y# += X W#'",),
    ),
    backward=(
        "?keep: X mask -> Xk",
        ("H# = G# Bp#'", "dBp# = U#' G#"),
        "dAp = H' Xs",
        "dX = H Ap",
        "?keep: dX mask -> dX",
        ("dX += G# W#",),
    ),
    group=_PACKS,
    compiled=True,
    sums_dx=False,
)

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
    """One tensor of a step, told from others by its name."""

    name: str
    rows: int
    cols: int
    bytes: float


@dataclass(frozen=True)
class Op:
    """A product or a pass: each tensor that it reads or writes crosses the bus once."""

    kind: str  # "product", or the name of the pass
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    added_to: Tensor | None = None  # of the reads: what a product adds to
    inner: int = 0  # of a product (rows, inner) x (inner, cols)
    base: bool = False  # a product with W
    launches: float = 1.0

    @property
    def bytes(self) -> float:
        return sum(tensor.bytes for tensor in (*self.reads, *self.writes))

    @property
    def flops(self) -> float:
        to = self.writes[0]
        return 2.0 * to.rows * to.cols * self.inner


@dataclass(frozen=True)
class Setting:
    """What decides the sizes: of one X and the linears that read it."""

    tokens: int
    rank: int
    pooled: int  # of these ranks
    itemsize: int  # of activations and weights
    multiple: int = 1  # to which ours pads the rank
    dropout: bool = False
    biased: bool = False
    layers: int = 32  # that share a launch of a group, and its pool


def ops(variant: Variant, linears: Sequence[Linear], setting: Setting) -> list[Op]:
    """The step of the linears that read one X, in order."""
    n = len(linears)
    lines = [*_expand(variant.forward, n), *_expand(variant.backward, n)]
    if variant.sums_dx:
        lines += [f"sum_dx: dX0 dX{i} -> dX0" for i in range(1, n)]
    listed = [(line, replace(setting, layers=1)) for line in lines]
    listed += [(line, setting) for line in _expand(variant.group, n)]
    return [_op(line, linears, its, variant) for line, its in listed if _runs(line, its)]


def _expand(lines: Lines, n: int) -> Iterator[str]:
    for line in lines:
        if isinstance(line, str):
            yield re.sub(r"(\w+)\*", lambda m: " ".join(f"{m[1]}{i}" for i in range(n)), line)
        else:
            for i in range(n):
                yield from (each.replace("#", str(i)) for each in line)


def _runs(line: str, setting: Setting) -> bool:
    kind = line.lstrip("?!").partition(":")[0]
    return not (
        (line.startswith("?") and not setting.dropout)
        or (line.startswith("!") and setting.dropout)
        or (kind == "cast" and setting.itemsize == 4)
    )


def _op(line: str, linears: Sequence[Linear], setting: Setting, variant: Variant) -> Op:
    line = line.lstrip("?!")
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
    if plain == "Xs":  # what the adapter sees
        return _tensor(f"Xk{number}" if setting.dropout else "X", linears, setting, variant)
    linear = linears[int(number or 0)]
    padded = setting.rank + (-setting.rank % setting.multiple if variant.compiled else 0)
    # Without a number the ranks of all linears stand side by side.
    wide = 1 if number else len(linears)
    sizes: Mapping[str, int] = {
        "1": 1,
        "2": 2,
        "M": setting.tokens,
        "in": linear.in_features,
        "out": linear.out_features,
        "R": padded * wide,
        "rank": setting.rank,
        "own": setting.rank - setting.pooled,
        "pooled": setting.pooled,
    }
    rows, cols, element = SHAPES[plain]
    size = {"x": setting.itemsize, "p": 4, "byte": 1, "bit": 1 / 8}[element]
    count = sizes[rows] * sizes[cols] / (setting.layers if plain.endswith("_pool") else 1)
    return Tensor(name, sizes[rows], sizes[cols], math.ceil(count * size))
