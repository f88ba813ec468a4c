"""Packed layouts: numbers, gradients of all layers, memory, merging, files and refusals."""

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from compressed_tensors.quantization import QuantizationStatus
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_
from transformers import GptOssConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8GroupedLinear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import rasa_ext
from rasa_ext.base_layers import layouts
from rasa_ext.base_layers.quantized import format_of, stored_bytes
from rasa_ext.peft import RasaConfig
from tests.helpers import experts, oracle
from tests.helpers.adapter_folders import same_exports
from tests.helpers.adapters import (
    RANK,
    Errors,
    adapted_layers,
    adapters,
    excesses,
    gradients,
    patched,
    randomize,
)
from tests.helpers.layouts import (
    COMPRESSED,
    LAYOUTS,
    AwqTorchLinear,
    PlainQuantLinear,
    QuantLinear,
    TorchLinear,
    compressed,
    dense,
    excesses_over_packed,
    fp8_experts,
    from_folder,
    gptq,
    numbers,
    packed_layers,
    packed_model,
    shuffled,
)
from tests.helpers.memory import LiveBytes, saved_storages
from tests.helpers.peft import plain
from tests.helpers.quantized import TOKENS, bits4, logits, off

FOLDERS = [form for form in COMPRESSED if form != "packed int4 zero"]
"""transformers 5.24 and compressed-tensors 0.20 do not load packed zero points."""


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Set tiles to 128 rows, so that layers with 160 rows need two."""
    monkeypatch.setattr(layouts, "_TILE", 1)


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Run a training step; return logits and the gradients of input and adapters."""
    inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    result = model.train()(inputs_embeds=inputs, labels=TOKENS)
    found = adapters(plain(model) if hasattr(model, "peft_config") else model)
    for adapter in found.values():
        adapter.map(lambda t: setattr(t, "grad", None))
    result.loss.backward()
    seen = {"logits": result.logits.detach(), "input": inputs.grad, **gradients(found)}
    assert all(gradient is not None and gradient.norm() > 0 for gradient in seen.values())
    return seen


WRITTEN = {
    "gptq": TorchLinear,
    "gptq_v2": TorchLinear,
    "awq": AwqTorchLinear,
    "auto_round": QuantLinear,
}
"""Layers with act-order, zero points, zero points, and neither."""


@pytest.mark.parametrize("form", WRITTEN)
def test_what_gptqmodel_and_autoround_wrote(form):
    """Layers of 32 x 64 that gptqmodel 7.6 and auto-round 0.16 loaded, and what they compute."""
    stored = load_file(Path(__file__).parent / "data" / "gptq.safetensors")
    tensors = {key: t for name, t in stored.items() for of, key in [name.split(".")] if of == form}
    weight = tensors.pop("weight")
    layer = WRITTEN[form](nn.Linear(64, 32, bias=False), 4, **tensors)
    layer.group_size = 32
    found = format_of(layer).dequantize(layer)
    assert off(found, weight) < torch.finfo(torch.float16).eps  # in which the libraries compute


