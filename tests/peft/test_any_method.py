"""Methods under PEFT other than RaSA: built-in ones, and one defined outside the package."""

import copy

import peft
import pytest
import torch

import rasa_ext
import rasa_ext.peft
from rasa_ext.peft import RasaConfig
from tests.helpers.adapters import same_tensors
from tests.helpers.outside import VeraConfig
from tests.helpers.peft import TOKENS, logits, trained
from tests.helpers.peft_methods import CASES, KNOWN, TRAINED, adapter_tensors, kinds, under_peft
from tests.helpers.refusals import refused
from tests.helpers.tiny_lm import make_model


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


def test_a_step_trains_what_the_method_trains(case):
    model = under_peft(case).train()
    assert kinds(trained(model)) == TRAINED[case]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert case != "vera" or {"pool_A", "pool_B"} <= kinds(before)


def test_what_is_frozen_stays_so(case):
    """PEFT's switches do not make frozen tensors trainable, among them integers."""
    model = under_peft(case)
    names = trained(model).keys()
    assert names
    model.set_adapter("default")
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.set_requires_grad("default", True)
    assert trained(model).keys() == names
    assert all("default" in status.requires_grad for status in status_of(model, names))
    assert peft.get_model_status(model).requires_grad == {"default": True}
    model.set_requires_grad("default", False)
    assert not trained(model)


def status_of(model: peft.PeftModel, names) -> list:
    owners = {name.rpartition(".rasa_")[0].removeprefix("base_model.") for name in names}
    return [each for each in peft.get_layer_status(model) if each.name in owners]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_go_both_ways(case, low_cpu_mem_usage, tmp_path):
    model = under_peft(case)
    expected = logits(model)
    assert not torch.equal(expected, logits(make_model()))
    model.save_pretrained(tmp_path / "peft")
    ours = rasa_ext.load_adapter(make_model(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(ours), expected)
    rasa_ext.save_adapter(ours, tmp_path / "ours")
    torch.manual_seed(99)
    again = peft.PeftModel.from_pretrained(
        make_model(), tmp_path / "ours", low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(logits(again), expected)
    assert same_tensors(adapter_tensors(model), adapter_tensors(again))
    read, config = again.peft_config["default"].core(), ours._rasa_ext.config
    assert {each.partition(":")[0] for each in read.differences(config)} <= {"target_modules"}
    name, fields = KNOWN[case]
    given = rasa_ext.methods.method_named(name)(rank=4, **fields)
    settings = {**given.to_dict(), "target_modules": config.to_dict()["target_modules"]}
    assert config.to_dict() == settings


def test_merging_and_export(case, tmp_path):
    model = under_peft(case)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(make_model()))
    rank = rasa_ext.peft.export_lora(model, tmp_path, allow_dropped=True)
    assert rank == max(layer.named("default").factors().rank for layer in model.base_model.owners())
    lora = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-4)
    plain = model.merge_and_unload()
    assert not adapter_tensors(plain)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_of_two_methods(case, tmp_path):
    model = under_peft(case)
    first = logits(model)
    second = RasaConfig(r=2, target_modules=["up_proj", "q_proj"], init_weights=False)
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.set_adapter("second")
    alone = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not any(map(torch.equal, (both, both, alone), (first, alone, first)))
    assert peft.get_model_status(model).available_adapters == ["default", "second"]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path / "second", "second")
    assert torch.equal(logits(again), alone)
    model.delete_adapter("default")
    assert all(name.endswith(".second") for name in adapter_tensors(model))
    assert torch.equal(logits(model), alone)


def test_transformers_own_adapters(case, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    source = under_peft(case)
    source.save_pretrained(tmp_path)
    model = make_model()
    torch.manual_seed(99)
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), logits(source))


def test_tensors_move_and_keep_their_dtypes():
    model = under_peft("picked").to(torch.bfloat16)
    model.base_model._cast_adapter_dtype("default")
    dtypes = {kind: t.dtype for name, t in adapter_tensors(model).items() for kind in kinds([name])}
    assert dtypes == {"A": torch.float32, "B": torch.float32, "index": torch.int64}
    model.to("meta")
    assert {t.device.type for t in adapter_tensors(model).values()} == {"meta"}


def test_a_layer_that_the_method_refuses_leaves_the_model_as_it_was():
    model = make_model()
    width = model.config.hidden_size
    config = RasaConfig(r=width + 1, rasa_method="picked", target_modules=["down_proj", "up_proj"])
    refused(lambda: peft.get_peft_model(model, config), model, f"at most {width}, got")


def test_the_fields_of_a_config():
    config = RasaConfig(rasa_method="vera", rasa_d_initial=0.5)
    assert config == RasaConfig(rasa_method="vera", rasa_options={"d_initial": 0.5})
    assert (config.r, config.rasa_k, config.rasa_alpha) == (8, None, None)
    assert config.core() == VeraConfig(d_initial=0.5)
    settings = config.to_dict()
    assert settings["rasa_d_initial"] == 0.5
    assert "rasa_options" not in settings
    with pytest.raises(ValueError, match=r"^rasa_alpha: the method 'vera' has no such field"):
        RasaConfig(rasa_method="vera", rasa_alpha=2)
    with pytest.raises(TypeError, match=r"argument 'rasa_d_initia'; did you mean rasa_d_initial"):
        RasaConfig(rasa_method="vera", rasa_d_initia=0.5)
    with pytest.warns(UserWarning, match="rasa_newer ignored"):
        assert peft.get_peft_config({**settings, "rasa_newer": 1}) == config
