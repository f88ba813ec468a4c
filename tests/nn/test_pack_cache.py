"""Packs made without grad: kept while nothing changes, made again after any change."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import pickle
from unittest import mock

import bitsandbytes
import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import ops
from rasa_ext.nn import pack_cache
from rasa_ext.nn.pack_cache import PackCache
from tests.helpers import experts, peft
from tests.helpers.adapters import patched

CPU = torch.device("cpu")
CONFIGS = [rasa_ext.RasaConfig(rank=4, k=k) for k in (0, 1, 4)]


class Source:
    """A pack that counts how often it is made."""

    def __init__(self):
        self.tensors = [torch.ones(2), torch.ones(3)]
        self.made = 0

    def make(self):
        self.made += 1
        return tuple(t * 3 for t in self.tensors)

    def get(self, cache, dtype=torch.float32):
        return cache.get(self.tensors, (dtype, CPU), self.make)


@pytest.mark.parametrize("change", ["value", "tensor", "number", "form", "dropped"])
def test_kept_while_nothing_changes_and_made_again_after_a_change(change):
    cache, source = PackCache(), Source()
    assert source.get(cache) is source.get(cache)
    assert source.made == 1
    if change == "value":
        source.tensors[1].mul_(2)
    elif change == "tensor":
        source.tensors[0] = torch.ones(2)
    elif change == "number":
        source.tensors.pop()
    elif change == "dropped":
        cache.drop()
    source.get(cache, torch.float64 if change == "form" else torch.float32)
    assert source.made == 2
    source.get(cache, torch.float64 if change == "form" else torch.float32)
    assert source.made == 2


def test_a_capture_packs_and_neither_reads_nor_keeps(monkeypatch):
    cache, source = PackCache(), Source()
    kept = source.get(cache)
    monkeypatch.setattr(pack_cache, "_is_capturing", lambda device: True)
    assert source.get(cache) is not kept
    monkeypatch.undo()
    assert source.get(cache) is kept
    source.tensors[0].mul_(2)
    monkeypatch.setattr(pack_cache, "_is_capturing", lambda device: True)
    captured = source.get(cache)
    monkeypatch.undo()
    assert source.get(cache) is not captured
    assert source.made == 4


def test_the_packs_own_device_is_asked_whether_it_captures(monkeypatch):
    """A graph is captured on device 1, then on device 0, and device 0 is the current one."""
    current, capturing = [0], 1

    @contextlib.contextmanager
    def entered(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == capturing)
    asked = {index: pack_cache._is_capturing(torch.device("cuda", index)) for index in (0, 1)}
    assert asked == {0: False, 1: True}
    capturing = 0
    assert pack_cache._is_capturing(torch.device("cuda", 0))
    assert not pack_cache._is_capturing(torch.device("cuda", 1))
    assert not pack_cache._is_capturing(CPU)
    assert current == [0]


def test_inference_tensors_have_no_version_and_are_not_kept():
    cache, source = PackCache(), Source()
    with torch.inference_mode():
        source.tensors[1] = torch.ones(3)
    source.get(cache)
    source.get(cache)
    assert source.made == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_empty(copied):
    cache, source = PackCache(), Source()
    source.get(cache)
    source.get(copied(cache))
    assert source.made == 2


@pytest.fixture
def packs(monkeypatch) -> list:
    """Grows with every pack that is made, of a linear layer or of stacked experts."""
    made = []

    def counting(direct, *args):
        made.append(args)
        return direct(*args)

    for name in ("pack", "pack_experts"):
        monkeypatch.setattr(ops, name, functools.partial(counting, getattr(ops, name)))
    return made


def layers(config, hooked=False, frozen=False) -> nn.Sequential:
    """Two layers of one group; over a base that is no plain GEMM if hooked; A as buffers."""
    model = patched(nn.Sequential(nn.Linear(9, 7), nn.Linear(9, 7)), config=config)
    for layer in model:
        if hooked:
            layer.base_layer.register_forward_hook(lambda module, args, y: y)
        if frozen:
            for owner in (layer, layer.pool) if layer.spec.index == 0 and layer.pool else (layer,):
                owner._buffers["A"] = owner._parameters.pop("A").data
    return model.eval()


def assert_writes_are_seen(module, inputs, sources, packs) -> None:
    """After a write to any source a forward packs once, and never without one."""
    for source in sources:
        before = module(*inputs)
        packs.clear()
        assert torch.equal(module(*inputs), before)
        assert not packs
        if not source.numel():
            continue
        source.mul_(1.5)
        after = module(*inputs)
        assert len(packs) == 1
        assert torch.equal(module(*inputs), after)
        assert len(packs) == 1
        assert not torch.allclose(after, before)
        assert torch.equal(after, copy.deepcopy(module)(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"k={config.k}")
def test_a_layer_sees_writes_to_every_source(config, frozen, hooked, packs):
    """Of whatever method, whether the source is trained or not, its own or the group's."""
    layer = layers(config, hooked, frozen)[1]
    sources = layer.adapter().sources()
    assert len(sources) == (3 if config.k == 0 else 5)
    assert {t.requires_grad for t in sources} == {True, False} if frozen else {True}
    assert_writes_are_seen(layer, [torch.randn(3, 9)], sources, packs)


