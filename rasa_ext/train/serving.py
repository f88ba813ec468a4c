"""Command lines that serve what was exported."""

from __future__ import annotations

import shlex
from pathlib import Path

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""

BASE_FOLDER = "BASE_FOLDER"
"""Stands for the folder of the model that a .gguf was made from: nothing in the file names it."""


def serving_help(
    base: str, lora: Path, rank: int, *, float32: bool, experts: str | None = None
) -> str:
    """Explain how to serve a LoRA over ``base``: a hub id, a directory or a .gguf file.

    ``float32`` says that the base is of that dtype, in which vLLM serves it only if told so, and
    ``experts`` is the layout of its experts, None where it has none.
    """
    if experts == "shared-outer":
        return f"Serve it with SGLang:\n  {sglang_command(base, lora, rank)}"
    if experts == "peft":
        return (
            "PEFT loads it, and vLLM where it keeps a model's experts in three dimensions, as of "
            "gpt-oss. For other models of vLLM, for SGLang and for llama.cpp export with "
            "--experts per-expert."
        )
    if base.endswith(".gguf"):
        first, second = llama_cpp_commands(base, lora)
        return (
            "vLLM reads no .gguf. Serve it with llama.cpp, whose converter wants the model's own "
            f"folder (its config.json is enough) for {BASE_FOLDER}:\n  {first}\n  {second}"
        )
    command = vllm_command(base, lora, rank, float32=float32)
    if command is None:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}; for this adapter use `rasa-ext merge`."
    return f"Serve it with vLLM:\n  {command}"


def vllm_command(base: str, lora: Path, rank: int, *, float32: bool) -> str | None:
    """The shell command that serves a LoRA with vLLM, or None if the rank is above its largest."""
    limit = next((r for r in VLLM_RANKS if r >= rank), None)
    if limit is None:
        return None
    words = ["vllm", "serve", base]
    if float32:  # left alone, vLLM rounds such a model to bfloat16
        words += ["--dtype", "float32"]
    words += ["--enable-lora", "--max-lora-rank", str(limit)]
    # One slot more than adapters: on a CPU, vLLM takes the last slot for rows without an adapter.
    words += ["--max-loras", "2"]
    return shlex.join([*words, "--lora-modules", f"{lora.name or 'rasa'}={lora.resolve()}"])


def sglang_command(base: str, lora: Path, rank: int) -> str:
    """The shell command that serves a LoRA whose experts share their outer sides with SGLang."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
    words += ["--max-lora-rank", str(rank), "--experts-shared-outer-loras"]
    return shlex.join([*words, "--lora-paths", f"{lora.name or 'rasa'}={lora.resolve()}"])


def llama_cpp_commands(gguf: str, lora: Path) -> tuple[str, str]:
    """The shell commands that convert a LoRA for llama.cpp, and serve it over a .gguf."""
    path = lora.resolve()
    converted = str(path.with_name(f"{path.name}.gguf"))
    convert = ["python", "convert_lora_to_gguf.py", str(path), "--base", BASE_FOLDER]
    convert += ["--outtype", "f32", "--outfile", converted]
    # The cache in memory knows nothing of adapters: it mixes up requests with and without one.
    serve = ["llama-server", "-m", gguf, "--lora", converted, "--cache-ram", "0"]
    return shlex.join(convert), shlex.join(serve)
