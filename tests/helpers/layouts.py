"""Models in packed layouts, each written by the layout's own library if it is installed.

GPTQ and AWQ layers are stand-ins with the names of gptqmodel 7.6's and AutoRound 0.16's, which
take minutes to install. ``tests/quantized/data`` has what these libraries wrote.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.compressed_tensors import (
    CompressedTensorsFP8Linear,
    quantize_fp8_per_row,
)
from transformers.integrations.finegrained_fp8 import (
    FP8Linear,
    Fp8Quantize,
    replace_with_fp8_linear,
)

import rasa_ext
from rasa_ext.ops import accumulation_dtype
from tests.helpers import experts, tiny_lm
from tests.helpers.adapters import excesses_of

WIDTH, INNER = 64, 160
"""Multiples of every layout's group size; 160 rows are one tile of 128 and a partial tile."""


def make_model() -> nn.Module:
    return tiny_lm.make_model(hidden_size=WIDTH, intermediate_size=INNER)


def compressed(preset: str, **weights: Any) -> Callable[[nn.Module], nn.Module]:
    """Return a function that compresses a model by a compressed-tensors preset.

    ``weights`` replaces arguments of the preset's weight quantization.
    """

    def write(model: nn.Module, kind: str = "Linear") -> nn.Module:
        scheme = preset_name_to_scheme(preset, [kind])
        given = scheme.weights.model_dump() | weights
        scheme.weights = QuantizationArgs(**given)
        if (inputs := scheme.input_activations) is not None and inputs.group_size == 128:
            inputs.group_size = 32
        apply_quantization_config(
            model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
        )
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                _calibrate(module, scheme.weights)
        ModelCompressor.from_pretrained_model(model).compress_model(model)
        return model

    return write


def _calibrate(module: Any, args: QuantizationArgs) -> None:
    """Set scales and zero points for a drawn share of the largest and smallest weight."""
    weight, own, whole = module.weight.detach(), module.weight_scale, None
    if args.strategy == "tensor_group":
        whole = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(whole)
    share = torch.rand(own.shape) + 0.5
    scale, zero = calculate_qparams(share * weight.min(), share * weight.max(), args, whole)
    own.data = scale.to(own.dtype)
    if getattr(module, "weight_zero_point", None) is not None:
        module.weight_zero_point.data = zero.to(torch.int8)


def fine_grained(block: tuple[int, int] | None, scale_fmt: str = "float") -> Any:
    """Return a function that replaces layers by FP8Linear, as transformers does on a GPU."""
    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))

    def layer(linear: nn.Linear) -> nn.Module:
        bias = linear.bias is not None
        size = linear.in_features, linear.out_features
        made = FP8Linear(*size, block, scale_fmt=scale_fmt, has_bias=bias)
        state = quantize.convert({"weight": linear.weight.detach()})
        if block is None:
            state["weight_scale_inv"] = state["weight_scale_inv"].reshape(())
        made.weight = nn.Parameter(state["weight"], requires_grad=False)
        made.weight_scale_inv = nn.Parameter(state["weight_scale_inv"], requires_grad=False)
        made.bias = linear.bias
        return made

    return lambda model: _replaced(model, layer)


class _Kernel(nn.Module):
    """A layer with the attributes of gptqmodel's, but without a kernel."""

    sizes = "in_features", "out_features"

    def __init__(self, linear: nn.Linear, bits: int, **tensors: Tensor) -> None:
        super().__init__()
        for name, size in zip(self.sizes, (linear.in_features, linear.out_features), strict=True):
            setattr(self, name, size)
        self.bits = bits
        for name, tensor in (*tensors.items(), ("bias", linear.bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())


class TorchLinear(_Kernel):
    """gptqmodel's GPTQ layer, which computes with the format's second version."""

    REQUIRES_FORMAT_V2 = True

    def qzero_format(self) -> int:
        return 1  # also for a file in the second version


class TorchQuantLinear(_Kernel):
    """An older GPTQ layer, whose zero points are stored less one."""


class QuantLinear(_Kernel):
    """AutoRound's layer of AutoGPTQ's export; zero points are stored less one."""

    __module__ = "auto_round_extension.torch.qlinear_torch_zp"
    sizes = "infeatures", "outfeatures"


class PlainQuantLinear(QuantLinear):
    """AutoRound's layer of its own export; zero points are stored as they are."""

    __module__ = "auto_round_extension.torch.qlinear_torch"


class AwqTorchLinear(_Kernel):
    """An AWQ layer."""


def row_wise(model: nn.Module) -> nn.Module:
    """Replace linear layers by transformers' layer for FP8 kernels, with scales (1, out)."""

    def layer(linear: nn.Linear) -> nn.Module:
        bias = linear.bias is not None
        made = CompressedTensorsFP8Linear(linear.in_features, linear.out_features, bias)
        weight, scale = quantize_fp8_per_row(linear.weight.detach())
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.weight_scale = nn.Parameter(scale[None], requires_grad=False)
        made.bias = linear.bias
        return made

    return _replaced(model, layer)


def fp8_experts(model: nn.Module, block: tuple[int, int] | None) -> nn.Module:
    """Replace layers by transformers' FP8Experts and FP8Linear, as its quantizer does on a GPU."""
    config = FineGrainedFP8Config(weight_block_size=block)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))
    before = dict(model.named_parameters())
    replace_with_fp8_linear(model, ["lm_head"], config)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and name in before:
            key = name.rpartition(".")[2]
            module = model.get_submodule(name.rpartition(".")[0])
            for own, tensor in quantize.convert({key: before[name].detach()}).items():
                setattr(module, own, nn.Parameter(tensor, requires_grad=False))
    return model


