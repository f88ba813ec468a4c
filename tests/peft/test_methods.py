"""Methods beside RaSA under PEFT, against the same method through patch_model."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import rasa_ext
import rasa_ext.peft
from rasa_ext import methods
from tests.helpers import tiny_lm

CASES = {
    "lora": ({}, methods.LoraConfig(4, 8.0)),
    "rslora": (
        {"rasa_options": {"rslora": True}, "rasa_method": "lora"},
        methods.LoraConfig(4, 8.0, True),
    ),
    "ranks": (
        {"rasa_method": "rasa", "rasa_k": 1, "rank_pattern": {"q_proj": 6}},
        methods.RasaConfig(4, 1, rank_pattern={"q_proj": 6}),
    ),
}
KNOWN = dict(CASES)
"""Those that another package's tests have added, too."""
TOKENS = torch.tensor([[5, 7, 11, 13, 17]])


def under_peft(name: str):
    options = {"rasa_method": name, **KNOWN[name][0]}
    config = rasa_ext.peft.RasaConfig(r=4, rasa_alpha=8.0, task_type="CAUSAL_LM", **options)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_lm.make_model(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


def test_saved_it_is_the_package_s_own_adapter(name, tmp_path):
    """And the other way round: one function, one file."""
    model = under_peft(name)
    logits = model(TOKENS).logits
    model.save_pretrained(tmp_path / "peft")
    ours = rasa_ext.load_adapter(tiny_lm.make_model(), tmp_path / "peft").eval()
    torch.testing.assert_close(ours(TOKENS).logits, logits)
    layer = next(m for m in ours.modules() if isinstance(m, rasa_ext.RasaLinear))
    expected = KNOWN[name][1]
    assert type(layer.config) is type(expected)
    for field in ("rank", "alpha", "k", "rslora", "rank_pattern"):
        assert getattr(layer.config, field, None) == getattr(expected, field, None)
    rasa_ext.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_lm.make_model(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(TOKENS).logits, logits)


def test_merged(name):
    model = under_peft(name)
    logits = model(TOKENS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(TOKENS).logits, logits)
    with model.disable_adapter():
        torch.testing.assert_close(model(TOKENS).logits, tiny_lm.make_model()(TOKENS).logits)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


def test_two_methods_in_one_model():
    model = under_peft("lora")
    first = model(TOKENS).logits
    config = rasa_ext.peft.RasaConfig(r=2, init_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("rasa", config)
    model.set_adapter("rasa")
    assert not torch.equal(model(TOKENS).logits, first)
    model.set_adapter("default")
    assert torch.equal(model(TOKENS).logits, first)


def test_it_trains_what_the_method_trains(name):
    model = under_peft(name).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    changed = {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}
    kinds = {key.rpartition(".rasa_")[2].partition(".")[0] for key in changed}
    rasa = isinstance(KNOWN[name][1], methods.RasaConfig)
    assert kinds == {"A", "B", *(("d", "pool_A", "pool_B") if rasa else ())}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rasa_method": "elora"}, "^rasa_method: expected .*'lora' or"),
        ({"rasa_method": "lora", "rasa_k": 1}, "rasa_k"),
        ({"rasa_method": "lora", "rasa_gates": "pool"}, "argument 'rasa_gates'"),
        (
            {"rasa_method": "lora", "rasa_options": {"gates": "pool"}},
            "^rasa_options: .*rslora.*gates",
        ),
        ({"rasa_method": "lora", "rasa_options": {"rank": 4}}, "^rasa_options: .*got 'rank'"),
        ({"rasa_method": "lora", "rasa_options": ["rslora"]}, "^rasa_options: expected a dict"),
        ({"rasa_rslora": "yes", "rasa_method": "lora"}, "^rasa_options: rslora: expected True"),
        ({"rank_pattern": {"q_proj": 8, "w_q": 2}}, "w_q"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ],
)
def test_bad_input(options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        peft.get_peft_model(tiny_lm.make_model(), rasa_ext.peft.RasaConfig(r=4, **options))
