"""The core's PEFT tests over the methods of this package, and methods that PEFT cannot use."""

from __future__ import annotations

import peft
import pytest
import torch

import rasa_ext
from rasa_ext.methods import AdapterConfig
from rasa_ext.peft import RasaConfig
from rasa_research import methods
from tests.helpers.peft_methods import KNOWN, LAYERS, adapter_tensors, kinds, under_peft
from tests.helpers.refusals import refused
from tests.helpers.tiny_lm import make_model
from tests.peft.test_any_method import (  # noqa: F401 - tests, run here as well
    test_files_go_both_ways,
    test_merging_and_export,
    test_transformers_own_adapters,
    test_two_adapters_of_two_methods,
)
from tests.peft.test_any_method import test_what_is_frozen_stays_so as stays_frozen
from tests.peft.test_config import test_fields_that_one_method_has  # noqa: F401 - run here

TRAINS = {
    "sbora": ("sbora", {"side": "B", "seed": 7}),
    "reslora": ("reslora", {"window": 1}),
}
READS = {
    "block-lora": ("block-lora", {"blocks": 2}),
    "sd-lora": ("sd-lora", {"past": [2, 1], "norm": "frobenius", "tied": False}),
    "sora": ("sora", {"k": 1}),
    "pruned": ("gated-rasa", {"kept": dict.fromkeys(LAYERS, (1, 1, 3))}),
    "boosters": ("boosted-lora", {"stack": dict.fromkeys(LAYERS, 2)}),
    "boosted-pool": ("boosted-pool", {"stack": dict.fromkeys(LAYERS, 2)}),
}
"""Methods with steps or rates that PEFT does not know: it computes with them and trains none."""
KNOWN.update(TRAINS | READS)


@pytest.fixture(params=TRAINS | READS)
def case(request) -> str:
    return request.param


@pytest.fixture(
    params=[
        methods.BoostedLoraConfig(stack={"model.layers.0.mlp.up_proj": 2}),
        methods.SdLoraConfig(past=(2, 3)),
        methods.GatedRasaConfig(kept={"model.layers.0.mlp.up_proj": (1, 2, 2)}),
    ],
    ids=lambda config: config.method,
)
def config(request) -> AdapterConfig:
    return request.param


def test_tensors_move_and_keep_their_dtypes():
    model = under_peft("sbora").to(torch.bfloat16)
    model.base_model._cast_adapter_dtype("default")
    dtypes = {kind: t.dtype for name, t in adapter_tensors(model).items() for kind in kinds([name])}
    assert dtypes == {"A": torch.float32, "index": torch.int64}
    model.to("meta")
    assert {t.device.type for t in adapter_tensors(model).values()} == {"meta"}


def test_a_layer_that_the_method_refuses_leaves_the_model_as_it_was():
    model = make_model()
    width = model.config.hidden_size
    config = RasaConfig(r=width + 1, rasa_method="sbora", target_modules=["down_proj", "up_proj"])
    refused(lambda: peft.get_peft_model(model, config), model, f"at most the {width} inputs")


@pytest.mark.parametrize("case", TRAINS)
def test_what_is_frozen_stays_so(case):
    stays_frozen(case)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("block-lora", "learning_rates"),
        ("sora", "callbacks"),
        ("gated-rasa", "callbacks"),
        ("sd-lora", "next_task"),
        ("boosted-lora", "training.Boosting"),
        ("boosted-pool", "training.Boosting"),
    ],
)
def test_what_peft_cannot_train(name, said, tmp_path):
    config, model = RasaConfig(r=4, rasa_method=name), make_model()
    message = rf"^rasa_method: .*{said}.*patch_model"
    refused(lambda: peft.get_peft_model(model, config), model, message)
    saved = rasa_ext.patch_model(make_model(), config=config.core())
    rasa_ext.save_adapter(saved, tmp_path)
    read = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    assert not any(p.requires_grad for p in read.parameters())
    with pytest.raises(ValueError, match=message):
        read.load_adapter(tmp_path, "trained", is_trainable=True)
