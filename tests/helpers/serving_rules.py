"""What readers of LoRA directories accept and what they then compute, written from their sources.

vLLM (lora/peft_helper.py, lora/utils.py, config/lora.py), SGLang (srt/lora/lora.py,
lora_config.py, mem_pool.py) and llama.cpp (convert_lora_to_gguf.py, and the adapter's scale in
llama-graph), as they stood in 2026. Each reader takes the configuration and the tensors of a
directory and gives the weight change (out, in) of every module that it applies, or raises Refused.
Nothing here knows how the package writes its files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Refused(Exception):
    """The reader would not load the directory."""


def need(condition: Any, reason: str) -> None:
    if not condition:
        raise Refused(reason)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def vllm(config: Config, tensors: Tensors, model: nn.Module, max_lora_rank: int) -> dict:
    """One scale; linear layers by the last part of their names; nothing besides.

    Newer versions (0.32) honour rank_pattern, older ones do not know it; here it must be empty.
    """
    need(max_lora_rank in VLLM_RANKS, "max_lora_rank is one of a list")
    for field in ("r", "lora_alpha", "target_modules"):
        need(field in config, f"{field} is missing")
    need(not config.get("modules_to_save"), "modules_to_save must be None")
    need(not config.get("use_dora"), "no DoRA")
    need(config.get("bias", "none") == "none", "no bias")
    need(not config.get("rank_pattern"), "rank_pattern is read by newer versions only")
    need(0 < config["r"] <= max_lora_rank, "r is above max_lora_rank")
    pairs = _pairs(tensors, lambda name: name.removeprefix("base_model.model."))
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    supported = {name.rpartition(".")[2] for name in linears}
    targets = config["target_modules"]
    if isinstance(targets, str):  # only a regular expression that ends in (one|or|another)
        ending = re.search(r"\((.*?)\)\$?$", targets)
        need(ending and set(ending[1].split("|")) <= supported, "target_modules is a string")
    else:
        need({t.rpartition(".")[2] for t in targets} <= supported, "target_modules not supported")
    for name in pairs:
        need(name.rpartition(".")[2] in supported, f"{name} is no linear layer")
    r, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return {name: scale * B @ A for name, (A, B) in pairs.items()}


def sglang(config: Config, tensors: Tensors, model: nn.Module, max_lora_rank: int) -> dict:
    """One rank and alpha / r, whatever use_rslora says; q, k, v and gate, up are stacked.

    Stacking begins with q and with gate: k and up may be missing, and are zeros then, but v may
    not. What is left unstacked has no buffer: older versions refuse it, newer ones, as here, log a
    warning and serve the rest, which is another function.
    """
    need(str(config.get("peft_type")).lower() == "lora", "peft_type is not LORA")
    for field in ("r", "lora_alpha", "target_modules"):
        need(field in config, f"{field} is missing")
    need(isinstance(config["target_modules"], list), "target_modules is no list")
    need(config["r"] <= max_lora_rank, "r is above max_lora_rank")
    pairs = _pairs(tensors, lambda name: name.removeprefix("base_model.model."))
    for name, (A, _) in pairs.items():
        in_layer = re.search(r"layers\.\d+\.", name)
        need(in_layer or "embed_tokens" in name or "lm_head" in name, f"{name} is in no layer")
        need(A.shape[0] == config["r"], f"{name} is of another rank")
    modules, unstacked = {name for name, _ in model.named_modules()}, set()
    for name in pairs:
        if name.endswith("q_proj"):
            need(name.replace("q_proj", "v_proj") in pairs, f"{name} without v_proj")
        for part, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
            its = name.replace(part, first)
            if name.endswith(part) and its in modules and its not in pairs:
                unstacked.add(name)
    scale = config["lora_alpha"] / config["r"]
    return {name: scale * B @ A for name, (A, B) in pairs.items() if name not in unstacked}


def llama_cpp(config: Config, tensors: Tensors, model: nn.Module, max_lora_rank: int) -> dict:
    """alpha over the rank of each pair, whatever r, use_rslora or the patterns say.

    Norms are converted, and then left out without a word; any other whole tensor is refused.
    """
    need("lora_alpha" in config, "lora_alpha is missing")
    tensors = {n: t for n, t in tensors.items() if "_layernorm" not in n and ".norm" not in n}
    for name in tensors:
        need(re.search(r"\.lora_[AB]\.weight", name), f"Unexpected name {name}")
    pairs = _pairs(tensors, lambda name: name.replace("base_model.model.", ""))
    tied = getattr(model.config, "tie_word_embeddings", False)
    need(not (tied and "lm_head" in pairs), "lm_head is in the adapter, but not in the model")
    alpha = float(config["lora_alpha"])
    return {name: (alpha / A.shape[0] if alpha else 1) * B @ A for name, (A, B) in pairs.items()}


READERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "vllm": vllm,
    "sglang": sglang,
    "llama.cpp": llama_cpp,
}


def _pairs(tensors: Tensors, rename: Callable[[str], str]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        need(match, f"{key} is unsupported LoRA weight")
        found.setdefault(rename(match[1]), {})[match[2]] = tensor
    for name, parts in found.items():
        need(len(parts) == 2, f"{name} has one factor only")
        need(parts["A"].shape[0] == parts["B"].shape[1], f"{name} has factors of two ranks")
    return {name: (parts["A"], parts["B"]) for name, parts in found.items()}
