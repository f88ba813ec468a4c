"""Training in the ways users train: in every combination, gradients must agree with the oracle."""

import copy
import io
import sys

import pytest
import torch

import rasa_ext
from rasa_ext import ops
from tests.helpers import oracle
from tests.helpers.adapters import (
    FLOOR,
    adapted_layers,
    adapters,
    check_step,
    compare,
    excesses_of,
    gradients,
    patched,
    plain_model,
    randomize,
    through_file,
    trainable_copies,
    wide,
)
from tests.helpers.models import CHECKPOINTED, FAMILIES, GPT2, LLAMA, SEQUENTIAL, T5, TWO_NAMES, ids
from tests.helpers.refusals import Snapshot


@pytest.fixture(params=["on a CPU", "as on a GPU"])
def way(request, monkeypatch) -> None:
    """Run layer by layer, or compute projections together."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(ops, "fuse_projections", lambda *_: True)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
def test_gradient_checkpointing(entry, use_reentrant):
    base = entry.build()
    model = patched(base).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    check_step(entry, base, model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_ones_own(use_reentrant):
    base = CHECKPOINTED.build()  # no input of a checkpoint requires grad
    model = patched(base)
    model.use_reentrant = use_reentrant
    check_step(CHECKPOINTED, base, model)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_file])
@pytest.mark.parametrize("entry", [LLAMA, GPT2, T5, TWO_NAMES], ids=ids)
def test_a_copy_trains_on_its_own(entry, copied):
    """It shares pools among its own layers, and nothing with the original."""
    base = entry.build()
    model = patched(base)
    twin, before = copied(model), Snapshot(model)
    assert {id(p) for p in rasa_ext.adapter_parameters(twin)} == {
        id(p) for p in twin.parameters() if p.requires_grad
    }
    randomize(twin, 8)
    check_step(entry, base, twin)
    rasa_ext.merge(twin)
    rasa_ext.unpatch(twin)
    before.assert_unchanged()
    assert all(p.grad is None for p in model.parameters())
    check_step(entry, base, model, seed=1)


@pytest.mark.parametrize("move", ["dtype", "double and back", "to_empty"])
def test_moving_after_patching(move):
    base = LLAMA.build()
    model = patched(base)
    if move == "dtype":
        model, base = model.to(torch.bfloat16), base.to(torch.bfloat16)
    elif move == "double and back":
        model = model.double().float()
    else:
        state = copy.deepcopy(model.state_dict())
        tables = dict(model.named_buffers())
        model.to("meta").to_empty(device="cpu").load_state_dict(state)
        for name, buffer in model.named_buffers():
            buffer.copy_(tables[name])
    assert {id(p) for p in rasa_ext.adapter_parameters(model)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    check_step(LLAMA, base, model)


def written(model) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


def test_packs_of_an_evaluation_are_not_written():
    model = patched(LLAMA.build())
    size = len(written(model))
    with torch.no_grad():
        LLAMA.loss(model, LLAMA.inputs(0))
    assert abs(len(written(model)) - size) < 1000


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(base_dtype, adapter_dtype, way):
    """Errors are at most twice plain PyTorch's under the same autocast; gradients keep dtypes."""
    base = LLAMA.build().to(base_dtype)
    model = patched(base, adapter_dtype=adapter_dtype)
    # Pool over draws, since the error of one small gradient varies much.
    ours, theirs, (*_, observed) = compare(LLAMA, base, model, autocast=torch.bfloat16, draws=4)
    assert {v.dtype for k, v in observed.items() if k != "logits"} == {adapter_dtype}
    largest = max(theirs.relative().values())
    assert max(ours.relative().values()) <= 2 * largest
    assert largest < 0.1
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert layer(x).dtype == y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(base_dtype, adapter_dtype):
    base = LLAMA.build().to(base_dtype)
    model = patched(base, adapter_dtype=adapter_dtype)
    assert {p.dtype for p in rasa_ext.adapter_parameters(model)} == {adapter_dtype}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {base_dtype}
    check_step(LLAMA, base, model)
    assert LLAMA.loss(model, LLAMA.inputs(0))[0].dtype == base_dtype


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)], ids=str)
@pytest.mark.parametrize("hooked", [False, True])
def test_outputs_can_be_modified_in_place(shape, hooked):
    """Outputs can be modified in place like nn.Linear's, whichever path made them."""
    model = patched(torch.nn.Sequential(torch.nn.Linear(6, 4))).train()
    if hooked:  # takes the path for other bases
        model[0].base_layer.register_forward_hook(lambda module, args, output: output)
    x = torch.randn(shape)
    grads = []
    for in_place in (False, True):
        y = model(x)
        y = y.mul_(2).relu_() if in_place else (y * 2).relu()
        grads.append(torch.autograd.grad(y.square().sum(), rasa_ext.adapter_parameters(model)))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.fixture
