"""Tiny mixtures of experts of many families, and stacks of experts without a model."""

import functools
import inspect
import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext.nn.rasa_experts import RasaExperts
from tests.helpers.models import Entry, randomize_weights
from tests.helpers.oracle import Adapter

EXPERTS, HIDDEN, INNER, TOP = 5, 16, 24, 2
GROUPINGS = ("slot", "layer", "shared")

_SPARSE = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": INNER}
_DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
_ONE_GROUP = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "chunk_size": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": 12,
    },
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INNER},
    "gpt_oss": {"num_local_experts": EXPERTS},
    "nemotron_h": {
        **{**_SPARSE, **_MAMBA, "num_hidden_layers": None, "n_groups": 1},
        "moe_shared_expert_intermediate_size": 12,
        "layers_block_type": ["moe", "moe"],
    },
    "olmoe": {"num_experts": EXPERTS},
    "deepseek_v3": {**_SPARSE, **_DEEPSEEK, **_ONE_GROUP, "v_head_dim": 8, "head_dim": None},
    "glm4_moe": {**_SPARSE, **_ONE_GROUP},
}
"""Config options by transformers' family name. gpt-oss has transposed weights, biases, and gates
interleaved with ups; nemotron_h has no gates."""
FAMILIES = tuple(OPTIONS)
_DENSE_FIRST = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_NAMED = {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "num_shared_experts": 1}
_FULL = {"layer_types": ["full_attention"] * 2}
_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_INDEXER = {"v_head_dim": 8, "head_dim": None, "index_n_heads": 2, "index_head_dim": 8}
_DELTA = {f"linear_{each}": 8 for each in ("key_head_dim", "value_head_dim")}
BESIDE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_SPARSE, **_DEEPSEEK, **_DENSE_FIRST, "v_head_dim": 8, "head_dim": 4},
    "deepseek_v3": {**OPTIONS["deepseek_v3"], **_DENSE_FIRST},
    "deepseek_v32": {**_SPARSE, **_DEEPSEEK, **_DENSE_FIRST, **_INDEXER, "index_topk": 4},
    "glm4_moe": {**_SPARSE, **_DENSE_FIRST},
    "glm4_moe_lite": {**_SPARSE, **_DEEPSEEK, **_DENSE_FIRST, "v_head_dim": 8, "head_dim": None},
    "glm_moe_dsa": {**_SPARSE, **_DEEPSEEK, **_INDEXER, **_THEN_SPARSE, "index_topk": 4},
    "qwen2_moe": OPTIONS["qwen2_moe"],
    "qwen3_moe": {**OPTIONS["qwen3_moe"], "mlp_only_layers": [0]},
    "qwen3_next": {**OPTIONS["qwen2_moe"], **_FULL, **_DELTA},
    "dots1": {**_SPARSE, **_DENSE_FIRST},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_intermediate_size": INNER,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_k": TOP,
    },
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": TOP, "moe_intermediate_size": INNER},
    "exaone_moe": {**_NAMED, **_DENSE_FIRST, **_FULL, **_THEN_SPARSE, "sliding_window": 4},
    "afmoe": {**_NAMED, **_FULL, "num_dense_layers": 1},
    "solar_open": {**_SPARSE, **_DENSE_FIRST},
    "cohere2_moe": {**_NAMED, **_FULL, **_THEN_SPARSE},
    "lfm2_moe": {**_NAMED, **_FULL, "num_dense_layers": 1},
}
"""Families that also have linear MLPs: shared experts, or dense MLPs in layers without experts."""
_BARE: dict[str, Any] = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim")),
    **dict.fromkeys(("intermediate_size", "num_experts_per_tok", "max_position_embeddings")),
}
_STATE_SPACE = {**_BARE, "state_size": 4, "time_step_rank": 4}
_COMPRESSED = {"hc_mult": 2, "o_groups": 2, "o_lora_rank": 4, "num_key_value_heads": 1}
RARE: dict[str, dict[str, Any]] = {
    "phimoe": {"num_local_experts": EXPERTS},
    "llama4_text": {
        "num_local_experts": EXPERTS,
        "intermediate_size_mlp": 12,
        "moe_layers": [0, 1],
    },
    "deepseek_v4": {
        **{**_SPARSE, **_COMPRESSED, "q_lora_rank": 8, "partial_rotary_factor": 0.5},
        "layer_types": ["sliding_attention"] * 2,
        "mlp_layer_types": ["moe"] * 2,
    },
    "mamba": _STATE_SPACE,
    "falcon_mamba": _STATE_SPACE,
    "jamba": {
        **{"num_experts": EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 4},
        **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
        **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    },
    "gemma4_text": {
        **{"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": TOP, **_FULL},
        **{"moe_intermediate_size": INNER, "global_head_dim": 8, "num_global_key_value_heads": 2},
        **{"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 32},
        "num_kv_shared_layers": 0,
    },
    "hunyuan_v1_moe": BESIDE["hunyuan_v1_moe"],
    "afmoe": BESIDE["afmoe"],
    "zaya": {**_NAMED, "num_experts_per_tok": 1, "router_hidden_size": 8},
    "jetmoe": {"num_local_experts": EXPERTS, "kv_channels": 8},
    "dbrx": {
        **{**_BARE, "hidden_size": None, "num_hidden_layers": None},
        **{"d_model": HIDDEN, "n_heads": 2, "n_layers": 2, "max_seq_len": 32},
        "ffn_config": {
            **{"hidden_size": HIDDEN, "ffn_hidden_size": INNER},
            **{"moe_num_experts": EXPERTS, "moe_top_k": TOP},
        },
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
}
"""Families in which a layer cannot be adapted, or is adapted only if named as a target."""
UNMARKED = ("Llama4TextExperts", "Step3p7Experts")
"""Classes without the attributes that transformers' decorator sets (the second, before 5.25). The
first has transposed weights, and its forward gets rows for every expert, not a router's choices."""
UNLIKE = ("mixtral", "gpt_oss", "nemotron_h")
"""One family of each layout."""


def model(family: str = "mixtral", beside: bool = False, **options: Any) -> nn.Module:
    """Build a causal language model of two layers in which every weight affects the output.

    With ``beside``, take the options from ``BESIDE``, for a model that also has linear MLPs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
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
        "num_experts_per_tok": TOP,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        **(BESIDE if beside else {**RARE, **OPTIONS})[family],
        **options,
    }
    if family == "gpt_oss":
        usual["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    given = {
        key: value for key, value in usual.items() if value is not None or key.endswith("token_id")
    }
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given))
    randomize_weights(made, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for module in experts_of(made).values():
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == 3:
                    generator = torch.Generator().manual_seed(len(name))
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return made


def entry(family: str = "mixtral", **options: Any) -> Entry:
    """Return ``model`` as an Entry, for tests that run a step of a whole model."""
    return Entry(
        family,
        functools.partial(model, family, **options),
        lambda generator: {"input_ids": torch.randint(0, 32, (4, 7), generator=generator)},
        lambda model, **inputs: model(**inputs).logits,
        ("lm_head",),
    )


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the unpatched modules with stacked expert weights, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module.__dict__.get("has_gate"), bool) or type(module).__name__ in UNMARKED
    }


def adapted(model: nn.Module) -> list[RasaExperts]:
    return [module for module in model.modules() if isinstance(module, RasaExperts)]


def weight_names(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")


@functools.cache
def _normed() -> type[nn.Module]:
    """Define experts with a norm on each output, declared to transformers' decorator."""
    from transformers.integrations.moe import use_experts_implementation

    class NormedExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
            self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.3)
            self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)
            self.post_expert_norm = nn.RMSNorm(HIDDEN, eps=1e-6)
            nn.init.uniform_(self.post_expert_norm.weight)

        def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            raise NotImplementedError("grouped_mm or batched_mm")

    return use_experts_implementation(has_post_expert_norm=True)(NormedExperts)


