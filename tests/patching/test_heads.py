"""Output heads that all-linear leaves out, and 1x1 convolutions, which are named as left out."""

from __future__ import annotations

import types

import pytest
from torch import nn

import rasa_ext


def body(width: int = 8) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(width, width) for _ in range(2)])


def vision(name: str = "head", parts: tuple[str, ...] = ()) -> nn.Module:
    """Blocks and, last, a linear layer at the given path."""
    model = nn.Module()
    model.blocks = body()
    model.norm = nn.LayerNorm(8)
    head: nn.Module = nn.Linear(8, 10)
    for part in reversed(parts):
        head = nn.ModuleDict({part: head})
    model.add_module(name, head)
    return model


def timm() -> nn.Module:
    """A classifier that only the model itself knows by name."""
    model = vision("output_layer")
    model.get_classifier = lambda: model.output_layer
    return model


def distilled() -> nn.Module:
    model = vision("one")
    model.two = nn.Linear(8, 10)
    model.get_classifier = lambda: (model.one, model.two)
    return model


def language_model() -> nn.Module:
    """A bare module whose last layer scores the words, under a name of its own."""
    model = nn.Module()
    model.words, model.places = nn.Embedding(50, 8), nn.Embedding(16, 8)
    model.blocks = body()
    model.unembed = nn.Linear(8, 50)
    return model


def labelled() -> nn.Module:
    model = vision("qa_outputs")
    model.config = types.SimpleNamespace(num_labels=10)
    return model


def other_get_classifier() -> nn.Module:
    model = labelled()
    model.get_classifier = lambda name: name  # not timm's
    return model


HEADS = {
    "head": (vision, ["head"]),
    "head.fc": (lambda: vision("head", ("fc",)), ["head.fc"]),
    "heads.head": (lambda: vision("heads", ("head",)), ["heads.head"]),
    "fc": (lambda: vision("fc"), ["fc"]),
    "classifier": (lambda: vision("classifier"), ["classifier"]),
    "timm": (timm, ["output_layer"]),
    "distilled": (distilled, ["one", "two"]),
    "words": (language_model, ["unembed"]),
    "labels": (labelled, ["qa_outputs"]),
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
    model = rasa_ext.patch_model(build(), 2, 1, target_modules=heads)  # asked for by name
    assert len(rasa_ext.summary(model).skipped) == 2


def square() -> nn.Module:
    """A layer as square as the table of places is no head."""
    model = nn.Module()
    model.places = nn.Embedding(8, 8)
    model.blocks = body()
    model.mix = nn.Linear(8, 8)
    return model


def inner() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"head": nn.Linear(8, 8)}) for _ in range(2)])
    return model


def first() -> nn.Module:
    model = nn.Module()
    model.head = nn.Linear(8, 8)
    model.tail = nn.Linear(8, 8)
    return model


@pytest.mark.parametrize("build", [square, inner, first, lambda: nn.Sequential(*body())])
def test_layers_that_are_no_heads_stay(build):
    model = rasa_ext.patch_model(build(), 2, 1)
    assert not rasa_ext.summary(model).skipped


def convnext() -> nn.Module:
    """timm's ConvNeXt with conv_mlp: everything but the head is a convolution."""
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
    with pytest.raises(
        ValueError, match=r"leaves none of the model's 1\. head: an output head"
    ) as e:
        rasa_ext.patch_model(convnext(), 2, 1)
    assert "stem (Conv2d)" in str(e.value)
    assert "modules_to_save trains" in str(e.value)


def test_pointwise_convolutions_are_named_with_the_reason():
    model = convnext()
    model.attention = nn.Linear(8, 8)
    with pytest.warns(UserWarning, match="groups: 'attention' is the only layer"):
        rasa_ext.patch_model(
            model, 2, 1, target_modules=["attention"], modules_to_save=["blocks.0"]
        )
    report = rasa_ext.summary(model)
    assert report.skipped == {
        "head": "not named by target_modules",
        **{
            f"blocks.{i}.{fc}": "a 1x1 convolution, not a linear layer"
            for i in (1, 2)
            for fc in ("fc1", "fc2")
        },
    }
    assert "left out: blocks.*.fc1 (2 layers): a 1x1 convolution, not a linear layer" in str(report)