def gptq(
    bits: int = 4, act_order: bool = False, kind: type[_Kernel] = TorchLinear, less: int = 0
) -> Any:
    """Return a function that packs a model in GPTQ's format, with words along the inputs.

    ``less`` is 1 for zero points that are stored less one.
    """
    size = 16

    def layer(linear: nn.Linear) -> nn.Module:
        width = linear.in_features
        group = torch.arange(width) // size
        if act_order:
            group = group[torch.randperm(width, generator=torch.Generator().manual_seed(0))]
        codes, scale, zero = _integers(linear.weight.detach(), group, bits)
        made = kind(
            linear,
            bits,
            qweight=_packed(codes.t(), bits, 0),
            qzeros=_packed((zero.t() - less) % (1 << bits), bits, 1),
            scales=scale.t().contiguous(),
            **({} if issubclass(kind, QuantLinear) else {"g_idx": group.int()}),
        )
        made.group_size, made.adapter = size, None
        made.numbers = (codes - zero[:, group]).double() * scale[:, group].double()
        return made

    return lambda model: _replaced(model, layer)


def awq(size: int = 16) -> Any:
    """Return a function that packs a model in AWQ's format.

    Words run along the outputs, with eight integers in each word in AWQ's own order.
    """

    def layer(linear: nn.Linear) -> nn.Module:
        group = torch.arange(linear.in_features) // size
        codes, scale, zero = _integers(linear.weight.detach(), group, 4)

        def packed(each: Tensor) -> Tensor:
            ordered = each.t().unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)
            return _packed(ordered, 4, 1)

        stored = scale.t().contiguous()
        made = AwqTorchLinear(linear, 4, qweight=packed(codes), qzeros=packed(zero), scales=stored)
        made.numbers = (codes - zero[:, group]).double() * scale[:, group].double()
        return made

    return lambda model: _replaced(model, layer)


