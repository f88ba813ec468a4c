"""Which LoRA directories serving engines accept, and what they compute, by their sources of 2026.

Sources: vLLM (lora/peft_helper.py, lora/utils.py, config/lora.py), SGLang (srt/lora/lora.py,
lora_config.py, mem_pool.py) and llama.cpp (convert_lora_to_gguf.py, and the adapter's scale in
llama-graph). Each reader takes a directory's configuration and tensors. It returns dW (out, in) of
every module that it applies, or raises Refused. This file shares no code with the package.

Experts: vLLM (lora/lora_model.py, lora/model_manager.py), SGLang (srt/lora/lora.py and mem_pool.py
of pull request 21466) and llama.cpp's converter, which stacks single experts. Their dW is (experts,
out, in).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Refused(Exception):
    """Raised if the reader would not load the directory."""


def need(condition: Any, reason: str) -> None:
    if not condition:
        raise Refused(reason)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def vllm(config: Config, tensors: Tensors, model: nn.Module, max_lora_rank: int) -> dict:
    """Read as vLLM does: one scale, and only linear layers, by the last part of the name.

    Newer versions (0.32) apply rank_pattern, older ones ignore it; here it must be empty.
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
    experts, single = _experts(model), _single_experts(model)
    supported |= {name.rpartition(".")[2] for name in single}
    targets = config["target_modules"]
    if isinstance(targets, str):  # only a regular expression that ends in (a|b|c)
        ending = re.search(r"\((.*?)\)\$?$", targets)
        need(ending and set(ending[1].split("|")) <= supported, "target_modules is a string")
    else:
        need({t.rpartition(".")[2] for t in targets} <= supported, "target_modules not supported")
    r, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    found = {}
    for path, count in experts.items():
        stacked = {n: pairs.pop(n) for n in (path, f"{path}.base_layer") if n in pairs}
        if stacked:  # vLLM asserts that both exist
            need(len(stacked) == 2, f"{path} has one stacked weight without the other")
            three = model.config.model_type in VLLM_STACKED
            read = _vllm_stacked if three else _vllm_fallback
            found.update({name: scale * dW for name, dW in read(path, count, stacked).items()})
    for path in {name.rpartition(".experts.")[0] for name in pairs if ".experts." in name}:
        mine = {name for name in pairs if name.startswith(f"{path}.experts.")}
        whole = {name for name in single if name.startswith(f"{path}.experts.")}
        need(mine == whole, f"{path} has not just all of its experts")
    for name in pairs:
        known = name.rpartition(".")[2] in supported and (".experts" not in name or name in single)
        need(known, f"{name} is no linear layer")
    return {**found, **{name: scale * B @ A for name, (A, B) in pairs.items()}}


VLLM_STACKED = ("gpt_oss",)
"""The tests' models with vLLM's is_3d_moe_weight."""


