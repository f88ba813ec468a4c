"""Packs: made once for each forward, but for steps of ``generate``.

``tests/walks`` compares values and gradients in any order of forwards, backwards and writes.
"""

import contextlib
import copy
import functools
import weakref
from unittest import mock

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import rasa_ext
import rasa_ext.peft
from rasa_ext import ops
from rasa_ext.nn import packs as module_of_packs
from tests.helpers import experts
from tests.helpers.adapters import adapters, patched, plain_model, trainable_copies
from tests.helpers.models import LLAMA, T5, ids
from tests.helpers.oracle import Adapter
from tests.helpers.threads import run_in_threads

X = [torch.randn(3, 6, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]


@pytest.fixture
def packs(monkeypatch) -> list:
    """A list that gets an entry for every packing of a group or of stacked experts."""
    made = []

    def counting(direct, *args):
        pack = direct(*args)
        made.append(weakref.ref(pack[0]))
        return pack

    for name in ("pack_group", "differentiable_pack"):
        monkeypatch.setattr(ops, name, functools.partial(counting, getattr(ops, name)))
    return made


def chain(layers: int = 3) -> tuple[nn.Module, nn.Module, dict[str, Adapter]]:
    """Return a group's layers, the official formula over copies of adapters, and the copies."""
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))).double()
    model = patched(base, adapter_dtype=torch.float64).train()
    copies = trainable_copies(adapters(model))
    return model, plain_model(base, copies), copies


def parameters(found: dict[str, Adapter]) -> set[Tensor]:
    return {tensor for adapter in found.values() for tensor in adapter}


def loss(y: Tensor) -> Tensor:
    return y.square().sum()


