"""Layouts of packed weights, and the linear layer that reads them by tiles of rows.

    W[r, c] = (codes[r, c] - zero[r, g(c)]) * scale[r, g(c)]

A layout unpacks the codes of some rows; the rest is shared. Forward and backward dequantize W tile
by tile, so that no more than a tile of W is ever in memory, and the backward saves the packed
weight alone. Inputs stay unquantized, even for W8A8.

No library is imported here: a layout is known by the names and dtypes of a layer's own tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.linear import LinearLayer, compute_dtype, linear_shape, stored_weight

_TILE = 1 << 18
"""Numbers of W in a tile: 1 MiB in float32, little beside a model, and enough for a CPU's product.
On a GPU a tile is 32 times as large, so that products and not launches take the time (predicted).
"""

_ROWS = 128
"""A tile's rows are a multiple of it, where blocks of rows and packed words of any layout begin."""

_E2M1 = [sign * number for sign in (1, -1) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
"""The numbers of 4 bits: a sign, two bits of exponent, one of mantissa."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ packs the eight rows of one word."""

_GPTQ = frozenset({"TorchLinear", "TorchQuantLinear", "TritonV2Linear", "TritonV2QuantLinear"})
_AWQ = frozenset({"WQLinear_GEMM", "AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear"})
"""Classes of gptqmodel and AutoAWQ that leave the checkpoint's words as they are. Others rearrange
them for a kernel, some in place and in the same shape."""

MXFP4_EXPERTS = "Mxfp4GptOssExperts"
"""transformers' class for gpt-oss's experts in MXFP4, whose weights are tensors of Triton's."""

CHANGED = ("planar", "online_full_had", "online_partial_had", "adapter")
"""Attributes of gptqmodel's layers under which a layer computes something else."""

_AUTO_ROUND = "auto_round_extension.torch."
"""Modules of AutoRound's layers in GPTQ's layout. All these classes have the same name."""


class Format:
    """A format of quantized weights; ``base`` is always a layer of this format."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, name: str, base: LinearLayer) -> None:
        """Raise ValueError, beginning with ``name``, if the layer cannot give the values of W."""

    def original_dtype(self, base: LinearLayer) -> torch.dtype | None:
        """Return the dtype of the weight before quantization, or None if unknown."""
        return None

    def dequantize(self, base: LinearLayer) -> Tensor:
        """Return the weight (out, in), dequantized to a float dtype that the library chooses."""
        raise NotImplementedError


class Tile(NamedTuple):
    """Some rows of a packed weight."""

    codes: Tensor
    """(rows, in), of any dtype."""
    scale: Tensor
    """(rows, groups), or one row or one group for all."""
    zero: Tensor | None
    """As ``scale``, or None."""
    group: Tensor | int
    """The group of each column (in,), or the number of columns of a group."""


class Layout(Format):
    """A format that is read by rows; the layer's forward is ``tiled_linear``."""

    def tile(self, base: Any, start: int, stop: int) -> Tile:
        """Read the rows from ``start``, a multiple of 128, to before ``stop``."""
        raise NotImplementedError

    def dequantized(self, base: Any, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows (stop - start, in) of W in ``dtype``, computed in float32 or float64."""
        codes, scale, zero, group = self.tile(base, start, stop)
        if isinstance(group, Tensor) and group.device.type == "cpu":  # a GPU would have to wait
            run = -(-len(group) // scale.shape[1])
            group = run if torch.equal(group, torch.arange(len(group)) // run) else group
        wide = torch.promote_types(dtype, torch.float32)
        weight = codes.to(wide)
        if zero is not None:
            weight = weight.sub_(_spread(zero.to(wide), group, weight.shape[1]))
        weight.mul_(_spread(scale.to(wide), group, weight.shape[1]))
        return weight.to(dtype)

    def dequantize(self, base: LinearLayer) -> Tensor:
        """See ``Format``; the dtype is float32."""
        weight = torch.empty(linear_shape(base), device=stored_weight(base).device)
        for rows, tile in _tiles(self, base, weight.dtype):
            weight[rows] = tile
        return weight


class OneByte(Layout):
    """FP8 or int8 numbers with scales of the tensor, of rows, of groups or of blocks."""

    def tile(self, base: Any, start: int, stop: int) -> Tile:
        """See ``Layout``."""
        codes = base.weight[start:stop]
        if codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu":
            numbers = torch.arange(256, dtype=torch.uint8).view(codes.dtype).bfloat16()
            codes = _look_up(numbers, codes.view(torch.uint8))  # faster than a conversion
        return _scaled(base, codes, start, stop)


class PackedIntegers(Layout):
    """compressed-tensors' pack-quantized: integers of 2, 4 or 8 bits in words along a row."""

    def tile(self, base: Any, start: int, stop: int) -> Tile:
        """See ``Layout``."""
        bits = base.quantization_scheme.weights.num_bits
        codes = unpack(base.weight_packed[start:stop], bits)[:, : base.in_features]
        tile = _scaled(base, codes, start, stop)
        if (packed := base._parameters.get("weight_zero_point")) is None:
            middle = torch.full((1, 1), 1 << (bits - 1), device=codes.device)
            return tile._replace(zero=middle)
        words = packed[start * bits // 32 : -(-stop * bits // 32)]
        return tile._replace(zero=unpack(words.t(), bits)[:, : stop - start].t())


class PackedFloats(Layout):
    """MXFP4 and NVFP4: two E2M1 numbers in a byte, the lower bits first."""

    def tile(self, base: Any, start: int, stop: int) -> Tile:
        """See ``Layout``."""
        return _scaled(base, e2m1(stored_weight(base)[start:stop]), start, stop)


class Gptq(Layout):
    """GPTQ: words along a column of W, which is stored as (in, out)."""

    def tile(self, base: Any, start: int, stop: int) -> Tile:
        """See ``Layout``."""
        bits, rows = base.bits, slice(start, stop)
        codes = unpack(base.qweight[:, rows].t(), bits)[:, : linear_shape(base)[1]]
        words = base.qzeros[:, start * bits // 32 : -(-stop * bits // 32)]
        zero = unpack(words, bits)[:, : stop - start].t()
        if self.less_one(base):
            zero = (zero + 1) & ((1 << bits) - 1)
        order = getattr(base, "g_idx", None)
        group = base.group_size if order is None else order.long()
        return Tile(codes, base.scales[:, rows].t(), zero, group)

    def less_one(self, base: Any) -> bool:
        """Return whether zero points are stored less one, as the format's first version has it."""
        if (source := type(base).__module__).startswith(_AUTO_ROUND):
            return source.endswith("_zp")
        # These classes of gptqmodel compute with the second version, whatever a file has.
        second: bool = getattr(base, "REQUIRES_FORMAT_V2", False)
        return not second and getattr(base, "qzero_format", lambda: 1)() == 1


class Awq(Layout):
    """AWQ: words along a row of the stored (in, out), eight rows of W in an order of their own."""

    def tile(self, base: Any, start: int, stop: int) -> Tile:
        """See ``Layout``."""
        words = slice(start // 8, -(-stop // 8))

        def rows(packed: Tensor) -> Tensor:
            order = torch.tensor(_AWQ_ORDER, device=packed.device)
            codes: Tensor = unpack(packed[:, words], 4).unflatten(1, (-1, 8))
            return codes.index_select(2, order).flatten(1)[:, : stop - start].t()

        scale = base.scales[:, start:stop].t()
        group = base.in_features // scale.shape[1]
        return Tile(rows(base.qweight), scale, rows(base.qzeros), group)


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of a linear layer's packed weight, or None."""
    own = {**module._parameters, **module._buffers}
    kind, scheme = type(module).__name__, getattr(module, "quantization_scheme", None)
    by = f"compressed-tensors {_words(scheme.format)}" if scheme is not None else kind
    packed, weight = own.get("weight_packed"), own.get("weight")
    if isinstance(module, nn.Embedding):
        return None
    if packed is not None and scheme is not None:
        bits = scheme.weights.num_bits
        if packed.dtype == torch.int32 and bits in (2, 4, 8):
            return PackedIntegers(f"{by}, {bits} bits")
        if packed.dtype == torch.uint8 and bits == 4:
            return PackedFloats(f"{by}, 4 bits")
    elif weight is not None and isinstance(module, nn.Linear) and kind != "FP8GroupedLinear":
        known = own.get("weight_scale") is not None or own.get("weight_scale_inv") is not None
        if known and "weight_scale_2" in own and weight.dtype == torch.uint8:
            return PackedFloats(f"{by}, nvfp4, 4 bits")
        if known and weight.shape == (module.out_features, module.in_features):
            if weight.dtype == torch.float8_e4m3fn:
                return OneByte(f"{by}, fp8 e4m3")
            if weight.dtype == torch.int8 and scheme is not None:
                return OneByte(f"{by}, 8 bits")
    elif not any(getattr(module, flag, None) for flag in CHANGED):
        bits = getattr(module, "bits", getattr(module, "w_bit", None))
        known = kind in _GPTQ or type(module).__module__.startswith(_AUTO_ROUND)
        if known and "qzeros" in own and bits in (2, 4, 8):
            return Gptq(f"GPTQ ({kind}), {bits} bits")
        if kind in _AWQ and bits == 4:
            return Awq(f"AWQ ({kind}), 4 bits")
    return None


class QuantizedStack(NamedTuple):
    """A packed stacked weight, which is read as its parts are asked for."""

    layout: Layout
    shape: tuple[int, int, int]
    """(experts, out, in)."""
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    weight: Any
    scales: Any

    def parts(self) -> list[Any]:
        """Return each expert's part, in place of a linear layer."""
        _, out, width = self.shape
        stored = (_plain(t)[:, :out] for t in (self.weight, self.scales))  # some are padded
        return [
            SimpleNamespace(
                in_features=width,
                out_features=out,
                block_size=self.block,
                weight=part,
                weight_packed=part,
                _parameters={"weight_scale": scale},
            )
            for part, scale in zip(*stored, strict=True)
        ]


def quantized_stack(module: nn.Module, name: str) -> QuantizedStack | None:
    """Return a stacked weight of a known layout, or None.

    Known layouts are transformers' FP8Experts, with scales of the tensor, of halves, or of blocks,
    and its Mxfp4GptOssExperts with loaded weights, in the order of any card's kernels.
    """
    weight: Any = getattr(module, name, None)
    kind = type(module).__name__
    # With forward_routed (transformers 5.24) the parent can be made to call ``forward``.
    if kind == MXFP4_EXPERTS and hasattr(module, "forward_routed"):
        config = getattr(module, f"{name}_precision_config", None)
        if config is None:
            return None
        experts, width, out = weight.shape
        layout: Layout = PackedFloats(f"{kind}, mxfp4, 4 bits")
        return QuantizedStack(layout, (experts, out, width), (1, 32), weight, config.weight_scale)
    scales = module._parameters.get(f"{name}_scale_inv")
    if weight is None or scales is None or weight.dtype != torch.float8_e4m3fn:
        return None
    _, out, width = weight.shape
    block = getattr(module, "block_size", None) or (out // scales.shape[1], width)
    return QuantizedStack(OneByte(f"{kind}, fp8 e4m3"), tuple(weight.shape), block, weight, scales)


def _plain(stored: Any) -> Tensor:
    """Return numbers in order of experts and rows, whatever order Triton's kernels need."""
    if isinstance(stored, Tensor):
        return stored.detach()
    plain: Tensor = stored.storage.layout.unswizzle_data(stored.storage.data)
    return plain.transpose(-1, -2)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack integers of 2, 4 or 8 bits along the last dimension, the lowest bits first.

    Args:
        words: (..., n), of a dtype of integers.
        bits: bits of each integer.

    Returns:
        uint8 (..., n * bits of a word // bits).
    """
    codes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return codes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def e2m1(packed: Tensor) -> Tensor:
    """Return the float32 numbers (..., 2 n) of packed E2M1 numbers, uint8 (..., n)."""
    return _look_up(torch.tensor(_E2M1, device=packed.device), unpack(packed, 4))


def _look_up(numbers: Tensor, codes: Tensor) -> Tensor:
    """Return the number of each code."""
    return numbers.index_select(0, codes.flatten().int()).view(codes.shape)


def exponents(scale: Tensor) -> Tensor:
    """Return stored scales as they are, or as E8M0 numbers, powers of two, if they are bytes."""
    return scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale


def _scaled(base: Any, codes: Tensor, start: int, stop: int) -> Tile:
    """Return codes with the scales of their rows, and with the zero points if these are bytes."""
    own, (out, width) = base._parameters, linear_shape(base)
    weights: Any = getattr(getattr(base, "quantization_scheme", None), "weights", None)
    block = getattr(base, "block_size", None) or getattr(weights, "block_structure", None)
    scale = own.get("weight_scale")
    scale = exponents(own["weight_scale_inv"] if scale is None else scale)
    if block is None and scale.numel() in (1, out):  # stored as (), (1,), (out, 1) or (1, out)
        scale = scale.reshape(-1, 1)
    size = getattr(weights, "group_size", None)
    block = block or (1, size or -(-width // scale.shape[-1]))

    def rows(grid: Tensor) -> Tensor:
        """Return these rows of a grid that has one row, one per row of W, or one per block."""
        if len(grid) == 1:
            return grid
        if len(grid) == out:
            return grid[start:stop]
        return grid[torch.arange(start, stop, device=grid.device) // block[0]]

    scale_rows = rows(scale).float()
    if (whole := own.get("weight_global_scale")) is not None:
        scale_rows = scale_rows / whole.float()
    if (whole := own.get("weight_scale_2")) is not None:  # ModelOpt's
        scale_rows = scale_rows * whole.float()
    zero = own.get("weight_zero_point")
    zero = None if zero is None or zero.dtype == torch.int32 else rows(zero)
    order = own.get("weight_g_idx")
    return Tile(codes, scale_rows, zero, block[1] if order is None else order.long())


def _spread(grid: Tensor, group: Tensor | int, width: int) -> Tensor:
    """Repeat the numbers of groups (rows, groups) for their columns (rows, width)."""
    if grid.shape[1] == 1:
        return grid
    if isinstance(group, Tensor):
        return grid.index_select(1, group)
    return grid.repeat_interleave(group, 1)[:, :width]


def _words(form: Any) -> str:
    """Return the value of an enumeration's member, or the word itself."""
    return str(getattr(form, "value", form))


def _tiles(layout: Layout, base: Any, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows and the numbers of each tile of W."""
    out, width = linear_shape(base)
    numbers = _TILE if stored_weight(base).device.type == "cpu" else 32 * _TILE
    step = max(_ROWS, numbers // width // _ROWS * _ROWS)
    for start in range(0, out, step):
        stop = min(start + step, out)
        yield slice(start, stop), layout.dequantized(base, start, stop, dtype)


def multiply(layout: Layout, base: Any, x: Tensor) -> Tensor:
    """Compute x W^T (M, out) of x (M, in) by tiles."""
    y = x.new_empty(len(x), linear_shape(base)[0])
    for rows, tile in _tiles(layout, base, x.dtype) if len(x) else ():
        y[:, rows] = x @ tile.t()
    return y


def multiply_back(layout: Layout, base: Any, grad: Tensor) -> Tensor:
    """Compute grad W (M, in) of grad (M, out) by tiles."""
    wide = torch.promote_types(grad.dtype, torch.float32)  # a sum over tiles, rounded once
    dx = grad.new_zeros(len(grad), linear_shape(base)[1], dtype=wide)
    for rows, tile in _tiles(layout, base, grad.dtype) if len(grad) else ():
        dx += grad[:, rows] @ tile
    return dx.to(grad.dtype)


class _TiledLinear(torch.autograd.Function):
    """x W^T over a packed W, or grad W if ``back``; each is the other's backward.

    A backward dequantizes again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, base: LinearLayer, back: bool) -> Tensor:
        ctx.given = layout, base, not back
        out, width = linear_shape(base)
        product, size, given = (multiply_back, width, out) if back else (multiply, out, width)
        return product(layout, base, x.reshape(x.numel() // given, given)).view(*x.shape[:-1], size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _tiled(grad, *ctx.given), None, None, None


def _tiled(x: Tensor, layout: Layout, base: LinearLayer, back: bool) -> Tensor:
    y: Tensor = _TiledLinear.apply(x, layout, base, back)  # type: ignore[no-untyped-call]  # torch's
    return y


def tiled_linear(layout: Layout, base: LinearLayer, x: Tensor) -> Tensor:
    """Compute ``x W^T + bias`` of a layer with a packed weight; differentiable in x.

    Args:
        layout: the layer's layout.
        base: the layer.
        x: (..., in).

    Returns:
        (..., out), in autocast's dtype or that of x.
    """
    dtype = compute_dtype(x)
    y = _tiled(x.to(dtype), layout, base, False)
    return y if base.bias is None else y + base.bias.to(dtype)