def one(form: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a single layer in a layout."""
    return form(nn.Sequential(nn.Linear(64, 160).requires_grad_(False)))[0]


def test_zero_points_as_they_are():
    """AutoRound's own export stores them so."""
    layer = one(gptq(kind=PlainQuantLinear))
    found = format_of(layer).dequantize(layer)
    torch.testing.assert_close(found.double(), numbers(layer), rtol=2e-7, atol=0)


def test_order_of_groups():
    """compressed-tensors up to 0.18 loads act-order's groups of columns as ``weight_g_idx``."""
    layer = one(compressed("W4A16", group_size=16))
    codes = layouts.unpack(layer.weight_packed, 4).double() - 8
    scale = shuffled(layer).weight_scale.double()[:, layer.weight_g_idx.long()]
    found = format_of(layer).dequantize(layer)
    torch.testing.assert_close(found.double(), (codes * scale).detach(), rtol=2e-7, atol=0)


def through_peft(base: nn.Module) -> nn.Module:
    model = get_peft_model(base, RasaConfig(r=RANK, rasa_k=1, task_type="CAUSAL_LM"))
    randomize(plain(model), 4)
    return model


def checkpointed(base: nn.Module) -> nn.Module:
    model = patched(base, seed=4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


ENTRANCES = {
    "float32": (lambda base: patched(base, seed=4), torch.float32),
    "bfloat16": (lambda base: patched(base, seed=4), torch.bfloat16),
    "checkpointed": (checkpointed, torch.float32),
    "peft": (through_peft, torch.float32),
}


CASES = [(form, dtype) for form in LAYOUTS for dtype in ("float32", "bfloat16")]
CASES += [(form, how) for form in ("packed int4", "FP8Linear") for how in ("checkpointed", "peft")]


@pytest.mark.parametrize(("form", "entrance"), CASES)
def test_gradients_of_all_layers(form, entrance, figure):
    """Gradients of input and adapters match those over the dequantized base in float64."""
    enter, dtype = ENTRANCES[entrance]
    base = packed_model(form, dtype)
    reference = {n: t.double() for n, t in step(patched(dense(base), seed=4)).items()}
    ours, theirs = Errors(by_kind=True), Errors(by_kind=True)
    theirs.add(step(patched(dense(base, dtype), seed=4)), reference)
    ours.add(step(enter(base)), reference)
    bad, ratio = excesses(ours, theirs, 1e-6, 4 if dtype == torch.float32 else 2)
    largest = max(ours.relative().values())
    figure(f"{form}, {entrance}: error {largest:.1e}, {ratio:.2f} times a dense base's")
    assert not bad


def second_order(model: nn.Module) -> torch.Tensor:
    """Return the gradients of the squared norm of an adapter's gradients, in one vector."""
    model.set_attn_implementation("eager")  # the fast kernels have no second derivative
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(TOKENS).logits.square().mean()
    first = torch.autograd.grad(loss, trained, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), trained)
    return torch.cat([grad.flatten() for grad in second])


@pytest.mark.parametrize("form", ["packed int4", "gptq", "FP8Linear"])
def test_second_derivatives_go_through_the_base(form):
    base = packed_model(form)
    found, right = (second_order(patched(each)) for each in (base, dense(base, torch.float32)))
    assert (found - right).norm() <= 1e-4 * right.norm()


@pytest.mark.parametrize("form", FOLDERS)
def test_folders_that_transformers_loads(form, tmp_path):
    """A patched model stays packed after forwards; unpatching restores the model."""
    model = from_folder(form, tmp_path, torch.bfloat16)
    before = {name: t.dtype for name, t in model.named_parameters()}
    expected = step(patched(dense(model), seed=4))["input"]
    rasa_ext.patch_model(model, RANK, 1)
    randomize(model, 4)
    assert off(step(model)["input"], expected) < 0.05
    assert all(format_of(layer.base_layer) for layer in adapted_layers(model).values())
    (said,) = rasa_ext.summary(model).formats.items()
    assert said[1] == 14
    assert f"quantized: 14 layers in {said[0]}" in str(rasa_ext.summary(model))
    rasa_ext.unpatch(model)
    assert {name: t.dtype for name, t in model.named_parameters()} == before
    logits(model)  # the library dequantizes it in its first forward
    assert not any(t.dtype == torch.int32 for t in model.parameters())


def test_what_a_step_holds(monkeypatch):
    """A step holds at most one tile of W at a time and saves nothing of W for the backward."""
    shapes, read = [], layouts.Layout.dequantized

    def watched(self, base, start, stop, dtype):
        shapes.append(stop - start)
        return read(self, base, start, stop, dtype)

    monkeypatch.setattr(layouts.Layout, "dequantized", watched)
    model = patched(packed_model("packed int4")).train()
    with saved_storages() as saved:
        model(input_ids=TOKENS).logits.sum().backward()
    assert max(shapes) == 128
    # 4 of the 14 layers need two tiles; the first three have inputs without gradient.
    assert len(shapes) == (14 + 4) + (14 + 4 - 3)
    weights = {
        t.untyped_storage().data_ptr() for _, _, m in packed_layers(model) for t in m.parameters()
    }
    assert saved
    assert not weights & saved.keys()


@pytest.mark.parametrize("form", ["packed int4 zero", "gptq", "awq", "FP8Linear block"])
def test_one_layer(form):
    """One layer handles a bias, zero tokens, autocast and float64 inputs."""
    base = LAYOUTS[form](nn.Sequential(nn.Linear(64, 160).requires_grad_(False)))
    weight, bias = numbers(base[0]), base[0].bias.double()
    layer = patched(base)[0]
    with torch.no_grad():
        layer.B.zero_()
        layer.pool.B.zero_()
    x = torch.randn(3, 5, 64, dtype=torch.float64)
    for given, limit in ((x, 1e-12), (x.float(), 1e-6), (x[:0], 0)):
        torch.testing.assert_close(
            layer(given).double(), given.double() @ weight.T + bias, rtol=limit, atol=10 * limit
        )
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype == torch.bfloat16
    assert off(y, x @ weight.T + bias) < 0.01


@pytest.mark.parametrize("form", LAYOUTS)
def test_merging(form):
    model = patched(packed_model(form))
    before, bases = logits(model), [layer.base_layer for layer in adapted_layers(model).values()]
    with pytest.warns(UserWarning, match="merging into a dequantized weight"):
        rasa_ext.merge(model)
    for adapter, layer, base in zip(
        adapters(model).values(), adapted_layers(model).values(), bases, strict=True
    ):
        wanted = numbers(base) + oracle.delta(adapter)
        torch.testing.assert_close(layer.base_layer.weight.double(), wanted, rtol=1e-6, atol=1e-6)
    merged = logits(model)
    rasa_ext.unmerge(model)
    assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="merging into a dequantized weight"):
        plain_model = rasa_ext.merge_and_unload(model)
    assert not any(format_of(module) for module in plain_model.modules())
    error = oracle.rounding(plain_model, logits)
    oracle.assert_close(merged, before, error)
    oracle.assert_close(logits(plain_model), before, error)


