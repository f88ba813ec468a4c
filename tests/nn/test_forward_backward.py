"""Errors of logits and gradients from the float64 oracle, compared with those of plain PyTorch."""

import copy

import accelerate
import pytest
import torch
from torch import nn

import rasa_ext
from tests.helpers import experts, oracle, peft
from tests.helpers.adapters import (
    FLOOR,
    RANK,
    adapted_layers,
    adapter_of,
    adapters,
    compare,
    excesses,
    patched,
    randomize,
)
from tests.helpers.models import ENCODER, FAMILIES, GPT2, LLAMA, OTHERS, VIT

# A family decides the modules; k and the dtype the arithmetic: no pool, only a pool, a cast.
CASES = [(entry, RANK // 2, torch.float32) for entry in (*FAMILIES, *OTHERS)]
CASES += [(LLAMA, k, torch.float32) for k in (0, RANK)]
CASES += [(entry, 1, torch.bfloat16) for entry in (LLAMA, GPT2, VIT)]


@pytest.mark.parametrize(
    ("entry", "k", "dtype"), CASES, ids=lambda value: getattr(value, "name", str(value))
)
def test_models(entry, k, dtype, device, figure):
    base = entry.build().to(device, dtype)
    model = patched(base, RANK, k)
    assert list(adapted_layers(model)) == entry.targets(base)
    ours, theirs, _ = compare(entry, base, model)
    bad, worst = excesses(ours, theirs, FLOOR.get(dtype, 0.0))
    largest = max(ours.relative().values())
    figure(
        f"{entry.name} k={k} {dtype} {device}: largest error {largest:.1e} "
        f"(plain PyTorch {max(theirs.relative().values()):.1e}), worst ratio {worst:.2f}"
    )
    assert not bad


@pytest.mark.parametrize("front", [patched, peft.adapted])
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_fast_path(padded, front):
    """The eval path must use the adapters, although it reads ``linear1.weight`` directly."""
    base = ENCODER.build()
    model = front(base).eval()
    found = adapters(model if front is patched else peft.plain(model))
    inputs = ENCODER.inputs(0)
    kept = torch.ones(3, 6, dtype=torch.bool)
    if padded:
        kept[1, 4:] = kept[2, 2:] = False
        inputs["src_key_padding_mask"] = ~kept
    with torch.no_grad():
        got = ENCODER.call(model, **inputs)
        without = ENCODER.call(base.eval(), **inputs)
    dense = oracle.dense_model(base, found).train()
    expected = ENCODER.call(dense, **{**inputs, "x": inputs["x"].double()})
    assert not torch.allclose(without[kept], got[kept], atol=0.1)
    torch.testing.assert_close(got[kept].double(), expected[kept], rtol=1e-5, atol=1e-5)
    back = rasa_ext.unpatch(model) if front is patched else model.unload()
    assert back.layers[0].activation_relu_or_gelu == base.layers[0].activation_relu_or_gelu


VIEWS = [
    lambda x: x.transpose(0, 1),
    lambda x: x[:, ::2],
    lambda x: x[:1].expand(5, -1, -1),
    lambda x: x.flip(-1)[..., :],
]


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_inputs_and_gradients(view):
    stack = nn.Sequential(*(nn.Linear(9, 7) for _ in range(3))).double()
    base, layer = stack[1], patched(stack, adapter_dtype=torch.float64)[1]
    storage = torch.randn(4, 6, 9, dtype=torch.float64, requires_grad=True)
    x = view(storage)
    x.retain_grad()
    y = layer(x)
    grad = torch.randn(y.shape[::-1], dtype=torch.float64).permute(*reversed(range(y.ndim)))
    y.backward(grad)
    expected = oracle.linear_grads(
        grad.reshape(-1, 7), x.reshape(-1, 9), base.weight, adapter_of(layer)
    )
    torch.testing.assert_close(x.grad.reshape(-1, 9), expected["x"])
    for field, tensor in adapter_of(layer)._asdict().items():
        torch.testing.assert_close(tensor.grad, expected[field])


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_over_a_base_that_accelerate_offloads(to, tmp_path):
    """Offloaded weights are loaded layer by layer; the adapter stays on the computing device."""
    base = LLAMA.build().eval()
    model, inputs = patched(base).eval(), LLAMA.inputs(0, torch.float32)
    rasa_ext.save_adapter(model, tmp_path / "adapter")
    offloaded = [copy.deepcopy(base) for _ in range(2)]
    for each in offloaded:
        device = torch.device("cpu")
        if to == "cpu":
            accelerate.cpu_offload(each, device)
        else:
            accelerate.disk_offload(each, tmp_path / "weights", device)
        assert {p.device.type for p in each.parameters()} == {"meta"}
    rasa_ext.load_adapter(offloaded[0], tmp_path / "adapter")
    randomize(rasa_ext.patch_model(offloaded[1], RANK, 1), 3)
    for again in offloaded:
        with torch.no_grad():
            expected, found = (LLAMA.loss(each, inputs)[0] for each in (model, again))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        randomize(again, 5)
        rasa_ext.load_adapter(again, tmp_path / "adapter")
        with torch.no_grad():
            torch.testing.assert_close(LLAMA.loss(again, inputs)[0], expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"^model: .*'model\.layers\.0\."):
            rasa_ext.merge(again)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("front", ["patch", "peft"])
def test_offloaded_after_patching(front, offload, tmp_path):
    model = patched(LLAMA.build()) if front == "patch" else peft.adapted(LLAMA.build())
    if offload == "cpu":
        accelerate.cpu_offload(model.eval(), torch.device("cpu"))
    else:
        accelerate.disk_offload(model.eval(), tmp_path, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="offloaded"):
        LLAMA.loss(model, LLAMA.inputs(0, torch.float32))


def test_offloaded_experts_are_refused():
    model = experts.model()
    accelerate.cpu_offload(model, torch.device("cpu"))
    hooked = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"^experts: "):
        rasa_ext.patch_model(model, RANK, 1, experts="shared")
    assert {name: type(module) for name, module in model.named_modules()} == hooked