def _vllm_stacked(path: str, count: int, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict:
    """Read PEFT's layout: rows of A by expert, then rank; columns of B by rank, then expert."""
    found = {}
    for suffix, name in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
        A, B = pairs[f"{path}{suffix}"]
        A = A.reshape(count, -1, A.shape[-1])
        B = B.reshape(B.shape[0], -1, count).permute(2, 0, 1)
        found[f"{path}.{name}"] = B @ A
    return found


def _vllm_fallback(path: str, count: int, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict:
    """Read PEFT's layout as vLLM does for other models: a wrong dW, without an error."""
    A, B = pairs[f"{path}.base_layer"]
    gate, up = (rows.chunk(count, dim=-1) for rows in (B[::2], B[1::2]))
    each = [torch.cat([g @ a, u @ a]) for g, u, a in zip(gate, up, A.chunk(count), strict=True)]
    A, B = pairs[path]
    down = [b @ a for b, a in zip(B.chunk(count, dim=-1), A.chunk(count), strict=True)]
    return {f"{path}.gate_up_proj": torch.stack(each), f"{path}.down_proj": torch.stack(down)}


def sglang(config: Config, tensors: Tensors, model: nn.Module, max_lora_rank: int) -> dict:
    """Read as SGLang does: one rank, scale alpha / r even with use_rslora; qkv and gate-up stacked.

    Stacking starts from q and from gate: k and up may be missing and become zeros, v may not. An
    unstacked layer has no buffer. Older versions refuse it; newer ones, and this reader, skip it
    with a warning, so the served dW is wrong.
    """
    need(str(config.get("peft_type")).lower() == "lora", "peft_type is not LORA")
    for field in ("r", "lora_alpha", "target_modules"):
        need(field in config, f"{field} is missing")
    need(isinstance(config["target_modules"], list), "target_modules is no list")
    need(config["r"] <= max_lora_rank, "r is above max_lora_rank")
    stacked, tensors = _sglang_stacked(tensors, model)
    pairs = _pairs(tensors, lambda name: name.removeprefix("base_model.model."))
    for name, (A, _) in pairs.items():
        of_peft = re.search(r"experts(\.base_layer)?$", name)
        need(not of_peft, f"{name} is no module: PEFT's stacked layout is not read")
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
    found = {name: scale * B @ A for name, (A, B) in pairs.items() if name not in unstacked}
    for name, (A, B) in stacked.items():
        need(A.shape[1] == B.shape[2] == config["r"], f"{name} is of another rank")
        found[name] = scale * B @ A
    return found


def _sglang_stacked(tensors: Tensors, model: nn.Module) -> tuple[dict, dict]:
    """Split tensors into 3-D pairs, with one factor shared by all experts, and 2-D tensors."""
    flat = {key: tensor for key, tensor in tensors.items() if tensor.dim() == 2}
    parts: dict[str, dict[str, Tensor]] = {}
    for key in tensors.keys() - flat.keys():
        match = re.fullmatch(r"base_model\.model\.(.+\.experts\.\w+)\.lora_([AB])\.weight", key)
        need(match, f"{key} is unsupported")
        parts.setdefault(match[1], {})[match[2]] = tensors[key]
    for name in [name for name in parts if name.endswith(".gate_proj")]:  # concatenate their rows
        path = name.removesuffix("gate_proj")
        gate, up = parts.pop(name), parts.pop(f"{path}up_proj")
        need(torch.equal(gate["A"], up["A"]), "one A is all that the tests look at")
        parts[f"{path}gate_up_proj"] = {"A": gate["A"], "B": torch.cat([gate["B"], up["B"]], 1)}
    for name, pair in parts.items():
        outward = name.endswith("down_proj")
        one, each = (pair["B"], pair["A"]) if outward else (pair["A"], pair["B"])
        need(one.shape[0] == 1, f"{name} shares no outer side")
        need(each.shape[0] in _experts(model).values(), f"{name} has another number of experts")
    return {name: (pair["A"], pair["B"]) for name, pair in parts.items()}, flat


def llama_cpp(config: Config, tensors: Tensors, model: nn.Module, max_lora_rank: int) -> dict:
    """Read as llama.cpp does: alpha / rank of each pair, whatever r, use_rslora or patterns say.

    Norms are converted, then silently ignored. Any other tensor without a LoRA pair is refused.
    """
    need("lora_alpha" in config, "lora_alpha is missing")
    tensors = {n: t for n, t in tensors.items() if "_layernorm" not in n and ".norm" not in n}
    for name in tensors:
        need(re.search(r"\.lora_[AB]\.weight", name), f"Unexpected name {name}")
    pairs = _pairs(tensors, lambda name: name.replace("base_model.model.", ""))
    tied = getattr(model.config, "tie_word_embeddings", False)
    need(not (tied and "lm_head" in pairs), "lm_head is in the adapter, but not in the model")
    single, layers = _single_experts(model), [name for name in pairs if ".experts" in name]
    for name in layers:
        need(name in single, f"cannot map {name}")
        need(tensors[f"base_model.model.{name}.lora_A.weight"].dim() == 2, "no stacks are read")
        path = name.rpartition(".experts.")[0]
        whole = {n for n in single if n.startswith(f"{path}.experts.")}
        need(whole <= set(layers), f"{path} has unprocessed experts")
    alpha = float(config["lora_alpha"])
    return {name: (alpha / A.shape[0] if alpha else 1) * B @ A for name, (A, B) in pairs.items()}


READERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "vllm": vllm,
    "sglang": sglang,
    "llama.cpp": llama_cpp,
}


CHECKPOINTS = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
"""By model_type: the module name of experts in checkpoints, and the names of their matrices."""


def _experts(model: nn.Module) -> dict[str, int]:
    """Return the number of experts of each module with stacked experts, by checkpoint path."""
    folder, *_ = CHECKPOINTS.get(model.config.model_type, ("mlp",))
    return {
        name.replace(".mlp.", f".{folder}."): module.down_proj.shape[0]
        for name, module in model.named_modules()
        if isinstance(module.__dict__.get("has_gate"), bool)
    }


def _single_experts(model: nn.Module) -> set[str]:
    """Return names of all experts' matrices in a checkpoint, or none if it stacks experts."""
    if model.config.model_type in VLLM_STACKED:
        return set()
    usual = ("mlp", "gate_proj", "up_proj", "down_proj")
    _, *names = CHECKPOINTS.get(model.config.model_type, usual)
    gated = all(
        module.has_gate
        for module in model.modules()
        if isinstance(module.__dict__.get("has_gate"), bool)
    )
    return {
        f"{path}.{expert}.{name}"
        for path, count in _experts(model).items()
        for expert in range(count)
        for name in names[0 if gated else 1 :]
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
