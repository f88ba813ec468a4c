"""Messages for common mistakes: each says what to do instead."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import rasa_ext
from tests.helpers.models import LLAMA
from tests.helpers.refusals import refused


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"r": 8}, "rank"),
        ({"lora_alpha": 16}, "alpha"),
        ({"rasa_k": 1}, "k"),
        ({"lora_dropout": 0.1}, "dropout"),
        ({"target_module": ["q_proj"]}, "target_modules"),
        ({"dtype": torch.float32}, "adapter_dtype"),
    ],
)
def test_arguments_under_other_names(given, meant):
    (name,) = given
    model = LLAMA.build()
    said = rf"patch_model\(\) got an unexpected .* '{name}'; did you mean {meant}\?"
    refused(lambda: rasa_ext.patch_model(model, **given), model, said)
    with pytest.raises(TypeError, match=rf"RasaConfig\(\) got .* '{name}'; .* {meant}\?"):
        rasa_ext.RasaConfig(**given)


def test_an_argument_like_none():
    with pytest.raises(TypeError, match=r"'zebra'; expected one of dropout, .*, rank, k, alpha"):
        rasa_ext.RasaConfig(zebra=1)


def test_configs_copy_and_pickle():
    config = rasa_ext.RasaConfig(rank=3, target_modules=["q"])
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_a_rank_above_the_sides():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 5), nn.Linear(5, 40))
    with pytest.warns(
        UserWarning, match=r"rank: 6 is above .*'1', .*\(5, 40\), and of 1 more"
    ) as caught:
        rasa_ext.patch_model(model, rank=6, k=1)
    (told,) = (each for each in caught if str(each.message).startswith("rank"))
    assert told.filename == __file__
    assert "rank 5 at most. Use a smaller rank" in str(told.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rasa_ext.patch_model(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)), rank=40, k=1)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.gru = nn.GRU(8, 8)
        self.mlp = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ["out_proj"],
            r"cannot adapt 'attention\.out_proj': .*MultiheadAttention reads the weight",
        ),
        (
            ["attention"],
            r"'attention' is a MultiheadAttention; .*modules_to_save to train it in full",
        ),
        (["gru"], r"'gru' is a GRU; .*modules_to_save to train it in full"),
        ("gru|other", r"leaves none.*gru \(GRU\): not linear layers; modules_to_save trains"),
    ],
)
def test_what_is_no_linear_layer(targets, said):
    model = Attending()
    refused(
        lambda: rasa_ext.patch_model(model, 2, target_modules=targets),
        model,
        said,
        "modules_to_save",
    )


def test_the_way_out_is_one():
    model = rasa_ext.patch_model(Attending(), 2, modules_to_save=["attention", "gru"])
    assert all(p.requires_grad for p in (*model.attention.parameters(), *model.gru.parameters()))
