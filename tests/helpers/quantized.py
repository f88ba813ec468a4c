"""Layers and models in every quantized format, and their dequantized weights in float64."""

import copy
from collections.abc import Callable

import bitsandbytes
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from tests.helpers import oracle, tiny_lm
from tests.helpers.adapters import Errors, PlainRasa, adapter_of, trainable_copies

WIDTH, OUT = 64, 128
TOKENS = torch.arange(48).view(2, 24) * 7 % 320


def make_model() -> nn.Module:
    """Build the tiny model in the smallest widths that bitsandbytes' CPU kernels take: 64, 128."""
    return tiny_lm.make_model(hidden_size=WIDTH, intermediate_size=OUT)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def off(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in the norm over all entries."""
    return ((found - expected).double().norm() / expected.double().norm()).item()


def bits4(linear: nn.Linear, kind: str = "nf4", nested: bool = False) -> nn.Module:
    size = linear.in_features, linear.out_features, linear.bias is not None
    made = bitsandbytes.nn.Linear4bit(*size, quant_type=kind, compress_statistics=nested)
    return _loaded(made, linear)


def bits8(linear: nn.Linear) -> nn.Module:
    size = linear.in_features, linear.out_features, linear.bias is not None
    return _loaded(bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False), linear)


def _loaded(made: nn.Module, linear: nn.Linear) -> nn.Module:
    made.to(dtype=linear.weight.dtype)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")  # quantizes the weight


def torchao8(linear: nn.Linear) -> nn.Module:
    made = copy.deepcopy(linear)
    quantize_(made, Int8WeightOnlyConfig())
    return made


def torchao4(linear: nn.Linear) -> nn.Module:
    made = copy.deepcopy(linear)
    quantize_(made, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    return made


FORMATS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": bits4,
    "nf4 nested": lambda linear: bits4(linear, nested=True),
    "fp4": lambda linear: bits4(linear, "fp4"),
    "int8": bits8,
    "torchao int8": torchao8,
    "torchao int4": torchao4,
}


def numbers(module: nn.Module) -> Tensor:
    """Compute a quantized layer's weight in float64, only from the stored tensors."""
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        state = weight.quant_state
        absmax = state.absmax.double()
        if state.nested:
            inner = state.state2
            steps = inner.code.double()[state.absmax.long()]
            absmax = steps * inner.absmax.double().repeat_interleave(inner.blocksize)[: len(steps)]
            absmax = absmax + state.offset.double()
        packed = weight.data.view(-1).long()
        codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)
        scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
        return (state.code.double()[codes] * scales).view(state.shape)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        scales = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    codes = weight.qdata.double()

    def spread(each: Tensor) -> Tensor:
        """Expand one number for each row, or each group of a row, to the shape of ``codes``."""
        each = each.double().view(len(codes), -1)
        return each.repeat_interleave(codes.shape[1] // each.shape[1], 1)

    zero = getattr(weight, "zero_point", None)
    return (codes if zero is None else codes - spread(zero)) * spread(weight.scale)


def linears(count: int = 3, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    """Return a stack of layers of two alternating shapes."""
    torch.manual_seed(5)
    shapes = [(WIDTH, OUT), (OUT, WIDTH)] * count
    return nn.Sequential(*(nn.Linear(*shape, bias=bias) for shape in shapes)).to(dtype)


def quantized(model: nn.Module, form: str, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Return a copy of a model with linear layers quantized in one of ``FORMATS``."""
    model = copy.deepcopy(model).requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and name not in skip:
                parent._modules[name] = FORMATS[form](child)
    return model


def dense(model: nn.Module) -> nn.Module:
    """Return a float64 copy of a quantized model, with dequantized weights in plain layers."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Linear) and type(child.weight) is not nn.Parameter:
                plain = nn.Linear(
                    child.in_features, child.out_features, child.bias is not None
                ).double()
                plain.weight = nn.Parameter(numbers(child))
                if child.bias is not None:
                    plain.bias = nn.Parameter(child.bias.detach().double())
                parent._modules[name] = plain
    return model.double()


def layer_errors(base, layer, dtype: torch.dtype, device: str = "cpu") -> tuple[Errors, Errors]:
    """Return a layer's and ``PlainRasa``'s errors against base(x) + x dW^T and its gradients."""
    adapter, ours, theirs = adapter_of(layer), Errors(), Errors()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(33, WIDTH, generator=generator).to(device, dtype)
        grad = torch.randn(33, OUT, generator=generator).to(device, dtype)
        with torch.no_grad():
            alone = base.train()(x).double()
        wanted = oracle.linear_grads(grad, x, numbers(base), adapter)
        wanted["y"] = alone + x.double() @ oracle.delta(adapter).T
        leaf = trainable_copies({"": adapter})[""]
        ours.add(observe(layer.train(), x, adapter, grad), wanted)
        theirs.add(observe(PlainRasa(base, leaf), x, leaf, grad), wanted)
    return ours, theirs


def observe(layer, x, adapter, grad) -> dict[str, Tensor]:
    """Run a step of a layer; return output and gradients of input and ``adapter``."""
    x = x.clone().requires_grad_()
    y = layer(x)
    leaves = {"x": x, **adapter._asdict()}
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