@torch.no_grad()
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("grouping", experts.GROUPINGS)
@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_experts_see_writes_to_every_source(family, grouping, k, packs):
    model = experts.patched(experts.model(family), grouping, 3, k).eval()
    module, inputs = experts.adapted(model)[1], experts.inputs(dtype=torch.float32)
    for stack in module.stacks().values():
        sources = stack.adapter().sources()
        assert len(sources) == (3 if k == 0 else 5)
        assert_writes_are_seen(module, inputs, sources, packs)


WAYS = ("grad", "train", "eval", "to", "dtype", "replaced")


@pytest.mark.parametrize(
    ("kind", "way"),
    [*itertools.product(("linear", "experts"), WAYS), ("linear", "autocast")],
)
def test_what_packs_are_forgotten_by(kind, way, packs):
    """Writing through .data is invisible; everything else that may follow it is not."""
    if kind == "linear":
        owner = module = layers(CONFIGS[1])[1]
        inputs = [torch.randn(3, 9)]
    else:
        module = experts.adapted(experts.patched(experts.model(), "shared"))[1]
        owner, inputs = module.down_proj, experts.inputs(dtype=torch.float32)
    with torch.no_grad():
        module(*inputs)
        owner.B.data.mul_(2)
    if way == "grad":
        module(*inputs)
    elif way in ("train", "eval"):
        getattr(module, way)()
    elif way == "to":
        module.to("cpu")
    elif way == "dtype":
        module = module.double()
        inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    elif way == "replaced":
        owner.d = nn.Parameter(owner.d.clone())
    packs.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found = module(*inputs)
        assert len(packs) == (2 if kind == "experts" and way != "replaced" else 1)
        assert torch.equal(found, copy.deepcopy(module)(*inputs))


def test_a_stream_that_did_not_make_a_pack_waits_for_it_and_the_memory_for_the_stream(monkeypatch):
    """Else it could read the pack before it is written, or after its memory was used again."""

    maker, reader = mock.Mock(), mock.Mock()
    current = [maker]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(pack_cache, "_is_capturing", lambda device: False)
    cache, sources, form = PackCache(), [torch.ones(2)], (torch.float32, torch.device("cuda:1"))
    made = mock.Mock(device=form[1]), mock.Mock(device=form[1])
    assert cache.get(sources, form, lambda: made) is made
    assert cache.get(sources, form, lambda: None) is made
    assert not any(each.record_stream.called for each in made)
    maker.wait_event.assert_not_called()
    current[0] = reader
    assert cache.get(sources, form, lambda: None) is made
    maker.record_event.assert_called_once_with()
    reader.wait_event.assert_called_once_with(maker.record_event.return_value)
    for each in made:
        each.record_stream.assert_called_once_with(reader)


def _linears():
    model = patched(nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96)))
    return model, lambda each: each(torch.ones(3, 96))


def _peft():
    return peft.tiny(), lambda each: each(peft.TOKENS).logits


def _experts():
    config = rasa_ext.RasaConfig(rank=4, k=1, experts="shared")
    tokens = torch.arange(6).view(2, 3)
    return patched(experts.model(), config=config), lambda each: each(tokens).logits


# Their kernels write without raising a version; the first is the default of transformers' Trainer.
UNSEEN = {
    "fused": functools.partial(torch.optim.AdamW, lr=0.1, fused=True),
    "8-bit": functools.partial(bitsandbytes.optim.Lion8bit, lr=0.1, min_8bit_size=0),
    "32-bit": functools.partial(bitsandbytes.optim.AdamW32bit, lr=0.1),
}


@pytest.mark.parametrize("optimizer", UNSEEN)
@pytest.mark.parametrize("make", [_linears, _peft, _experts])
def test_a_step_that_raises_no_version_is_seen(make, optimizer):
    """In eval mode nothing but the step tells of it: an older policy would answer."""
    model, run = make()
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    step = UNSEEN[optimizer](trained).step
    run(model).square().mean().backward()
    with torch.no_grad():
        before, versions = run(model), [p._version for p in trained]
        step()
        assert [p._version for p in trained] == versions
        after = run(model)
        assert not torch.allclose(after, before)
        assert torch.equal(after, run(copy.deepcopy(model)))


@pytest.mark.parametrize("make", [_linears, _peft, _experts])
def test_packs_dropped_by_hand(make):
    """After what PyTorch cannot see, as a collective's write to a parameter."""
    model, run = make()
    model.eval()
    with torch.no_grad():
        before = run(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(1.5)
        rasa_ext.drop_packs(model)
        after = run(model)
        assert not torch.allclose(after, before)
        assert torch.equal(after, run(copy.deepcopy(model)))


def test_packs_of_what_has_none():
    with pytest.raises(ValueError, match="model: expected a model with adapters of rasa_ext"):
        rasa_ext.drop_packs(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        rasa_ext.drop_packs("model")


def test_a_compiled_optimizer_steps():
    """The hook by which a step is seen stands in no compiler's way."""
    model, run = _linears()
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
    run(model).square().mean().backward()
    with torch.no_grad():
        before = run(model)
        torch.compile(optimizer.step, backend="eager")()
        after = run(model)
        assert not torch.allclose(after, before)
        assert torch.equal(after, run(copy.deepcopy(model)))