def _integers(weight: Tensor, group: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers (out, in), float16 scales (out, groups) and zero points (out, groups)."""
    members = [weight[:, group == each] for each in range(int(group.max()) + 1)]
    low = torch.stack([each.amin(1) for each in members], 1).clamp_max(0)
    high = torch.stack([each.amax(1) for each in members], 1).clamp_min(0)
    top = (1 << bits) - 1
    scale = ((high - low) / top).half()
    zero = (-low / scale).round().clamp(0, top).long()
    codes = (weight / scale[:, group] + zero[:, group]).round().clamp(0, top).long()
    return codes, scale, zero


def _packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack integers into 32-bit words along ``dim``, the first integer in the lowest bits."""
    each = 32 // bits
    split = codes.unflatten(dim, (-1, each)).movedim(dim + 1, 0)
    words = sum(part << (bits * at) for at, part in enumerate(split))
    return (words - (words >> 31 << 32)).int()  # in two's complement


def _replaced(model: nn.Module, layer: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and name != "lm_head":
                parent._modules[name] = layer(child)
    return model


COMPRESSED = {
    "fp8 tensor": compressed("FP8"),
    "fp8 channel": compressed("FP8_DYNAMIC"),
    "fp8 block": compressed("FP8_BLOCK", block_structure=[48, 32]),
    "mxfp8": compressed("MXFP8A16"),
    "int8": compressed("INT8"),
    "packed int8": compressed("W8A16", group_size=16),
    "packed int4": compressed("W4A16", group_size=16),
    "packed int4 channel": compressed("W4A16", strategy="channel", group_size=None),
    "packed int4 zero": compressed("W4A16_ASYM", group_size=16),
    "mxfp4": compressed("MXFP4"),
    "nvfp4": compressed("NVFP4A16"),
}
LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    **COMPRESSED,
    "FP8Linear": fine_grained(None),
    "FP8Linear block": fine_grained((16, 32)),
    "FP8Linear block ue8m0": fine_grained((16, 32), "ue8m0"),
    "fp8 kernel": row_wise,
    "gptq": gptq(),
    "gptq int8": gptq(8, kind=TorchQuantLinear, less=1),
    "auto-round": gptq(kind=QuantLinear, less=1),
    "gptq act-order": gptq(act_order=True),
    "awq": awq(),
}


def packed_model(form: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the tiny model in a layout."""
    return LAYOUTS[form](make_model().to(dtype)).requires_grad_(False)


def from_folder(form: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save the tiny model in a compressed-tensors layout, and load it with transformers."""
    model = packed_model(form, dtype)
    model.save_pretrained(folder)
    ModelCompressor.from_pretrained_model(model).update_config(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def packed_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield each packed layer with the parent and the name in the parent."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            own = isinstance(child, FP8Linear | CompressedTensorsFP8Linear | _Kernel)
            if own or getattr(child, "quantization_scheme", None) is not None:
                yield parent, name, child


def numbers(layer: Any) -> Tensor:
    """Return a packed layer's weight in float64, from the layout's library or saved when packed."""
    if isinstance(layer, _Kernel):
        return layer.numbers
    if isinstance(layer, CompressedTensorsFP8Linear):
        return layer.weight.double() * layer.weight_scale.double().T
    if isinstance(layer, FP8Linear):
        scale = layer.weight_scale_inv.double()
        for dim, size in enumerate(layer.block_size or ()):
            scale = scale.repeat_interleave(size, dim)
        return layer.weight.double() * scale
    scheme: QuantizationScheme = layer.quantization_scheme
    own = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    if (whole := own.get("weight_global_scale")) is not None:  # the library's result is rounded
        rows, half = own["weight_packed"].shape
        codes = unpack_fp4_from_uint8(own["weight_packed"], rows, 2 * half, torch.float64)
        scale = own["weight_scale"].double() / whole.double()
        return codes * scale.repeat_interleave(16, 1)
    if own["weight_scale"].dtype != torch.uint8:
        own["weight_scale"] = own["weight_scale"].double()
    library = BaseCompressor.get_value_from_registry(scheme.format.value)
    return library.decompress(own, scheme)["weight"].double()


def shuffled(layer: Any, seed: int = 1) -> Any:
    """Give a packed layer of compressed-tensors groups of columns in another order: act-order."""
    width, groups = layer.in_features, layer.weight_scale.shape[1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    group = (torch.arange(width) // (width // groups))[order].int()
    layer.weight_g_idx = nn.Parameter(group, requires_grad=False)
    return layer


def dense(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a copy of a packed model with the dequantized weights in plain layers."""
    model = copy.deepcopy(model)
    for parent, name, layer in packed_layers(model):
        out, width = (weight := numbers(layer)).shape
        plain = nn.Linear(width, out, layer.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        parent._modules[name] = plain
    if (handle := getattr(model, "ct_decompress_hook", None)) is not None:
        handle.remove()
    return model.to(dtype)


def step_over_experts(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Return logits, and gradients of the input and the trainable parameters."""
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    logits.to(accumulation_dtype(logits.dtype)).square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), "input": inputs.grad, **trained}


def excesses_over_packed(
    wide: nn.Module, plain: nn.Module, packed: nn.Module, grouping: str | None, tokens: Tensor
) -> tuple[dict[str, str], float]:
    """Return ``excesses`` of a model patched over a packed base, compared with a dense one.

    ``wide`` is the dense base in float64, from which errors are measured.
    """
    seen = []
    for base in (wide, plain, packed):
        # It warns of experts that it leaves out.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            model = rasa_ext.patch_model(base, 3, 1, experts=grouping).train()
        experts.randomize(model, 4)  # a draw at which rounding turns no choice of a router
        seen.append(step_over_experts(model, tokens))
    return excesses_of(seen[2], seen[1], seen[0], 1e-6, by_kind=True, times=4)