def test_gradients_of_a_part_of_the_tensors():
    model, simple, copies = chain()
    for names in (("A",), ("B_pool", "d"), ("A_pool", "B")):
        found = [
            torch.autograd.grad(
                loss(each(X[0])), [getattr(a, n) for n in names for a in (list(its.values())[1],)]
            )
            for each, its in ((model, adapters(model)), (simple, copies))
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("field", Adapter._fields)
def test_a_write_between_forward_and_backward_is_refused(field):
    model, *_ = chain()
    y = loss(model(X[0]))
    with torch.no_grad():
        getattr(adapters(model)["1"], field).mul_(1.0)
    with pytest.raises(RuntimeError, match="expected an adapter that is unchanged"):
        y.backward()
    loss(model(X[0])).backward()


def test_a_write_to_a_layer_that_takes_no_part_is_not():
    model, *_ = chain()
    y = loss(model[0](X[0]))
    with torch.no_grad():
        model[1].B.mul_(2)
    y.backward()
    assert model[0].B.grad is not None


def test_functional_call_reads_the_given_tensors():
    model, simple, copies = chain()
    loss(model(X[0])).backward()
    for tensor in parameters(copies):
        tensor.data.mul_(1.5)
    given = {n: (1.5 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
    given |= {n: p for n, p in model.named_parameters() if not p.requires_grad}
    y = torch.func.functional_call(model, given, (X[1],))
    torch.testing.assert_close(y, simple(X[1]))
    loss(y).backward()
    loss(simple(X[1])).backward()
    torch.testing.assert_close(given["1.B"].grad, copies["1"].B.grad)
    torch.testing.assert_close(given["rasa_pool_0_A"].grad, copies["0"].A_pool.grad)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_group_is_packed_once_a_forward(use_reentrant, packs):
    """Each training step packs a group once; recomputation in a checkpoint reuses the packs."""
    model = patched(LLAMA.build()).train()
    groups = len({id(layer.pool) for layer in model.modules() if hasattr(layer, "pool")})
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.01)
    for step in range(1, 4):
        LLAMA.loss(model, LLAMA.inputs(0))[1].backward()
        assert len(packs) == groups * step
        optimizer.step()
    assert groups == 7


def test_layers_that_are_called_in_pairs_do_not_pack_in_pairs(packs):
    """Two inputs that pass each layer in turn, such as two towers, pack every layer twice."""
    model, *_ = chain(layers=5)
    a, b = X[0], X[1]
    for layer in model:
        a, b = layer(a), layer(b)
    loss(a + b).backward()
    # The first layer packs the group in both calls. From the second layer's second call, layers
    # pack only themselves.
    assert len(packs) == 2 + 1 + 3 * 2
    with torch.no_grad():
        model(X[2])
    assert len(packs) == 2 + 1 + 3 * 2 + 1


@pytest.mark.parametrize("beams", [1, 2])
def test_steps_of_generate_pack_nothing(beams, packs):
    """Only the forward over the prompt packs the groups."""
    model = patched(LLAMA.build()).eval()
    prompt = LLAMA.inputs(0)["input_ids"]
    model.generate(prompt, max_new_tokens=5, num_beams=beams, use_cache=True, pad_token_id=0)
    assert len(packs) == 7


@pytest.mark.parametrize("by_peft", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_steps_of_generate_pack_no_experts(family, by_peft, packs):
    """Nor what else sees the tokens of all rows as one batch, such as a shared expert."""
    base = experts.model(family).eval()
    if by_peft:
        config = rasa_ext.peft.RasaConfig(r=3, rasa_experts="slot")
        model = get_peft_model(base, config)
    else:
        model = rasa_ext.patch_model(base, 3, experts="slot")
    options = {"use_cache": True, "pad_token_id": 0, "min_new_tokens": 1}
    prompt = torch.randint(1, 32, (3, 4))
    model.generate(input_ids=prompt, max_new_tokens=1, **options)
    first = len(packs)
    model.generate(input_ids=prompt, max_new_tokens=4, **options)
    assert len(packs) == 2 * first > 0


def test_packs_of_past_forwards_are_freed_at_once(packs):
    """Packs, also an evaluation's, are freed without waiting for the garbage collector."""
    model, *_ = chain()
    with torch.no_grad():
        model(X[0])
    for x in X:
        loss(model(x)).backward()
    assert [each() is None for each in packs] == [True, True, True, False]
    loss(model(X[0]))
    model.eval()
    assert all(each() is None for each in packs)
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_threads_that_serve_one_model():
    model, simple, _ = chain()
    model.eval()
    with torch.no_grad():
        expected, found = simple(X[0]), []

    def serve(_: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                found.append(model(X[0]))
                model[0].drop_pack()

    run_in_threads(4, serve)
    assert len(found) == 80
    for y in found:
        torch.testing.assert_close(y, expected)


def decode(module) -> None:
    """Tell a module that is called alone what the model's forward tells: a step of ``generate``."""
    for adapter in module.adapters():
        adapter.packs._decoding.now = True


EVERY, PAIRS, LATER, LAST = [0, 1, 2], [0, 0, 1, 1, 2, 2], [1, 2], [2]
ORDERS = [(EVERY, each) for each in (EVERY, PAIRS, LATER, LAST)]
ORDERS += [(each, EVERY) for each in (PAIRS, LATER, LAST)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("first", "second"), ORDERS)
def test_a_forward_sees_writes_through_data(first, second, grad):
    """Weight averages, evolution strategies and line searches write so, between two forwards."""
    model, simple, copies = chain()

    def run(layers, order):
        return functools.reduce(lambda x, index: layers[index](x), order, X[0])

    with torch.set_grad_enabled(grad):
        run(model, first)
        for tensor in parameters(adapters(model)) | parameters(copies):
            tensor.data.mul_(1.5)
        torch.testing.assert_close(run(model, second), run(simple, second))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("entry", [LLAMA, T5], ids=ids)
def test_generate_sees_writes_through_data(entry, length):
    """Also in a decoder whose first step has one token for each row and an empty cache."""
    base = entry.build().eval()
    model, other = patched(base).eval(), patched(base, seed=4).eval()
    prompt = torch.arange(2 * length).view(2, length) + 3
    options = {"max_new_tokens": 3, "pad_token_id": 0, "output_logits": True, "bos_token_id": 1}
    options |= {"return_dict_in_generate": True, "use_cache": True, "eos_token_id": None}
    expected = other.generate(prompt, **options).logits
    first = model.generate(prompt, **options).logits
    assert not torch.equal(first[0], expected[0])
    pairs = zip(rasa_ext.adapter_parameters(model), rasa_ext.adapter_parameters(other), strict=True)
    for mine, new in pairs:
        mine.data.copy_(new)
    for mine, wanted in zip(model.generate(prompt, **options).logits, expected, strict=True):
        assert torch.equal(mine, wanted)


@torch.no_grad()
def test_one_step_of_time_is_no_step_of_generate():
    """Such as mono audio, (batch, 1, n), without a cache."""
    model, simple, copies = chain()
    model(X[0][:, None])
    for tensor in parameters(adapters(model)) | parameters(copies):
        tensor.data.mul_(1.5)
    torch.testing.assert_close(model(X[0][:, None]), simple(X[0][:, None]))


# Optimizers whose kernels do not raise a tensor's version. transformers' Trainer uses the first.
UNSEEN = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "8-bit": lambda p: bitsandbytes.optim.Lion8bit(p, lr=0.1, min_8bit_size=0),
}


@pytest.mark.parametrize("optimizer", UNSEEN)
def test_a_step_that_raises_no_version_is_seen(optimizer):
    model, x = patched(nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96))), torch.ones(3, 1, 96)
    trained = rasa_ext.adapter_parameters(model)
    step = UNSEEN[optimizer](trained).step
    loss(model(x)).backward()
    with torch.no_grad():
        before, versions = model(x), [p._version for p in trained]
        step()
        assert [p._version for p in trained] == versions
        after = model(x)
        assert not torch.allclose(after, before)
        assert torch.equal(after, copy.deepcopy(model)(x))


def test_packs_of_a_cast_adapter_are_not_trained():
    """A forward with grad restores the dtype, though another layer's packed the group before."""
    model = patched(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))).bfloat16().eval()
    x = X[0].bfloat16()
    with torch.no_grad():
        model[0](x)
    with pytest.warns(UserWarning, match="adapter_dtype"):
        model[1](x)
    assert {p.dtype for p in rasa_ext.adapter_parameters(model)} == {torch.float32}


