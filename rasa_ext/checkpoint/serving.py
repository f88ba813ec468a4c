"""Command lines that serve what was exported."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""

GGUF = "adapter.gguf"
"""The file of a LoRA for llama.cpp."""

BASE_FOLDER = "BASE_FOLDER"
"""Stands in a card, or a command, for the folder of a base that has no name on the Hub."""


def serving_help(
    base: str,
    lora: Path,
    rank: int,
    *,
    float32: bool,
    expert_layout: str | None = None,
    format: str = "peft",
) -> str:
    """Explain how to serve a LoRA over ``base``: a hub id, a directory or a .gguf file.

    Commands have the path ``lora`` as it is given, and `BASE_FOLDER` where nothing names the folder
    of the model that a .gguf was made from.

    ``float32`` says that the base is of that dtype, in which vLLM serves it only if asked to;
    ``expert_layout`` is None where the LoRA has no experts.
    """
    if format == "gguf":
        return _with_llama_cpp(base, lora, float32=float32)
    if format == "mlx":
        return _with_mlx(base, lora)
    if expert_layout == "shared-outer":
        words = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
        words += ["--max-lora-rank", str(rank), "--experts-shared-outer-loras", "--lora-paths"]
        return f"Serve it with SGLang:\n  {shlex.join([*words, _named(lora)])}"
    if expert_layout == "peft":
        return (
            "PEFT loads it, and vLLM where it keeps a model's experts in three dimensions, as of "
            "gpt-oss. For other models of vLLM, for SGLang and for llama.cpp export with "
            "--expert-layout per-expert."
        )
    if base.endswith(".gguf"):
        adapter = f"{lora}.gguf" if lora.name else GGUF
        words = ["python", "convert_lora_to_gguf.py", str(lora), "--base", BASE_FOLDER]
        words += ["--outtype", "f32", "--outfile", adapter]
        return (
            "vLLM reads no .gguf. Serve it with llama.cpp: export with --format gguf, or convert "
            "this LoRA. The converter wants the model's own folder (its config.json is enough) for "
            f"{BASE_FOLDER}:\n  {shlex.join(words)}\n  {_llama_server(base, adapter)}"
        )
    command = vllm_command(base, lora, rank, float32=float32)
    if command is None:
        return (
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}; for this adapter use `rasa-ext merge`, or "
            "a lower --rank."
        )
    return f"Serve it with vLLM:\n  {command}"


def vllm_command(base: str, lora: Path, rank: int, *, float32: bool) -> str | None:
    """The shell command that serves a LoRA with vLLM, or None if the rank is above its largest."""
    limit = next((r for r in VLLM_RANKS if r >= rank), None)
    if limit is None:
        return None
    # Left alone, vLLM rounds a float32 model to bfloat16.
    words = ["vllm", "serve", base, *(["--dtype", "float32"] if float32 else [])]
    # One slot more than adapters: on a CPU, vLLM takes the last slot for rows without an adapter.
    words += ["--enable-lora", "--max-lora-rank", str(limit), "--max-loras", "2"]
    return shlex.join([*words, "--lora-modules", _named(lora)])


def _named(lora: Path) -> str:
    return f"{lora.name or 'rasa'}={lora}"


def _with_llama_cpp(base: str, lora: Path, *, float32: bool) -> str:
    adapter, converted = str(lora / GGUF), str(lora / "base.gguf")
    if base.endswith(".gguf"):
        return f"Serve it with llama.cpp:\n  {_llama_server(base, adapter)}"
    here = base == BASE_FOLDER or Path(base).is_dir()
    words = ["python", "convert_hf_to_gguf.py", *([] if here else ["--remote"]), base]
    # Left alone, it chooses float16.
    words += ["--outfile", converted, *(["--outtype", "f32"] if float32 else [])]
    return (
        "Serve it with llama.cpp, whose source has the converter of the base:\n"
        f"  {shlex.join(words)}\n  {_llama_server(converted, adapter)}"
    )


def _llama_server(gguf: str, adapter: str) -> str:
    # The cache in memory knows nothing of adapters: it mixes up requests with and without one.
    return shlex.join(["llama-server", "-m", gguf, "--lora", adapter, "--cache-ram", "0"])


def _with_mlx(base: str, lora: Path) -> str:
    of_gguf = base.endswith(".gguf")
    model = BASE_FOLDER if of_gguf else base
    wants = f", which wants the model's own folder for {BASE_FOLDER}" if of_gguf else ""
    command = shlex.join(["mlx_lm.server", "--model", model, "--adapter-path", str(lora)])
    text = f"Serve it with mlx-lm{wants}:\n  {command}"
    if _lacks_rope_theta(Path(base)):
        text += (
            f"\n{base}/config.json has rope_parameters only, and most models of mlx-lm read "
            "rope_theta: write it there as well, or they compute with 10000."
        )
    return text


def _lacks_rope_theta(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "rope_parameters" in config and "rope_theta" not in config
