"""groups: the user chooses which layers share a pool if the default rule does not fit."""

import copy
import json
import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import rasa_ext
import rasa_ext.peft
from rasa_ext import RasaConfig
from rasa_ext.analysis import analyze, analyze_adapter
from rasa_ext.patching import pattern
from tests.helpers.adapters import patched, pool_members
from tests.helpers.cli import invoke
from tests.helpers.models import LLAMA
from tests.helpers.refusals import refused
from tests.helpers.unet import ENDS, Unet, by_end, groups_by

FORMS = {
    "sequence": ENDS,
    "mapping": {end: [end] for end in ENDS},
    "text": {end: end for end in ENDS},
    "callable": by_end,
    "whole names": lambda name: by_end(name).replace(".", "-"),
}
NAMES = {
    "callable": {end.replace("*", "0") for end in ENDS},
    "whole names": {end.replace(".", "-").replace("*", "0") for end in ENDS},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_groups(form):
    model = rasa_ext.patch_model(Unet(), 2, 1, groups=FORMS[form])
    assert pool_members(model) == groups_by(by_end)
    assert len(pool_members(model)) == 12  # six ends, two widths
    names = {row.pattern for row in rasa_ext.summary(model)}
    assert names == NAMES.get(form, set(ENDS))


def test_mixed_with_the_usual_rule():
    groups = {
        "queries": ["attn1.to_q", "attn2.to_q"],
        "first": "down_blocks.0.attentions.*.*.*.*.to_k",
    }
    model = rasa_ext.patch_model(Unet(), 2, 1, groups=groups)
    rows = {(row.pattern, row.shape): row.L for row in rasa_ext.summary(model)}
    assert rows["queries", (8, 8)] == 2 * 5
    assert rows["queries", (16, 16)] == 2 * 6
    assert rows["first", (8, 8)] == rows["first", (8, 6)] == 2
    assert rows["mid_block.attentions.*.transformer_blocks.0.attn1.to_k", (16, 16)] == 1
    assert "groups chosen: queries, first" in str(rasa_ext.summary(model))


def test_a_callable_may_leave_layers_to_the_usual_rule():
    usual = rasa_ext.patch_model(LLAMA.build(), 2, 1)
    model = rasa_ext.patch_model(
        LLAMA.build(), 2, 1, groups=lambda name: "mlp" if re.search("up|gate", name) else None
    )
    assert len(pool_members(model)) == len(pool_members(usual)) - 1
    (row,) = (row for row in rasa_ext.summary(model) if row.pattern == "mlp")
    assert row.L == 6


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded(form, tmp_path):
    model = patched(Unet(), 2, 1, groups=FORMS[form])
    rasa_ext.save_adapter(model, tmp_path)
    base = rasa_ext.unpatch(copy.deepcopy(model))
    loaded = rasa_ext.load_adapter(base, tmp_path)
    assert pool_members(loaded) == pool_members(model)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    rasa_ext.load_adapter(model, tmp_path)  # patched in the same way
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["rasa_groups"]
    assert all(isinstance(names, list) for names in saved.values())
    other = rasa_ext.patch_model(Unet(), 2, 1)
    refused(lambda: rasa_ext.load_adapter(other, tmp_path), other, "differs .* groups: ")
    for found in (analyze_adapter(tmp_path), analyze(model)):
        assert {frozenset(layer.name for layer in g.layers) for g in found} == pool_members(model)
    text = invoke("inspect", tmp_path)
    for row in rasa_ext.summary(model):
        shape = f"{row.shape[0]} x {row.shape[1]}"
        assert f"{row.pattern} {row.L} {shape} 1 {row.R - 1} {row.R} {row.trainable:,}" in text


class Wrapped(nn.Module):
    """Layers 0.l.0 and 0.l.1, as in a SentenceTransformer, whose first integer never varies."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Sequential(
            nn.ModuleDict({"l": nn.Sequential(*(nn.Linear(8, 8) for _ in "ab"))})
        )

    def forward(self, x):
        return self.base[0]["l"](x)


def test_an_index_that_never_varies_is_no_layer_index(tmp_path):
    """Files keep their groups, also files of the time when the first integer was the index."""
    x = torch.randn(3, 8)
    for groups, count in (((), 1), (pattern, 2)):
        model = patched(Wrapped(), 4, 1, groups=groups)
        assert len(pool_members(model)) == count
        rasa_ext.save_adapter(model, tmp_path / str(count))
        settings = json.loads((tmp_path / str(count) / "adapter_config.json").read_text())
        assert (settings["rasa_groups"] is None) == (count == 2)
        again = rasa_ext.load_adapter(Wrapped(), tmp_path / str(count))
        assert pool_members(again) == pool_members(model)
        rasa_ext.load_adapter(again, tmp_path / str(count))  # the groups of patch and file agree
        rasa_ext.save_adapter(again, tmp_path / "again")
        by_peft = PeftModel.from_pretrained(Wrapped(), tmp_path / "again")
        for each in (again, by_peft):
            torch.testing.assert_close(each(x), model(x), rtol=0, atol=0)
        assert len(analyze_adapter(tmp_path / "again")) == count


def test_peft_groups_by_the_same_index():
    config = rasa_ext.peft.RasaConfig(r=4, rasa_k=1)
    model = get_peft_model(Wrapped(), config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in rasa_ext.adapter_parameters(rasa_ext.patch_model(Wrapped(), 4, 1))
    )
    assert config.rasa_groups == {"base.0.l.*": ["base.0.l.0", "base.0.l.1"]}


def test_a_patched_model_pickles_though_it_was_given_a_lambda():
    model = patched(LLAMA.build(), 2, 1, groups=lambda name: name.rpartition(".")[2])
    assert not callable(next(iter(rasa_ext.summary(model).groups)))
    layer = next(each for each in model.modules() if isinstance(each, rasa_ext.RasaLinear))
    assert not callable(layer.config.groups)


BAD = ["attn1.to_q", 3, [""], {"a": [3]}, ["attn3.to_q"], {"a": ["to_q", "no"]}, lambda name: 3]


@pytest.mark.parametrize(
    "groups", BAD, ids=lambda value: "callable" if callable(value) else str(value)
)
def test_bad_groups(groups):
    model = Unet()
    refused(lambda: rasa_ext.patch_model(model, 2, 1, groups=groups), model, "^groups: ")


def test_a_callable_has_no_form_in_a_file():
    with pytest.raises(ValueError, match=r"^groups: "):
        RasaConfig(groups=by_end).to_dict()


def test_configs_compare_hash_and_come_back():
    configs = [RasaConfig(groups=FORMS[form]) for form in ("sequence", "mapping", "text")]
    assert len(set(configs)) == 1
    (config,) = set(configs)
    settings = {**config.to_dict(), "bias": "none"}
    assert RasaConfig.from_dict(json.loads(json.dumps(settings))) == config


def told(model: nn.Module, **options) -> list[str]:
    with warnings.catch_warnings(record=True, action="always") as caught:
        rasa_ext.patch_model(model, 2, **options)
    assert {each.filename for each in caught} <= {__file__}
    return [str(each.message) for each in caught if str(each.message).startswith("groups: ")]


def test_little_sharing_is_warned_of_with_groups_that_help():
    (message,) = told(Unet(), k=1)
    assert re.match(r"groups: \d+ of 66 adapted layers share their pool with no other l", message)
    assert "close to a LoRA of rank 2" in message
    suggested = re.search(r"groups=(\[.*?\])\.$", message)[1].replace(", ...", "")
    ends = [item.strip("' ") for item in suggested.strip("[]").split(",")]
    assert ends == ENDS[:4]
    assert told(Unet(), k=1, groups=ENDS) == []
    assert told(Unet(), k=0) == []  # k = 0 is a LoRA on purpose
    assert told(LLAMA.build(), k=1) == []


def test_nothing_in_common_is_warned_of():
    shapes = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 10), nn.Linear(10, 8))
    (message,) = told(shapes, k=1)
    assert "3 of 3 adapted layers" in message
    assert "groups=[" not in message
    (message,) = told(nn.Sequential(nn.Linear(8, 8)), k=1)
    assert "'0' is the only adapted layer" in message
