"""Base models for tests of PEFT: one with linear layers only, and some with stacked experts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn

from tests.helpers import peft, peft_experts
from tests.helpers.tiny_lm import make_model

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
# Older releases of transformers do not describe the layout of expert weights well enough.
needs_experts = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="needs transformers 5.20"
)


@dataclasses.dataclass(frozen=True)
class Side:
    """A base, and PEFT models over copies of the base, with a first adapter named "default"."""

    base: Callable[..., nn.Module]
    one: Callable[..., PeftModel]
    two: Callable[..., PeftModel]
    """A model with "default", "second" and perhaps more adapters."""
    dense: Callable[..., Tensor]
    """The oracle's logits of ``tokens``, given a model and adapter names."""
    close: Callable[[Tensor, Tensor], None]
    tokens: Tensor
    up: str
    """Name of a weight that every block has."""
    options: dict[str, Any]
    """Options of the config that ``one`` uses."""

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(self.tokens).logits


LINEAR = Side(
    make_model,
    peft.tiny,
    peft.two,
    peft.dense,
    peft.close,
    peft.TOKENS,
    "up_proj",
    {"r": peft.RANK, "rasa_k": 1},
)
EXPERTS = {
    family: Side(
        functools.partial(peft_experts.moe, family),
        functools.partial(peft_experts.tuned, family),
        functools.partial(peft_experts.two, family=family),
        functools.partial(peft_experts.dense, family=family),
        peft_experts.close,
        peft_experts.TOKENS,
        "gate_up_proj",
        {"r": 3, "rasa_k": 1, "rasa_experts": "shared"},
    )
    for family in FAMILIES
}


def sides(*families: str) -> pytest.MarkDecorator:
    """Parametrize a test by ``side``: linear layers, and ``families`` of experts."""
    found = [pytest.param(EXPERTS[family], marks=needs_experts, id=family) for family in families]
    return pytest.mark.parametrize("side", [pytest.param(LINEAR, id="linear"), *found])
