"""Command lines to serve an exported adapter; docs/serving.md has the options of each server."""

from __future__ import annotations

import shlex
from pathlib import Path

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""

GGUF = "adapter.gguf"
"""File name of a LoRA for llama.cpp."""

BASE_FOLDER = "BASE_FOLDER"
"""Placeholder in cards and commands for the folder of a base without a name on the Hub."""


def serving_help(
    base: str,
    lora: Path,
    rank: int,
    *,
    float32: bool,
    expert_layout: str | None = None,
    format: str = "peft",
) -> str:
    """Explain how to serve a LoRA over ``base``: a Hub id, a directory or a .gguf file.

    The text ends with the commands, one per line, after two spaces. They contain the path ``lora``
    as given, and `BASE_FOLDER` if the folder of the model behind a .gguf is unknown.

    ``float32`` states that the base has that dtype, which vLLM only serves on request.
    ``expert_layout`` is None if the LoRA has no experts.
    """
    of_gguf, named = base.endswith(".gguf"), f"{lora.name or 'rasa'}={lora}"
    if format == "gguf":
        return _with_llama_cpp(base, lora, float32=float32)
    if format == "mlx":
        model = BASE_FOLDER if of_gguf else base
        return _with(
            "mlx-lm, which reads rope_theta; if the base's config.json has only rope_parameters, "
            "add rope_theta there",
            ["mlx_lm.server", "--model", model, "--adapter-path", str(lora)],
        )
    if expert_layout == "peft":
        return (
            "PEFT loads it, and so does vLLM if it stores the model's experts in three dimensions, "
            "such as gpt-oss's. For vLLM with other models, SGLang and llama.cpp, export with "
            "--expert-layout per-expert."
        )
    if expert_layout == "shared-outer":
        words = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
        words += ["--max-lora-rank", str(rank), "--experts-shared-outer-loras", "--lora-paths"]
        return _with("SGLang", [*words, named])
    if of_gguf:
        return "vLLM reads no .gguf; for llama.cpp, export with --format gguf."
    limit = next((r for r in VLLM_RANKS if r >= rank), None)
    if limit is None:
        return (
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}; for this adapter use `rasa-ext merge`, or "
            "a lower --rank."
        )
    # By default, vLLM rounds a float32 model to bfloat16.
    words = ["vllm", "serve", base, *(["--dtype", "float32"] if float32 else [])]
    # One slot more than adapters: on a CPU, vLLM uses the last slot for rows without an adapter.
    words += ["--enable-lora", "--max-lora-rank", str(limit), "--max-loras", "2"]
    return _with("vLLM", [*words, "--lora-modules", named])


def _with(server: str, *commands: list[str]) -> str:
    return "\n  ".join([f"Serve it with {server}:", *map(shlex.join, commands)])


def _with_llama_cpp(base: str, lora: Path, *, float32: bool) -> str:
    of_gguf = base.endswith(".gguf")
    gguf = base if of_gguf else str(lora / "base.gguf")
    # The cache in memory ignores adapters, so it mixes up requests with and without one.
    serve = ["llama-server", "-m", gguf, "--lora", str(lora / GGUF), "--cache-ram", "0"]
    if of_gguf:
        return _with("llama.cpp", serve)
    remote = [] if base == BASE_FOLDER or Path(base).is_dir() else ["--remote"]
    # By default, the converter chooses float16.
    dtype = ["--outtype", "f32"] if float32 else []
    convert = ["python", "convert_hf_to_gguf.py", *remote, base, "--outfile", gguf, *dtype]
    return _with("llama.cpp, whose source has the script that converts the base", convert, serve)
