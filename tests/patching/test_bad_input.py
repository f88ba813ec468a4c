"""Bad input raises an error that names the argument and value, and the model does not change."""

import re
import warnings

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import RasaConfig
from tests.helpers.models import LLAMA, SEQUENTIAL
from tests.helpers.refusals import refused

NAN = float("nan")

# (arguments, the argument and the value that the message names)
ARGUMENTS = [
    ({"rank": 0}, "rank", "0"),
    ({"rank": "8"}, "rank", "'8'"),
    ({"rank": True}, "rank", "True"),
    ({"k": -1}, "k", "-1"),
    ({"rank": 4, "k": 5}, "k", "5"),
    ({"dropout": -0.1}, "dropout", "-0.1"),
    ({"dropout": 1.0}, "dropout", "1"),
    ({"dropout": "0.1"}, "dropout", "'0.1'"),
    ({"alpha": 0}, "alpha", "0"),
    ({"start": "zero"}, "start", "'zero'"),
    ({"alpha": NAN}, "alpha", "nan"),
    ({"alpha": "8"}, "alpha", "'8'"),
    ({"target_modules": 5}, "target_modules", "5"),
    ({"target_modules": []}, "target_modules", "list"),
    ({"target_modules": [7]}, "target_modules", "7"),
    ({"target_modules": "(unclosed"}, "target_modules", "unclosed"),
    ({"target_modules": ["q_proj", "no_such"]}, "target_modules", "no_such"),
    ({"target_modules": ["input_layernorm"]}, "target_modules", "input_layernorm"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "target_modules", "q_proj"),
    ({"exclude_modules": 3}, "exclude_modules", "3"),
    ({"modules_to_save": ["no_such"]}, "modules_to_save", "no_such"),
    ({"modules_to_save": 4}, "modules_to_save", "4"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, "modules_to_save", "q_proj"),
    ({"adapter_dtype": "float31"}, "adapter_dtype", "float31"),
    ({"adapter_dtype": torch.int32}, "adapter_dtype", "int32"),
    ({"config": {"rank": 4}}, "config", "dict"),
    ({"config": RasaConfig(rank=4), "rank": 2}, "config", "rank"),
]


@pytest.mark.parametrize(("options", "name", "came"), ARGUMENTS, ids=str)
def test_arguments(options, name, came):
    model = LLAMA.build()

    def call():
        return rasa_ext.patch_model(model, **options)

    refused(call, model, rf"\b{name}\b", re.escape(came), "expected|cannot|is trained|no ")


@pytest.mark.parametrize("thing", [None, 3, torch.zeros(2), LLAMA.build])
def test_a_model_that_is_no_module(thing):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
        rasa_ext.patch_model(thing)


OTHERS = [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 4, 3), nn.GRU(4, 4)), nn.Embedding(4, 4)]


@pytest.mark.parametrize("model", OTHERS, ids=str)
def test_a_model_without_linear_layers_to_replace(model):
    refused(lambda: rasa_ext.patch_model(model), model, "linear")


@pytest.mark.parametrize("options", [{}, {"target_modules": ["lm_head"]}])
@pytest.mark.parametrize("part", ["", "model.layers.1"])
def test_a_second_patch(part, options):
    """The first one may be of a part of the model."""
    model = LLAMA.build()
    rasa_ext.patch_model(model.get_submodule(part), 4, 1, target_modules=["q_proj"])
    refused(lambda: rasa_ext.patch_model(model, **options), model, "model", part, "unpatch")


def test_a_model_that_peft_has_adapted():
    """A warning says that PEFT's adapter is frozen."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(LLAMA.build(), settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match=r"model: .*q_proj' is adapted by PEFT \(Linear\)"):
        rasa_ext.patch_model(model, target_modules=["k_proj"])
    assert not any(p.requires_grad for p in trained)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is adapted by PEFT")
        rasa_ext.patch_model(peft.get_peft_model(LLAMA.build(), settings).unload())


@pytest.mark.parametrize("given", ["q_proj", "all_linear", "q_proj,v_proj"])
def test_a_string_that_was_meant_as_a_name(given):
    with pytest.raises(ValueError, match=rf"{given}' leaves none .* regular expression .* a list"):
        rasa_ext.patch_model(LLAMA.build(), target_modules=given)


def _integer_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


LAYERS = [
    (_integer_weight(), "int8 in an unknown layout"),
    (nn.Linear(0, 4), r"\(4, 0\)"),
    (nn.Linear(4, 0), r"\(0, 4\)"),
    (nn.LazyLinear(4), "no weight yet"),
]


@pytest.mark.parametrize(("layer", "said"), LAYERS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_weights_that_cannot_be_adapted(layer, said):
    """The error is raised before any change, although an earlier layer could be adapted."""
    model = nn.Sequential(nn.Linear(4, 4), layer)
    places = dict(model.named_modules())  # a lazy layer has no values to compare
    with pytest.raises((ValueError, TypeError), match=f"(target_modules|model): '1'.*{said}"):
        rasa_ext.patch_model(model)
    assert dict(model.named_modules()) == places
    assert model[0].weight.requires_grad


CALLS = [
    rasa_ext.merge,
    rasa_ext.unmerge,
    rasa_ext.unpatch,
    rasa_ext.merge_and_unload,
    rasa_ext.adapter_parameters,
    rasa_ext.summary,
    lambda model: next(rasa_ext.delta_weights(model)),
    lambda model: rasa_ext.save_adapter(model, "nowhere"),
    lambda model: rasa_ext.export_lora(model, "nowhere"),
    lambda model: rasa_ext.disable_adapter(model).__enter__(),
]


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_need_a_patched_model(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SEQUENTIAL.build()
    refused(lambda: call(model), model, "model: expected", "patch_model", "Sequential")
    with pytest.raises(TypeError, match="model: expected"):
        call(3)
    assert not list(tmp_path.iterdir())