def test_trained_tokens():
    """An embedding's rows can be trained beside packed layers; a packed layer's rows cannot."""
    model = rasa_ext.patch_model(packed_model("packed int4"), RANK, 1, trainable_token_indices=[3])
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert rasa_ext.summary(model).tokens == {"model.embed_tokens": (3,)}
    rows = {"q_proj": [3]}
    with pytest.raises(ValueError, match=r"train rows of .*q_proj', since it has a quantized"):
        rasa_ext.patch_model(packed_model("packed int4"), RANK, 1, trainable_token_indices=rows)


def test_under_accelerate():
    """Layers with a hook that moves inputs work; offloaded weights are refused."""
    model, x = packed_model("packed int4"), torch.randn(3, 64)
    layer = model.model.layers[0].self_attn.q_proj
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    rasa_ext.patch_model(model, RANK, 1)
    wanted = x.double() @ numbers(layer).T
    assert off(model.model.layers[0].self_attn.q_proj(x), wanted) < 1e-6
    offloaded = packed_model("packed int4")
    layer = offloaded.model.layers[0].self_attn.q_proj
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(ValueError, match=r"q_proj' \(compressed-tensors .* is offloaded"):
        rasa_ext.patch_model(offloaded, RANK, 1)


@pytest.mark.parametrize("form", LAYOUTS)
def test_copies_and_files(form, tmp_path):
    base = packed_model(form)
    model = patched(base)
    rasa_ext.save_adapter(model, tmp_path / "adapter")
    loaded = rasa_ext.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    over_dense = rasa_ext.load_adapter(dense(base, torch.float32), tmp_path / "adapter")
    assert same_exports(tmp_path, model, over_dense)


def renamed(layer: nn.Module, name: str, **attributes: str) -> nn.Module:
    layer.__class__ = type(name, (type(layer),), attributes)
    return layer


def other_names() -> nn.Module:
    """Return a layer of no known library, whose names tell nothing."""
    layer = nn.Module()
    layer.words = nn.Parameter(torch.ones(8, 160, dtype=torch.int32), requires_grad=False)
    return layer


def corrected() -> nn.Module:
    """Return a layer with gptqmodel's EoRA, which adds a low-rank product."""
    layer = one(LAYOUTS["gptq"])
    layer.adapter = nn.Identity()
    return layer


def without_backward() -> nn.Module:
    """Return a layer of compressed-tensors after a forward: dense, rounding inputs without grad."""
    model = compressed("FP8_DYNAMIC")(nn.Sequential(nn.Linear(64, 160)))
    model(torch.ones(1, 64))
    assert model[0].quantization_status == QuantizationStatus.DECOMPRESSED
    return model[0]


def rearranged() -> nn.Module:
    """Rearrange a weight as bitsandbytes does with AVX512-BF16; undoing that changes the scales."""
    layer = bits4(nn.Linear(64, 160))
    weight, convert = layer.weight, bitsandbytes.functional._convert_weight_packed_for_cpu
    weight.data, weight.quant_state = convert(weight.data, weight.quant_state)
    return layer


def opaque() -> nn.Module:
    """Return a layer in torchao's packed int4 format for CPUs."""
    model = nn.Sequential(nn.Linear(64, 160))
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))
    return model[0]