def normed_stack(layers: int = 2) -> nn.Module:
    """Return layers of experts with a norm on each output, nested like the layers of a model."""
    torch.manual_seed(0)
    config = SimpleNamespace(_experts_implementation="batched_mm")
    stack = nn.ModuleList(nn.ModuleDict({"experts": _normed()(config)}) for _ in range(layers))
    return nn.ModuleDict({"layers": stack})


def patched(base: nn.Module, grouping: str, rank: int = 3, k: int = 1, **options: Any) -> nn.Module:
    """Patch ``base`` in place, by default only the experts, and randomize the adapters."""
    names = {name for module in experts_of(base).values() for name in weight_names(module)}
    options.setdefault("target_modules", rf"(.*\.)?experts\.({'|'.join(sorted(names))})")
    model = rasa_ext.patch_model(base, rank, k, experts=grouping, **options)
    randomize(model)
    return model


def randomize(model: nn.Module, seed: int = 3) -> None:
    """Randomize every adapter tensor, so that dW is about as large as W."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        named = sorted(model.named_parameters(), key=lambda item: "rasa_pool" in item[0])
        for name, parameter in named:
            if parameter.requires_grad and re.search(r"[._][ABd]$", name):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                d = name.endswith(".d")
                parameter.copy_(0.3 * noise + d)


def stack_adapters(module: RasaExperts) -> dict[str, Adapter]:
    """Return the adapters' parameters (not copies) by weight name."""
    found = {}
    for name, stack in module.stacks().items():
        pool = (None, None) if stack.pool is None else (stack.pool.A, stack.pool.B)
        found[name] = Adapter(stack.A, pool[0], stack.B, pool[1], stack.d)
    return found


def inputs(
    tokens: int = 7,
    top: int = TOP,
    seed: int = 5,
    dtype: torch.dtype = torch.float64,
    hidden: int = HIDDEN,
    count: int = EXPERTS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x (T, H), chosen experts (T, top) and shares (T, top).

    Expert 1 is never chosen, unless every token chooses all experts.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    free = [e for e in range(count) if top == count or e != 1]
    orders = torch.rand(tokens, len(free), generator=generator).argsort(1)[:, :top]
    shares = torch.rand(tokens, top, generator=generator, dtype=torch.float64) + 0.1
    return x.to(dtype), torch.tensor(free)[orders].view(tokens, top), shares.to(dtype)


def unmarked_stack(kind: str, layers: int = 2) -> nn.Module:
    """Return layers of ``UNMARKED`` experts, nested like the layers of a model."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER}
    config = SimpleNamespace(**sizes, num_local_experts=EXPERTS, hidden_act="silu")
    made = {"Llama4TextExperts": Llama4TextExperts, "Step3p7Experts": Step3p7Experts}[kind]
    numbered = "layer_idx" in inspect.signature(made).parameters  # transformers 5.25 and later
    if numbered:
        vars(config).update(_experts_implementation="eager", limit_after_act=True)
        config.swiglu_limits = [0.7] * layers
    stack = nn.ModuleList(
        nn.ModuleDict({"experts": made(config, i) if numbered else made(config)})
        for i in range(layers)
    )
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.3)
    return nn.ModuleDict({"layers": stack})
