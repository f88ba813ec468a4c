"""RasaConfig as a PEFT config."""

import dataclasses
import json
import re

import peft
import pytest
import torch
from peft import PeftConfig

import rasa_ext
from rasa_ext.methods import AdapterConfig, LoraConfig
from rasa_ext.peft import RasaConfig
from rasa_ext.peft.named import NamedAdapters
from tests.helpers import docstrings, tiny_lm


def test_defaults():
    config = RasaConfig()
    assert (config.r, config.rasa_k, config.rasa_alpha, config.rasa_dropout) == (8, 1, 8.0, 0.0)
    assert config.target_modules == "all-linear"
    assert config.peft_type.value == "RASA"
    assert config.core() == rasa_ext.RasaConfig()


@pytest.mark.parametrize(("written", "start"), [({"rasa_start": "lora"}, "lora"), ({}, "paper")])
def test_a_file_without_a_start_has_the_papers(written, start, tmp_path):
    RasaConfig(rasa_start="lora", rasa_alpha=8).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k != "rasa_start"}
    path.write_text(json.dumps(settings | written))
    assert RasaConfig.from_pretrained(tmp_path).core().start == start
    assert peft.PeftConfig.from_pretrained(tmp_path).rasa_start == start


SLOW = "(.*)*x$"
"""What PEFT would match by ``re``, for ever, if it took a name for a pattern."""
LAYERS = {"layers_to_transform": [0], "target_modules": ["q_proj"]}


BAD = [
    ({"r": 0}, "^r: expected an integer >= 1, got 0"),
    ({"r": "8"}, "^r: expected an integer, got '8'"),
    ({"rasa_k": 9}, "^rasa_k: "),
    ({"rasa_alpha": 0}, "^rasa_alpha: "),
    ({"rasa_dropout": 1.0}, "^rasa_dropout: "),
    ({"target_modules": []}, "^target_modules: "),
    ({"target_modules": "("}, "^target_modules: expected a regular expression"),
    ({"target_modules": [["q"]]}, "^target_modules: "),
    ({"rasa_experts": "slots"}, "^rasa_experts: expected None or 'slot' or"),
    ({"rasa_experts": "slot", "rasa_method": "lora"}, "^rasa_experts: .* 'own', got"),
    ({"adapter_dtype": "int8"}, "^adapter_dtype: "),
    ({"experts": "slot"}, "argument 'experts'; did you mean rasa_experts"),
    ({"rank": 8}, "argument 'rank'; did you mean r"),
    ({"lora_alpha": 8}, "argument 'lora_alpha'; did you mean rasa_alpha"),
    ({"bias": "lora_only"}, "^bias: .*rasa_only"),
    (
        {"layers_to_transform": [0], "target_modules": "q_proj"},
        "^layers_to_transform: expected target_modules",
    ),
    ({"layers_pattern": "h"}, "^layers_pattern: 'h' has no effect without"),
    ({"modules_to_save": [SLOW]}, r"expected names of modules, got .*x\$"),
    ({**LAYERS, "layers_pattern": SLOW}, r"expected names of modules, got .*x\$"),
    ({**LAYERS, "layers_pattern": [SLOW]}, r"expected names of modules, got .*x\$"),
    ({"rasa_method": "elora"}, "^rasa_method: expected .*'lora' or .*got 'elora'; upgrade ras"),
    ({"rasa_method": "lora", "rasa_k": 1}, "rasa_k"),
    ({"rasa_method": "lora", "rasa_gates": "pool"}, "argument 'rasa_gates'"),
    ({"rasa_method": "lora", "rasa_options": {"gates": "pool"}}, "^rasa_options: .*gates"),
    ({"rasa_method": "lora", "rasa_options": {"rank": 4}}, "^rasa_options: .*got 'rank'"),
    ({"rasa_method": "lora", "rasa_options": ["rslora"]}, "^rasa_options: expected a dict"),
    ({"rasa_method": "lora", "rasa_rslora": "yes"}, "^rasa_options: rslora"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_values_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RasaConfig(**options)


def test_round_trip(tmp_path):
    config = RasaConfig(r=16, rasa_k=3, exclude_modules=["head"], adapter_dtype=torch.bfloat16)
    config.save_pretrained(tmp_path)
    again = RasaConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.core().adapter_dtype == torch.bfloat16
    assert again.rasa_ext_version == rasa_ext.__version__


def test_the_example_runs():
    names = {"rasa_ext": rasa_ext, "model": tiny_lm.make_model()}
    docstrings.run_example("RasaConfig", RasaConfig, names)


def test_help_is_the_cores():
    ours, core = (
        {field.name: field.metadata.get("help") for field in dataclasses.fields(config)}
        for config in (RasaConfig, rasa_ext.RasaConfig)
    )
    assert ours["r"].startswith(core["rank"])
    assert ours["adapter_dtype"] == core["adapter_dtype"]
    assert ours["target_modules"].startswith(core["target_modules"])


@pytest.fixture(
    params=[
        LoraConfig(train_A=False, rslora=True),
        rasa_ext.RasaConfig(rank_pattern={"up_proj": 4}, experts="slot"),
    ],
    ids=lambda config: config.method,
)
def config(request) -> AdapterConfig:
    return request.param


def test_fields_that_one_method_has(config, tmp_path):
    """Both front ends use the same names in files, even with unknown fields of newer versions."""
    settings = json.loads(json.dumps(config.to_dict()))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "rasa_new": 1}))
    with pytest.warns(UserWarning, match="rasa_new"):
        ours = PeftConfig.from_pretrained(tmp_path)
    assert ours.core() == config
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: written[key] for key in settings} == settings
    assert type(config).from_dict(written) == config


def test_a_pattern_that_python_s_own_matcher_does_not_get_done_with():
    config = RasaConfig(target_modules=r".*\.(q|v)_proj", exclude_modules=SLOW)
    model = peft.get_peft_model(tiny_lm.make_model(), config)
    adapted = {name for name, m in model.named_modules() if isinstance(m, NamedAdapters)}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}


def test_ranks_by_such_a_pattern(tmp_path, monkeypatch):
    """PEFT does not get the patterns, which it would match by ``re`` for a warning."""
    slow = r"(.*)*\1$"
    match = re.match
    monkeypatch.setattr(re, "match", lambda p, *_: pytest.fail(p) if slow in p else match(p, *_))
    config = RasaConfig(r=4, target_modules=["q_proj"], rank_pattern={slow: 5})
    model = peft.get_peft_model(tiny_lm.make_model(), config)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_lm.make_model(), tmp_path)
    for each in (model, again):
        assert {len(p) for n, p in each.named_parameters() if ".rasa_A." in n} == {4}  # 5 - k
        assert each.peft_config["default"].rank_pattern == {slow: 5}
    again = dataclasses.replace(config, r=3)
    assert again.core().rank_pattern == config.core().rank_pattern