@torch.no_grad()
def test_a_replica_of_data_parallel_reads_its_own_tensors():
    """It has not joined the group."""
    model, simple, copies = chain()
    model(X[0])
    replica = model[1]._replicate_for_data_parallel()
    replica.A, replica.B, replica.d = model[1].A.clone(), 2 * model[1].B, model[1].d.clone()
    torch.testing.assert_close(model[1](X[1]), simple[1](X[1]))
    copies["1"].B.mul_(2)
    torch.testing.assert_close(replica(X[1]), simple[1](X[1]))


@torch.no_grad()
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("grouping", experts.GROUPINGS)
@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_experts_see_writes_to_every_source(family, grouping, k, packs):
    model = experts.patched(experts.model(family), grouping, 3, k).eval()
    module, inputs = experts.adapted(model)[1], experts.inputs(1, dtype=torch.float32)
    decode(module)
    for stack in module.stacks().values():
        sources = stack.adapter().sources()
        assert len(sources) == (3 if k == 0 else 5)
        for source in filter(Tensor.numel, sources):
            before = module(*inputs)
            source.mul_(1.5)
            packs.clear()
            after = module(*inputs)
            assert len(packs) == (1 if grouping == "layer" else 2)  # layers in a group
            packs.clear()
            assert torch.equal(module(*inputs), after)
            assert not packs
            assert not torch.allclose(after, before)
            assert torch.equal(after, copy.deepcopy(module)(*inputs))


FORGOTTEN = {
    "train": lambda module: module.train(),
    "eval": lambda module: module.eval(),
    "to": lambda module: module.to("cpu"),
    "drop_packs": rasa_ext.drop_packs,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "experts"])
@pytest.mark.parametrize("way", [*FORGOTTEN, "replaced"])
def test_what_packs_are_forgotten_by(way, kind):
    """A step of ``generate`` misses a write through .data, unless one of these drops the pack."""
    if kind == "linear":
        model, *_ = chain()
        module = owner = model[1]
        inputs = [X[0][:, None]]
    else:
        module = experts.adapted(experts.patched(experts.model(), "shared"))[1]
        owner, inputs = module.down_proj, experts.inputs(1, dtype=torch.float32)
    decode(module)
    before = module(*inputs)
    owner.B.data.mul_(2)
    assert torch.equal(module(*inputs), before)
    if way == "replaced":
        new = nn.Parameter(owner.d.clone())
        while new._version < owner.d._version:
            new.mul_(1)
        owner.d = new
    else:
        FORGOTTEN[way](module)
    after = module(*inputs)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(module)(*inputs))


