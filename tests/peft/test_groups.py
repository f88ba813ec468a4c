"""rasa_groups under PEFT: the user chooses which layers share a pool."""

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

import rasa_ext
from rasa_ext.peft import RasaConfig
from tests.helpers.adapters import pool_members
from tests.helpers.peft import layers, plain
from tests.helpers.unet import ENDS, Unet, by_end

FORMS = {"sequence": ENDS, "mapping": {"all": [*ENDS]}, "callable": by_end}


def adapted(form: str, base: Unet | None = None) -> PeftModel:
    torch.manual_seed(1)
    config = RasaConfig(r=2, rasa_groups=FORMS[form], init_weights=False)
    return get_peft_model(base or Unet(), config)


def pools(model: PeftModel) -> set[frozenset[str]]:
    found: dict[int, set[str]] = {}
    for name, layer in layers(plain(model)).items():
        found.setdefault(id(layer.pools["default"]), set()).add(name)
    return set(map(frozenset, found.values()))


@pytest.mark.parametrize("form", FORMS)
def test_files_go_both_ways(form, tmp_path):
    base = Unet().double()  # because the models round differently
    model, x = adapted(form, copy.deepcopy(base)).double(), torch.randn(2, 5, 8).double()
    assert pools(model) == pool_members(rasa_ext.patch_model(Unet(), 2, 1, groups=FORMS[form]))
    model.save_pretrained(tmp_path / "peft")
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["rasa_groups"]
    assert all(isinstance(names, list) for names in saved.values())
    core = rasa_ext.load_adapter(copy.deepcopy(base), tmp_path / "peft")
    rasa_ext.save_adapter(core, tmp_path / "core")
    assert pool_members(core) == pools(model)
    found = []
    for folder in ("peft", "core"):
        with warnings.catch_warnings(action="error"):  # no warning about a choice made before
            found.append(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder))
    assert all(pools(again) == pools(model) for again in found)
    for again in (core, *found):
        torch.testing.assert_close(again.double()(x), model(x))


def test_two_adapters_of_other_groups():
    model = adapted("sequence")
    first = pools(model)
    model.add_adapter("other", RasaConfig(r=2, rasa_groups=by_end, init_weights=False))
    assert pools(model) == first
    assert isinstance(model.peft_config["other"].rasa_groups, dict)


def test_the_warning_names_the_users_line():
    with warnings.catch_warnings(action="error"):
        adapted("sequence")
    ways = [
        lambda: get_peft_model(Unet(), RasaConfig(r=2)),
        lambda: adapted("sequence").add_adapter("other", RasaConfig(r=2)),
        lambda: inject_adapter_in_model(RasaConfig(r=2), Unet()),
    ]
    for way in ways:
        said = r"rasa_groups: .* share their pool.* pass rasa_groups=\['attn1.to_q'"
        with pytest.warns(UserWarning, match=said) as caught:
            way()
        (told,) = [each for each in caught if "rasa_groups" in str(each.message)]
        assert (told.filename, told.lineno) == (__file__, way.__code__.co_firstlineno)