class Rounding(nn.Linear):
    """A layer of no known library, with a detached output."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias).detach()


BITS3, BITS4 = compressed("W3A16", group_size=32), compressed("W4A16", group_size=16)
MXFP4 = GptOssConfig(num_local_experts=2, hidden_size=64, intermediate_size=64)
REFUSED = {
    "3 bits": (lambda: one(BITS3), "'0' is a Linear with a weight of torch.int32"),
    "embedding": (
        lambda: BITS4(nn.Sequential(nn.Embedding(8, 64)), "Embedding")[0],
        "'0' is a Embedding with a weight of torch.int32",
    ),
    # gptqmodel's layers that rearrange packed words in place
    "kernel": (lambda: renamed(one(LAYOUTS["gptq"]), "ExllamaV2Linear"), ".*torch_awq"),
    # AutoGPTQ's layer, whose forward detaches
    "old names": (
        lambda: renamed(one(LAYOUTS["auto-round"]), "QuantLinear", __module__="auto_gptq"),
        "'0' is a QuantLinear with a weight of torch.int32",
    ),
    "other names": (other_names, "'0' is a Module with a weight of torch.int32"),
    "corrected": (corrected, "'0' is a TorchLinear .* and 'adapter'"),
    "grouped": (lambda: FP8GroupedLinear(64, 160, 2, (16, 32)), "'0' is a FP8GroupedLinear with"),
    "evaluated": (without_backward, r"'0' \(Linear\) passes no gradient"),
    "opaque": (opaque, r"'0' \(torchao Int4OpaqueTensor\) passes no gradient"),
    "rearranged": (rearranged, r"'0' \(bitsandbytes nf4\) .*patch it before eval"),
    "experts": (lambda: Mxfp4GptOssExperts(MXFP4), "'0' is a Mxfp4GptOssExperts"),
    "detached": (lambda: Rounding(64, 160), r"'0' \(Rounding\) passes no gradient"),
}


@pytest.mark.parametrize("target", ["0", "1"])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, target):
    """Both front ends refuse these layers by name, adapted or not; the model is unchanged."""
    make, said = REFUSED[case]
    model = nn.Sequential(make(), nn.Linear(160, 64)).requires_grad_(False)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=f"model: {said}"):
        rasa_ext.patch_model(model, RANK, None, target_modules=[target])
    with pytest.raises(ValueError, match=f"model: {said}"):
        get_peft_model(model, RasaConfig(r=RANK, target_modules=[target]))
    assert list(model.modules()) == modules


@pytest.mark.parametrize("grouping", ["shared", "slot", None])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fp8_experts(family, grouping, figure):
    """Gradients of all layers match those over dequantized experts, adapted or not."""
    packed = fp8_experts(experts.model(family), (8, 8)).requires_grad_(False)
    wide = experts.model(family).double().requires_grad_(False)
    wide.set_experts_implementation("eager")  # the only implementation for float64
    for name, weight in wide.named_parameters():
        stored = packed.get_parameter(name)
        if stored.itemsize == 1:
            scale = packed.get_parameter(
                name + "_inv" if name.endswith("scale") else f"{name}_scale_inv"
            )
            scale = scale.double().repeat_interleave(8, -2).repeat_interleave(8, -1)
            weight.copy_(stored.double() * scale)
    unpacked = copy.deepcopy(wide).float()
    bad, ratio = excesses_over_packed(wide, unpacked, packed, grouping, TOKENS % 32)
    figure(f"{family} in FP8, experts {grouping}: error {ratio:.2f} times a dense base's")
    assert not bad
    if grouping is not None:
        with pytest.raises(ValueError, match=r"is packed as .*float8_e4m3fn, and merging"):
            rasa_ext.merge(packed)


@pytest.mark.parametrize(
    "form", ["fp8 block", "packed int4 zero", "nvfp4", "gptq act-order", "awq"]
)
def test_peak_memory_of_a_step(form, monkeypatch, figure):
    """At SmolLM2's shapes, a step's peak above a dense base's is small relative to 30 layers."""
    monkeypatch.setattr(layouts, "_TILE", 1 << 18)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    base = LAYOUTS[form](LlamaForCausalLM(config).bfloat16()).requires_grad_(False)
    packed = 30 // 2 * sum(stored_bytes(layer) for _, _, layer in packed_layers(base))
    peaks = []
    for each in (dense(base, torch.bfloat16), base):
        model = rasa_ext.patch_model(each, 8, 1).train()
        with LiveBytes() as live:
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        peaks.append(live.peak)
    ratio = 1 + max(peaks[1] - peaks[0], 0) / packed
    figure(f"{form}: peak of a step {ratio:.3f} times the packed base, plus activations")
    assert ratio < 1.15
