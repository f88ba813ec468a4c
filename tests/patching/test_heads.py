"""Layers that all-linear skips: output heads, and 1x1 convolutions, which the summary lists."""

import types
from functools import partial

import pytest
import torch
from torch import nn

import rasa_ext
from tests.helpers import oracle, peft
from tests.helpers.adapters import adapters, check_step, patched
from tests.helpers.models import LLAMA
from tests.helpers.refusals import refused


def body() -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])


def vision(*paths: str, out: int = 10, **more: object) -> nn.Module:
    """Build a model of blocks, then heads at ``paths``, with further attributes ``more``."""
    model = nn.Module()
    model.blocks = body()
    model.norm = nn.LayerNorm(8)
    for path in paths:
        first, *parts = path.split(".")
        head: nn.Module = nn.Linear(8, out)
        for part in reversed(parts):
            head = nn.ModuleDict({part: head})
        model.add_module(first, head)
    for name, value in more.items():
        setattr(model, name, value)
    return model


def timm(*paths: str) -> nn.Module:
    """Build a model with heads that only the model's ``get_classifier`` identifies."""
    model = vision(*paths)
    found = tuple(map(model.get_submodule, paths))
    model.get_classifier = lambda: found if len(found) > 1 else found[0]
    return model


def language_model() -> nn.Module:
    """Build a plain module with an output layer over words that has an unusual name."""
    return vision("unembed", out=50, words=nn.Embedding(50, 8), places=nn.Embedding(16, 8))


PATHS = ("head", "head.fc", "heads.head", "fc", "classifier")
LABELS = types.SimpleNamespace(num_labels=10)


def other_get_classifier() -> nn.Module:
    return vision("qa_outputs", config=LABELS, get_classifier=lambda name: name)  # not timm's


HEADS = {
    **{path: (lambda path=path: vision(path), [path]) for path in PATHS},
    "timm": (lambda: timm("output_layer"), ["output_layer"]),
    "distilled": (lambda: timm("one", "two"), ["one", "two"]),
    "words": (language_model, ["unembed"]),
    "labels": (lambda: vision("qa_outputs", config=LABELS), ["qa_outputs"]),
    "another get_classifier": (other_get_classifier, ["qa_outputs"]),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_left_out(name):
    build, heads = HEADS[name]
    model = rasa_ext.patch_model(build(), 2, 1)
    adapted = [n for n, m in model.named_modules() if isinstance(m, rasa_ext.RasaLinear)]
    assert adapted == ["blocks.0", "blocks.1"]
    skipped = rasa_ext.summary(model).skipped
    assert list(skipped) == heads
    assert all("head" in reason or "classifier" in reason for reason in skipped.values())
    model = rasa_ext.patch_model(build(), 2, 1, target_modules=heads)  # heads named as targets
    assert len(rasa_ext.summary(model).skipped) == 2


def square() -> nn.Module:
    """Build a model with a square layer, as large as the position table, that is no head."""
    return vision("mix", out=8, places=nn.Embedding(8, 8))


def inner() -> nn.Module:
    return nn.Sequential(*(nn.ModuleDict({"head": nn.Linear(8, 8)}) for _ in range(2)))


def first() -> nn.Module:
    return nn.ModuleDict({"head": nn.Linear(8, 8), "tail": nn.Linear(8, 8)})


@pytest.mark.parametrize("build", [square, inner, first, lambda: nn.Sequential(*body())])
def test_layers_that_are_no_heads_stay(build):
    model = rasa_ext.patch_model(build(), 2, 1)
    assert not rasa_ext.summary(model).skipped


def convnext() -> nn.Module:
    """Build a model like timm's ConvNeXt with conv_mlp: all convolutions, except the head."""
    model = nn.Module()
    model.stem = nn.Conv2d(3, 8, 4)
    model.blocks = nn.ModuleList(
        nn.ModuleDict(
            {
                "depthwise": nn.Conv2d(8, 8, 7, groups=8),
                "fc1": nn.Conv2d(8, 32, 1),
                "fc2": nn.Conv2d(32, 8, 1),
            }
        )
        for _ in range(3)
    )
    model.head = nn.Linear(8, 10)
    return model


def test_a_model_of_convolutions_does_not_adapt_its_head_alone():
    model = convnext()
    said = "head: an output head", r"stem \(Conv2d\)", "modules_to_save"
    refused(lambda: rasa_ext.patch_model(model, 2, 1), model, "^target_modules", *said)


def test_pointwise_convolutions_are_named_with_the_reason():
    model = convnext()
    model.attention = nn.Linear(8, 8)
    rasa_ext.patch_model(model, 2, 0, target_modules=["attention"], modules_to_save=["blocks.0"])
    report, reason = rasa_ext.summary(model), "a 1x1 convolution, not a linear layer"
    names = [f"blocks.{i}.{fc}" for i in (1, 2) for fc in ("fc1", "fc2")]
    expected = {"head": "not named by target_modules", **dict.fromkeys(names, reason)}
    assert report.skipped == expected
    assert f"left out: blocks.*.fc1 (2 layers): {reason}" in str(report)


class FusedHead(nn.Module):
    """Computes logits like fused losses: from the head's weight, without calling the head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        hidden = self.model.model(input_ids).last_hidden_state
        logits = nn.functional.linear(hidden, self.model.get_output_embeddings().weight)
        return types.SimpleNamespace(logits=logits)


@pytest.mark.parametrize("under_peft", [False, True])
def test_losses_that_read_the_head_s_weight_train_its_adapter(under_peft):
    base, targets = LLAMA.build(), ["q_proj", "lm_head"]
    if under_peft:
        model = peft.adapted(LLAMA.build(), target_modules=targets)
        inner, disabled, merge = peft.plain(model), model.disable_adapter, model.merge_adapter
    else:
        inner = model = patched(LLAMA.build(), target_modules=targets)
        disabled, merge = (partial(f, model) for f in (rasa_ext.disable_adapter, rasa_ext.merge))
    check_step(LLAMA, base, inner, FusedHead(inner))
    head = inner.get_output_embeddings()
    with disabled():
        assert head.weight is head.base_layer.weight
    merged = oracle.merged_weight(base.lm_head, adapters(inner)["lm_head"]).float()
    merge()
    assert head.weight is head.base_layer.weight
    torch.testing.assert_close(head.weight, merged)
