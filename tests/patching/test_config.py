"""RasaConfig: arguments, choice of layers, frozen parameters, and ``summary``."""

import copy
import dataclasses
import inspect
import json

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import RasaConfig
from rasa_ext.peft import RasaConfig as PeftRasaConfig
from tests.helpers import oracle
from tests.helpers.adapters import RANK, adapted_layers
from tests.helpers.models import BERT, GPT2, LLAMA, SEQUENTIAL, T5, TIED, ids


def adapted(entry, **options) -> list[str]:
    return list(adapted_layers(rasa_ext.patch_model(entry.build(), 2, 1, **options)))


def llama(*suffixes: str, layers=(0, 1, 2)) -> list[str]:
    return [f"model.layers.{i}.{suffix}" for i in layers for suffix in suffixes]


def test_fields_are_the_arguments():
    """RasaConfig is frozen and has patch_model's arguments and defaults, each with a help text.

    Rarely needed options are only in the config.
    """
    parameters = inspect.signature(rasa_ext.patch_model).parameters
    fields = {field.name: field for field in dataclasses.fields(RasaConfig)}
    for name in ("rank_pattern", "template"):
        assert len(fields.pop(name).metadata["help"]) > 20
    assert set(fields) == {name for name in parameters if name not in ("model", "config")}
    for name, field in fields.items():
        assert field.default == parameters[name].default
        assert len(field.metadata["help"]) > 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        RasaConfig().rank = 4


@pytest.mark.parametrize(
    ("rank", "k"), [(1, 1), (4, 1), (8, 1), (15, 1), (16, 2), (32, 4), (256, 32)]
)
def test_k_of_none_is_the_papers_rule(rank, k):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    rasa_ext.patch_model(model, rank, None)
    assert model[0].pool.A.shape == (2 * k, 3)
    assert model[0].A.shape == (rank - k, 3)


def test_config_equals_arguments():
    options = {
        "rank": 3,
        "k": 2,
        "alpha": 5.0,
        "dropout": 0.25,
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
        "modules_to_save": ["lm_head"],
        "adapter_dtype": torch.float64,
    }
    both = (options, {"config": RasaConfig(**options)})
    models = [rasa_ext.patch_model(LLAMA.build(), **given) for given in both]
    configs = {layer.config for model in models for layer in adapted_layers(model).values()}
    assert len(configs) == 1
    assert models[0]._rasa_ext.config == models[1]._rasa_ext.config in configs


@pytest.mark.parametrize("start", ["lora", "paper"])
def test_a_file_tells_its_start_and_has_the_papers_if_it_does_not(start):
    written = RasaConfig(start=start).to_dict()
    assert RasaConfig.from_dict(written) == RasaConfig(start=start)
    written.pop("rasa_start", None)
    assert RasaConfig.from_dict(written) == RasaConfig(start="paper")


def test_what_was_not_given_follows_after_a_replacement():
    for config in (RasaConfig(rank=64, k=None), copy.deepcopy(RasaConfig(rank=64, k=None))):
        assert (config.alpha, config.k) == (64, 8)
        smaller = dataclasses.replace(config, rank=16)
        assert (smaller.alpha, smaller.k) == (16, 2)
        assert dataclasses.replace(smaller, start="paper").alpha == 8
    given = dataclasses.replace(RasaConfig(rank=64, k=8, alpha=64), rank=16)
    assert (given.alpha, given.k) == (64, 8)
    by_peft = dataclasses.replace(PeftRasaConfig(r=64), r=16)
    assert (by_peft.rasa_alpha, by_peft.rasa_k) == (16, 2)
    assert json.loads(json.dumps(RasaConfig(rank=64).to_dict()))["rasa_alpha"] == 64


PATTERN = r"model\.layers\.[12]\..*\.(q|v)_proj"
CHOICES = [
    (LLAMA, ["q_proj"], (), llama("self_attn.q_proj")),
    (LLAMA, ["lm_head"], (), ["lm_head"]),
    (LLAMA, ["layers.1.mlp.up_proj"], (), llama("mlp.up_proj", layers=[1])),
    (LLAMA, PATTERN, (), llama("self_attn.q_proj", "self_attn.v_proj", layers=[1, 2])),
    (LLAMA, ["q_proj", "o_proj"], ["o_proj"], llama("self_attn.q_proj")),
    (LLAMA, ["q_proj"], r".*\.0\..*", llama("self_attn.q_proj", layers=[1, 2])),
    (BERT, ["pooler.dense"], (), ["bert.pooler.dense"]),
    (SEQUENTIAL, ["2"], (), ["2"]),
    (SEQUENTIAL, "all-linear", ["2", "4"], ["0", "6"]),
]


@pytest.mark.parametrize(("entry", "targets", "excluded", "expected"), CHOICES)
def test_choosing_layers(entry, targets, excluded, expected):
    assert adapted(entry, target_modules=targets, exclude_modules=excluded) == expected


def test_suffixes_stop_at_dots():
    """``proj`` does not match ``q_proj``; a regular expression must match the whole name."""
    for target in (["proj"], ["_proj"], "q_proj", r".*\.q"):
        with pytest.raises(ValueError, match="target_modules"):
            adapted(LLAMA, target_modules=target)


@pytest.mark.parametrize("entry", [LLAMA, GPT2, BERT, T5, TIED], ids=ids)
def test_only_adapters_and_modules_to_save_are_trainable(entry):
    (head,) = entry.left_out
    for saved in ((), (head,)):
        model = rasa_ext.patch_model(entry.build(), 2, 1, modules_to_save=saved)
        expected = {id(p) for p in rasa_ext.adapter_parameters(model)}
        if saved:
            full = {id(p) for p in model.get_submodule(head).parameters()}
            assert not expected & full
            expected |= full
        assert {id(p) for p in model.parameters() if p.requires_grad} == expected
        assert not isinstance(model.get_submodule(head), rasa_ext.RasaLinear)


def test_modules_to_save_are_not_adapted_as_well():
    model = rasa_ext.patch_model(BERT.build(), 2, 1, modules_to_save=["pooler", "classifier"])
    assert "bert.pooler.dense" not in adapted_layers(model)
    assert model.bert.pooler.dense.weight.requires_grad
    assert model.classifier.bias.requires_grad


def test_summary_counts():
    base = T5.build()
    shapes = {n: oracle.weight_shape(base.get_submodule(n)) for n in T5.targets(base)}
    groups = oracle.groups(shapes)
    model = rasa_ext.patch_model(base, RANK, 2)
    rows = rasa_ext.summary(model)
    assert len(rows) == len(groups)
    for row, names in zip(rows, groups, strict=True):
        out, width = shapes[names[0]]
        effective = RANK - 2 + 2 * len(names)
        assert row.pattern == names[0].replace(".0.", ".*.", 1)
        assert (row.L, tuple(row.shape), row.R) == (len(names), (out, width), effective)
        assert row.trainable == oracle.trainable_count({n: shapes[n] for n in names}, RANK, 2)
    table = str(rows)
    assert "encoder.block.*.layer.0.SelfAttention.q" in table
    assert f"{oracle.trainable_count(shapes, RANK, 2):,}" in table


@pytest.mark.parametrize("given", [["o_proj", "zebra"], r".*zebra.*"])
def test_an_exclusion_without_effect_is_warned_of(given):
    message = "exclude_modules: '.*zebra.*' leaves out no layer"
    with pytest.warns(UserWarning, match=message) as said:
        rasa_ext.patch_model(LLAMA.build(), 2, 1, exclude_modules=given)
    assert len(said) == 1