def replicate(monkeypatch):
    """torch's ``replicate`` for nn.DataParallel, with all copies on the CPU."""
    module = sys.modules["torch.nn.parallel.replicate"]

    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [
            [t.detach() if detach else t.clone() for t in tensors] for _ in devices
        ],
    )
    return module.replicate


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("entry", [LLAMA, SEQUENTIAL], ids=ids)
def test_replicas_of_data_parallel(entry, k, replicate):
    """Replicas have tensors instead of parameters; gradients reach the model's parameters."""
    base = entry.build()
    model = patched(base, 4, k).train()
    found = adapters(model)
    halves = [entry.inputs(i, torch.float32) for i in range(2)]

    def total(models, halves):
        pairs = [entry.loss(each, inputs) for each, inputs in zip(models, halves, strict=True)]
        return torch.stack([logits for logits, _ in pairs]), sum(loss for _, loss in pairs)

    def observed(models, adapters):
        logits, loss = total(models, halves)
        loss.backward()
        return {"logits": logits.detach(), **gradients(adapters)}

    copies = trainable_copies(found)
    reference = oracle.run_model(base, copies, lambda m: total([m, m], list(map(wide, halves))))
    plain = observed([plain_model(base, copies)] * 2, copies)
    ours = observed(replicate(model, [0, 1]), found)
    assert not excesses_of(ours, plain, reference, FLOOR[torch.float32], by_kind=True)[0]


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_base_are_called(hook, way):
    """Probes, K-FAC and Opacus register such hooks before patching."""
    base, called = LLAMA.build(), []
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        layer = base.model.layers[1].get_submodule(name)
        getattr(layer, hook)(lambda *_, name=name: called.append(name))
    model = patched(base)
    LLAMA.loss(model, LLAMA.inputs(0))[1].backward()
    assert sorted(called) == ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"]
    check_step(LLAMA, base, model)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_base_that_is_trained_too(tensor, way):
    """A base layer's weight or bias, unfrozen after patching, gets its gradient."""
    base = SEQUENTIAL.build().double()
    model = patched(base, adapter_dtype=torch.float64)
    name, layer = list(adapted_layers(model).items())[1]
    trained = getattr(layer.base_layer, tensor).requires_grad_()
    simple = plain_model(base, trainable_copies(adapters(model)))
    expected = getattr(simple.get_submodule(name).base, tensor).requires_grad_()
    for each in (model, simple):
        SEQUENTIAL.loss(each, SEQUENTIAL.inputs(0, torch.float64))[1].backward()
    torch.testing.assert_close(trained.grad, expected.grad)


def test_stages_of_a_pipeline_have_the_pools_that_they_use():
    """The gradients of the stages' pools add up to the whole model's."""
    whole, inputs = patched(LLAMA.build()).train(), LLAMA.inputs(0)
    first, last = copy.deepcopy(whole), copy.deepcopy(whole)
    first.model.layers, first.model.norm = first.model.layers[:1], torch.nn.Identity()
    last.model.layers = last.model.layers[1:]
    hidden = first.model(**inputs, use_cache=False).last_hidden_state
    logits = last(inputs_embeds=hidden, use_cache=False).logits
    expected = LLAMA.call(whole, **inputs)
    torch.testing.assert_close(logits, expected)
    for output in (logits, expected):
        output.square().mean().backward()
    pools = {n: p for n, p in whole.named_parameters() if "rasa_pool" in n}
    assert pools
    for name, parameter in pools.items():
        stages = [stage.get_parameter(name).grad for stage in (first, last)]
        torch.testing.assert_close(sum(stages), parameter.grad)


def test_adapters_over_one_copy_of_a_base_train_as_alone():
    base = LLAMA.build()
    tensors = (*base.parameters(), *base.buffers())
    weights = {t.data_ptr() for t in tensors}
    models = [copy.deepcopy(base, {id(t): t for t in tensors}) for _ in range(2)]
    for seed, model in enumerate(models, 2):
        randomize(rasa_ext.patch_model(model, 2 * seed, 1), seed)
    for model in models:
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} <= weights
        check_step(LLAMA, LLAMA.build(), model)
