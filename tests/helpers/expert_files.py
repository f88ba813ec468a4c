"""Tiny mixtures of experts with adapters, and the dense changes of their stacked weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext.nn.rasa_experts import RasaBank
from tests.helpers import oracle
from tests.helpers.models import randomize_weights

EXPERTS, HIDDEN, INNER, RANK = 5, 16, 24, 3

_SPARSE = {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "chunk_size": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INNER},
    "gpt_oss": {"num_local_experts": EXPERTS},
    "nemotron_h": {
        **{**_SPARSE, **_MAMBA, "n_groups": 1, "n_shared_experts": 1},
        "moe_shared_expert_intermediate_size": 12,
        "layers_block_type": ["moe", "moe"],
    },
}
FAMILIES = tuple(OPTIONS)


def build(family: str, **options: Any) -> nn.Module:
    """A causal language model of two layers, whose weights all matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    usual = {
        "vocab_size": 32,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "use_cache": False,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        **OPTIONS[family],
        **options,
    }
    if family == "gpt_oss":
        usual["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    if "layers_block_type" in usual:
        del usual["num_hidden_layers"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **usual))
    randomize_weights(model, torch.Generator().manual_seed(1))
    return model.eval()


def adapted(base: nn.Module, experts: str = "slot", k: int = 1, **options: Any) -> nn.Module:
    """A patched copy whose adapters are far from their initial zeros."""
    model = rasa_ext.patch_model(copy.deepcopy(base), RANK, k, experts=experts, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.4 * noise)
    return model


def banks(model: nn.Module) -> dict[str, RasaBank]:
    return {n: module for n, module in model.named_modules() if isinstance(module, RasaBank)}


def of_experts(bank: RasaBank) -> list[oracle.Adapter]:
    """Each expert's adapter, its pool being its own or that of all."""
    A, A_pool, B, B_pool, d = bank.adapter().factors()
    own = A_pool is not None and A_pool.dim() == 3
    return [
        oracle.Adapter(A[e], A_pool[e] if own else A_pool, B[e], B_pool[e] if own else B_pool, d[e])
        for e in range(len(A))
    ]


def changes(model: nn.Module) -> dict[str, Tensor]:
    """dW (E, out, in), float64, of every adapted stacked weight."""
    return {
        name: torch.stack([oracle.delta(each) for each in of_experts(bank)])
        for name, bank in banks(model).items()
    }


TOKENS = torch.arange(24).view(2, 12) * 7 % 32


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits
