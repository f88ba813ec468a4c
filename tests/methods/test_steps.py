"""The API with which a method of another package changes its adapter between steps."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import rasa_ext
from rasa_ext.methods import LoraConfig, read_method
from rasa_ext.training import adapter_of, replace_tensors
from tests.helpers.methods import base, case, inputs, rasa_linears
from tests.helpers.outside import PickedConfig, VeraConfig
from tests.helpers.refusals import refused


def one_more(model: nn.Module):
    """Return a config with k and rank larger by one, and new tensors for all layers and pools."""
    config, layers = adapter_of(model, rasa_ext.RasaConfig)
    later = dataclasses.replace(config, k=config.k + 1, rank=config.rank + 1)
    changed = {layer: later.layer_tensors(layer.spec) for layer in layers.values()}
    groups: dict[nn.Module, list] = {}
    for layer in layers.values():
        groups.setdefault(layer.pool, []).append(layer.spec)
    changed |= {pool: later.group_tensors(specs) for pool, specs in groups.items()}
    return later, changed


def test_the_layers_in_order():
    model = case("rasa")
    config, layers = adapter_of(model, LoraConfig, rasa_ext.RasaConfig)
    assert layers == rasa_linears(model)
    assert list(layers) == list(rasa_linears(model))
    assert config is next(iter(layers.values())).config
    with pytest.raises(ValueError, match="with LoraConfig or VeraConfig, got RasaConfig"):
        adapter_of(model, LoraConfig, VeraConfig)
    with pytest.raises(ValueError, match="unpatched"):
        adapter_of(base(), LoraConfig)


def test_layers_and_pools_own_what_they_are_given(tmp_path):
    model, x = case("rasa"), inputs()
    before = model(x)
    later, changed = one_more(model)
    replace_tensors(model, later, changed)
    assert {layer.effective_rank for layer in rasa_linears(model).values()} == {3 + 3 * 2}
    for owner, tensors in changed.items():
        own = owner.tensors() if isinstance(owner, rasa_ext.nn.RasaPool) else owner.own_tensors()
        assert own.keys() == tensors.keys()
        assert all(own[name] is tensors[name] for name in own)
    assert not torch.equal(model(x), before)
    rasa_ext.save_adapter(model, tmp_path)
    again = rasa_ext.load_adapter(base(), tmp_path)
    assert torch.equal(again(x), model(x))


def test_layers_that_are_not_given_stay():
    model = case("lora")
    config, layers = adapter_of(model, LoraConfig)
    later, first = dataclasses.replace(config, alpha=1.0), next(iter(layers.values()))
    rest = [(layer, layer.own_tensors()) for layer in layers.values() if layer is not first]
    replace_tensors(model, later, {first: later.layer_tensors(first.spec)})
    assert all(layer.config is later for layer in layers.values())
    for layer, own in rest:
        assert all(tensor is own[name] for name, tensor in layer.own_tensors().items())


def test_what_is_refused():
    model = case("rasa")
    later, changed = one_more(model)
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    refused(lambda: replace_tensors(wrapped, later, changed), model, "model.module")
    rasa_ext.merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        replace_tensors(model, later, changed)
    assert all(layer.config is not later for layer in rasa_linears(model).values())


def test_in_several_processes_it_says_to_wrap_again(recwarn):
    """A DistributedDataParallel around the model, made before, cannot be seen from inside."""
    model = case("rasa")
    replace_tensors(model, *one_more(model))
    assert not recwarn
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.warns(UserWarning, match=r"^model: .*wrap the model again"):
            replace_tensors(model, *one_more(model))
    finally:
        dist.destroy_process_group()


def test_fields_of_a_method_from_outside():
    """Rank, alpha and mappings are checked for any method; files store a mapping as an object."""

    @dataclasses.dataclass(frozen=True)
    class Mapped(rasa_ext.methods.AdapterConfig):
        method = "mapped"
        alpha: float = 1.0
        past: tuple = rasa_ext.methods.option((), "Counts by name.", counts=1)

    try:
        config = Mapped(past={"up": 2})
        assert config.past == (("up", 2),)
        assert config.to_dict()["rasa_past"] == {"up": 2}
        assert read_method(config.to_dict()) == config
        with pytest.raises(TypeError, match="past: expected an integer, got '2'"):
            Mapped(past={"up": "2"})
        with pytest.raises(ValueError, match="alpha: expected a finite number above 0, got 0"):
            Mapped(alpha=0)
        with pytest.raises(ValueError, match="rank: expected an integer >= 1, got 0"):
            PickedConfig(rank=0)
    finally:
        del rasa_ext.methods.base.METHODS["mapped"]
