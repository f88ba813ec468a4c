"""Properties of single methods."""

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import methods
from tests.helpers.memory import saved_storages
from tests.helpers.methods import base
from tests.helpers.refusals import refused


@pytest.fixture
def frozen() -> methods.AdapterConfig:
    """A config of rank 4 with a frozen A."""
    return methods.LoraConfig(4, train_A=False)


def test_a_frozen_A_keeps_no_x(frozen):
    x = torch.randn(4096, 64)
    sizes = {}
    for name, its in (("lora", methods.LoraConfig(4)), ("frozen", frozen)):
        model = rasa_ext.patch_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config=its)
        with saved_storages() as kept:
            assert model(x).requires_grad
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        sizes[name] = sum(kept.values())
    A = 4 * 64 * 4  # a frozen A is a buffer, which counts; Parameters do not
    assert sizes["lora"] - sizes["frozen"] >= x.nbytes - A
    assert sizes["frozen"] < x.nbytes / 8  # U, and tensors of the weights' size


def test_a_rank_pattern_of_no_layer_is_refused():
    patterns, model = {"up_proj": 8, "q_proj": 2}, base()
    config = methods.RasaConfig(4, rank_pattern=patterns, target_modules=["up_proj"])
    said = r"rank_pattern: .*'q_proj' matches none of 3"
    refused(lambda: rasa_ext.patch_model(model, config=config), model, said)


BAD = [
    (lambda: methods.LoraConfig(train_A="no"), "train_A: expected True or False, got 'no'"),
    (lambda: methods.LoraConfig(rslora=1), "rslora: expected True or False, got 1"),
    (lambda: methods.RasaConfig(rank_pattern={"x": 0}), "rank_pattern: expected ranks"),
    (lambda: methods.RasaConfig(rank_pattern={4: 4}), "rank_pattern: expected patterns"),
    (lambda: methods.RasaConfig(rank_pattern=[4]), "rank_pattern: expected a mapping"),
    (lambda: methods.LoraConfig.from_dict({"peft_type": "RASA"}), "rasa_method"),
    (lambda: methods.LoraConfig(experts="shared"), "experts: expected None or 'own'"),
]


@pytest.mark.parametrize(("make", "named"), BAD)
def test_bad_input(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()
