"""Messages for common mistakes: each says what to do instead."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn

import rasa_ext
from tests.helpers.models import LLAMA
from tests.helpers.refusals import refused

OTHER_NAMES = [
    ({"r": 8}, "rank"),
    ({"lora_alpha": 16}, "alpha"),
    ({"rasa_k": 1}, "k"),
    ({"lora_dropout": 0.1}, "dropout"),
    ({"target_module": ["q_proj"]}, "target_modules"),
    ({"dtype": torch.float32}, "adapter_dtype"),
]


@pytest.mark.parametrize(("given", "meant"), OTHER_NAMES)
def test_arguments_under_other_names(given, meant):
    (name,) = given
    for call in (functools.partial(rasa_ext.patch_model, LLAMA.build()), rasa_ext.RasaConfig):
        with pytest.raises(TypeError, match=rf"'{name}'; did you mean {meant}\?"):
            call(**given)


def test_an_argument_like_none():
    with pytest.raises(TypeError, match=r"'zebra'; expected one of .*rank"):
        rasa_ext.RasaConfig(zebra=1)


def test_configs_copy_and_pickle():
    config = rasa_ext.RasaConfig(rank=3, target_modules=["q"])
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_a_rank_above_the_sides():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 5), nn.Linear(5, 40))
    with pytest.warns(UserWarning, match=r"^rank: 6 .*'1', .*\(5, 40\), and of 1 more") as caught:
        rasa_ext.patch_model(model, rank=6, k=1)
    assert __file__ in {each.filename for each in caught}
    with warnings.catch_warnings(action="error"):
        rasa_ext.patch_model(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)), rank=40, k=1)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.gru = nn.GRU(8, 8)
        self.mlp = nn.Linear(8, 8)


@pytest.mark.parametrize("targets", [["out_proj"], ["attention"], ["gru"], "gru|other"], ids=str)
def test_what_is_no_linear_layer(targets):
    model = Attending()
    call = functools.partial(rasa_ext.patch_model, model, 2, target_modules=targets)
    refused(call, model, "^target_modules: ", "MultiheadAttention|GRU", "modules_to_save")


def test_the_way_out_is_one():
    model = rasa_ext.patch_model(Attending(), 2, modules_to_save=["attention", "gru"])
    assert all(p.requires_grad for p in (*model.attention.parameters(), *model.gru.parameters()))