def test_a_stream_that_did_not_make_a_pack_waits_for_it_and_the_memory_for_the_stream(monkeypatch):
    """Otherwise a stream could read a pack before it is written, or after its memory is reused."""
    maker, reader, made = mock.Mock(), mock.Mock(), mock.Mock()
    current = [maker]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    model, *_ = chain()
    model.eval()
    pack = mock.Mock(), mock.Mock()
    with torch.no_grad():
        model(X[0])
        (found,) = model[0].packs._caches.values()
        found.made, found.entries[0].pack = (maker, made), pack
        decode(model[0])
        assert model[0].adapter().pack(torch.float64) is pack
        assert not any(each.record_stream.called for each in pack)
        maker.wait_event.assert_not_called()
        current[0] = reader
        assert model[0].adapter().pack(torch.float64) is pack
    reader.wait_event.assert_called_once_with(made)
    for each in pack:
        each.record_stream.assert_called_once_with(reader)


def test_a_capture_packs_each_layer_and_neither_reads_nor_keeps(monkeypatch, packs):
    model, *_ = chain()
    decode(model.eval()[0])

    def run() -> Tensor:  # the model's own forward would find no cache
        return functools.reduce(lambda x, layer: layer(x), model, X[0])

    with torch.no_grad():
        expected = run()
        monkeypatch.setattr(module_of_packs, "_is_capturing", lambda device: True)
        assert torch.equal(run(), expected)
        assert len(packs) == 1 + 3
        monkeypatch.setattr(module_of_packs, "_is_capturing", lambda device: False)
        assert torch.equal(run(), expected)
        assert len(packs) == 1 + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_packs_by_the_operators_of_groups(dtype, monkeypatch):
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))).to(dtype)
    model, x = patched(base).train(), X[0].to(dtype)
    by_group = mock.Mock(wraps=ops.pack_group)
    monkeypatch.setattr(ops, "pack_group", by_group)

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        y = model(x)
        loss(y.float()).backward()
        return y, [p.grad for p in model.parameters() if p.requires_grad]

    monkeypatch.setattr(module_of_packs, "is_compiling", lambda: True)
    expected, grads = step()
    assert not by_group.called
    monkeypatch.setattr(module_of_packs, "is_compiling", lambda: False)
    monkeypatch.setattr(module_of_packs, "_is_capturing", lambda device: True)
    y, again = step()
    assert by_group.call_count == len(base)
    assert torch.equal(y, expected)
    assert len(grads) == 3 * len(base) + 2
    torch.testing.assert_close(again, grads, atol=0, rtol=1e-6)


def test_the_packs_own_device_is_asked_whether_it_captures(monkeypatch):
    """A graph is captured on device 1, then on device 0, while device 0 is current."""
    current, capturing = [0], 1

    @contextlib.contextmanager
    def entered(device):
        current.append(device.index)
        yield
        current.pop()

    ask = module_of_packs._is_capturing
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == capturing)
    asked = {index: ask(torch.device("cuda", index)) for index in (0, 1)}
    assert asked == {0: False, 1: True}
    capturing = 0
    assert ask(torch.device("cuda", 0))
    assert not ask(torch.device("cuda", 1))
    assert not ask(torch.device("cpu"))
    assert current == [0]


def test_inference_tensors_have_no_version_and_are_not_kept(packs):
    model, *_ = chain()
    with torch.inference_mode():
        created = copy.deepcopy(model).eval()
        for _ in range(2):
            created(X[0])
    assert len(packs) == 2 * 3


def test_packs_of_what_has_none():
    for given, error in ((nn.Linear(2, 2), ValueError), ("model", TypeError)):
        with pytest.raises(error, match=r"^model: "):
            rasa_ext.drop_packs(given)


def test_a_compiled_optimizer_steps():
    """The hook that detects an optimizer's step does not prevent compiling the step."""
    model, *_ = chain()
    x = X[0][:, None]
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
    loss(model(x)).backward()
    with torch.no_grad():
        before = model(x)
        torch.compile(optimizer.step, backend="eager")()
        after = model(x)
        assert not torch.allclose(after, before)
        assert torch.equal(after, copy.deepcopy(model)(x))
