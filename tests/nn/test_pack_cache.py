"""Packs that are kept: fresh after every change, and in place under what captured them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import rasa_ext
from rasa_ext.nn import fused_projections as siblings
from rasa_ext.nn import pack_cache
from rasa_ext.nn.pack_cache import PackCache
from tests.helpers.adapters import patched
from tests.helpers.models import LLAMA, SEQUENTIAL


class Source:
    """A pack that counts how often it is made."""

    def __init__(self):
        self.tensors = [torch.ones(2), torch.ones(3)]
        self.made = 0

    def make(self, dtype, multiple):
        self.made += 1
        return tuple(t.to(dtype) * multiple for t in self.tensors)

    def get(self, cache, dtype=torch.float32, multiple=1):
        return cache.get(self.tensors, dtype, multiple, self.make)


@pytest.fixture
def capturing(monkeypatch):
    """Switches what the cache believes of the current stream."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(pack_cache, "_is_capturing", lambda device: on)

    return switch


def test_kept_while_nothing_changes():
    cache, source = PackCache(), Source()
    assert source.get(cache) is source.get(cache)
    assert source.made == 1


@pytest.mark.parametrize("change", ["value", "tensor", "dtype", "multiple", "dropped"])
def test_made_again_after_a_change(change):
    cache, source = PackCache(), Source()
    source.get(cache)
    options = {}
    if change == "value":
        source.tensors[1].mul_(2)
    elif change == "tensor":
        source.tensors[0] = torch.full((2,), 3.0)
    elif change == "dtype":
        options["dtype"] = torch.float64
    elif change == "multiple":
        options["multiple"] = 2
    else:
        cache.drop()
    found = source.get(cache, **options)
    assert source.made == 2
    fresh = source.make(options.get("dtype", torch.float32), options.get("multiple", 1))
    assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))


def test_a_graph_reads_the_cached_memory_for_good(capturing):
    cache, source = PackCache(), Source()
    source.get(cache)
    capturing(True)
    read = source.get(cache)
    assert source.made == 1
    assert cache.captured
    capturing(False)
    source.tensors[0].mul_(5)
    cache.drop()
    assert source.get(cache) is read  # filled again in place by the next forward
    assert torch.equal(read[0], torch.full((2,), 5.0))
    source.tensors[0].mul_(2)
    source.get(cache, torch.float64)  # another form takes the graph's memory from it no more
    cache.refresh(source.make)
    assert torch.equal(read[0], torch.full((2,), 10.0))


def test_a_pack_of_inference_mode_can_be_filled_again_outside(capturing):
    cache, source = PackCache(), Source()
    with torch.inference_mode():
        source.get(cache)
        capturing(True)
        read = source.get(cache)
    capturing(False)
    source.tensors[0].mul_(5)
    cache.refresh(source.make)
    assert torch.equal(read[0], torch.full((2,), 5.0))


def test_without_a_cached_pack_packing_is_part_of_the_graph(capturing):
    cache, source = PackCache(), Source()
    capturing(True)
    assert source.get(cache) is not source.get(cache)
    assert source.made == 2
    assert not cache.captured


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_empty(copied):
    cache, source = PackCache(), Source()
    source.get(cache)
    source.get(copied(cache))
    assert source.made == 2


@pytest.mark.parametrize("together", [False, True])
def test_repack_fills_every_captured_pack(together, capturing, monkeypatch):
    """Under a graph nothing but memory is read again: what the layers hold must be current."""
    monkeypatch.setattr(siblings, "ENABLED", together)
    model = patched(LLAMA.build()).eval()
    inputs = LLAMA.inputs(0)
    with torch.no_grad():
        for _ in range(2):
            LLAMA.loss(model, inputs)
        capturing(True)
        LLAMA.loss(model, inputs)
        capturing(False)
        caches = [m._cache for m in model.modules() if isinstance(m, rasa_ext.RasaLinear)]
        caches += [m.siblings._cache for m in model.modules() if getattr(m, "siblings", None)]
        packs = [pack for cache in caches for pack in cache._captured.values()]
        # 7 layers in each of 3 blocks; together: q k v, o, gate up, down.
        assert len({id(pack) for pack in packs}) == (12 if together else 21)
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.data.mul_(1.5)  # invisible to versions
        rasa_ext.repack(model)
        twin = copy.deepcopy(model)
        for _ in range(2):
            LLAMA.loss(twin, inputs)
    fresh = [m._cache for m in twin.modules() if isinstance(m, rasa_ext.RasaLinear)]
    fresh += [m.siblings._cache for m in twin.modules() if getattr(m, "siblings", None)]
    for cache, other in zip(caches, fresh, strict=True):
        for pack in cache._captured.values():
            assert all(torch.equal(a, b) for a, b in zip(pack, other._pack, strict=True))


def test_repack_wants_a_patched_model():
    with pytest.raises(ValueError, match="patch_model"):
        rasa_ext.repack(SEQUENTIAL.build())
    with pytest.raises(TypeError, match="model"):
        rasa_ext.repack(3)
