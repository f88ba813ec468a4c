"""Small random models with adapters, one of each family in the GGUF and mlx-lm formats."""

import torch
import transformers

import rasa_ext

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "smollm3": {},
    "granite": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    # mlx-lm's Gemma uses the exact GELU; transformers' approximation would differ by 1.9e-3.
    "gemma": {"head_dim": 8, "hidden_act": "gelu"},
    "gemma2": _HEADS,
    "gemma3_text": {**_HEADS, "num_hidden_layers": 6},  # the sixth layer has full attention
    "phi3": {"original_max_position_embeddings": 512},
}


def adapted(family: str):
    """Return a family's model with a large random adapter; every call returns equal weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **_SIZES | FAMILIES[family])
    for name, value in FAMILIES[family].items():
        setattr(config, name, value)  # even if transformers replaced the value
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    rasa_ext.patch_model(model, rank=4, k=1)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.3 * noise)
    return model
