"""What PEFT's adapters lie over: linear layers alone, or stacked experts as well."""

from __future__ import annotations

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
# Older releases of transformers say too little of how their experts lie.
needs_experts = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="needs transformers 5.20"
)


@dataclasses.dataclass(frozen=True)
class Side:
    """A base, and PEFT models over copies of it, whose first adapter is "default"."""

    base: Callable[..., nn.Module]
    one: Callable[..., PeftModel]
    two: Callable[..., PeftModel]
    """With "second" beside it, or more."""
    dense: Callable[..., Tensor]
    """The logits of ``tokens`` by the oracle: a model, and the names of its adapters."""
    close: Callable[[Tensor, Tensor], None]
    tokens: Tensor
    up: str
    """A weight of each block."""
    options: dict[str, Any]
    """Those of the config by which ``one`` adapts."""

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
    """Parametrize by ``side``: linear layers, and these families of experts."""
    found = [pytest.param(EXPERTS[family], marks=needs_experts, id=family) for family in families]
    return pytest.mark.parametrize("side", [pytest.param(LINEAR, id="linear"), *found])
