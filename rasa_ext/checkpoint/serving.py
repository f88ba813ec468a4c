"""Command lines that serve what was exported."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from rasa_ext.checkpoint.card import BASE_FOLDER
from rasa_ext.checkpoint.lora_gguf import GGUF

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""


def serving_help(
    base: str,
    lora: Path,
    rank: int,
    *,
    float32: bool,
    experts: str | None = None,
    format: str = "peft",
) -> str:
    """Explain how to serve a LoRA over ``base``: a hub id, a directory or a .gguf file.

    Commands have the path ``lora`` as it is given, and `BASE_FOLDER` where nothing names the folder
    of the model that a .gguf was made from.

    ``float32`` says that the base is of that dtype, in which vLLM serves it only if told so, and
    ``experts`` is the layout of its experts, None where it has none.
    """
    if format == "gguf":
        return _with_llama_cpp(base, lora, float32=float32)
    if format == "mlx":
        return _with_mlx(base, lora)
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
            "vLLM reads no .gguf. Serve it with llama.cpp: export with --format gguf, or convert "
            "this LoRA. The converter wants the model's own folder (its config.json is enough) for "
            f"{BASE_FOLDER}:\n  {first}\n  {second}"
        )
    command = vllm_command(base, lora, rank, float32=float32)
    if command is None:
        return (
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}; for this adapter use `rasa-ext merge`, or "
            "a lower --rank."
        )
    return f"Serve it with vLLM:\n  {command}"


def _with_llama_cpp(base: str, lora: Path, *, float32: bool) -> str:
    adapter = str(lora / GGUF)
    if base.endswith(".gguf"):
        return f"Serve it with llama.cpp:\n  {llama_server_command(base, adapter)}"
    converted = str(lora / "base.gguf")
    convert = ["python", "convert_hf_to_gguf.py", *_from_hub(base), "--outfile", converted]
    if float32:  # left alone, it chooses float16
        convert += ["--outtype", "f32"]
    return (
        "Serve it with llama.cpp, whose source has the converter of the base:\n"
        f"  {shlex.join(convert)}\n  {llama_server_command(converted, adapter)}"
    )


def _from_hub(base: str) -> list[str]:
    return [base] if base == BASE_FOLDER or Path(base).is_dir() else ["--remote", base]


def _with_mlx(base: str, lora: Path) -> str:
    text = "Serve it with mlx-lm"
    if base.endswith(".gguf"):
        text += f", which wants the model's own folder for {BASE_FOLDER}"
    told = f"{text}:\n  {mlx_command(base, lora)}"
    if _lacks_rope_theta(Path(base)):
        told += (
            f"\n{base}/config.json has rope_parameters only, and most models of mlx-lm read "
            "rope_theta: write it there as well, or they compute with 10000."
        )
    return told


def _lacks_rope_theta(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "rope_parameters" in config and "rope_theta" not in config


def mlx_command(base: str, lora: Path) -> str:
    """The shell command that serves a LoRA in mlx-lm's format."""
    model = BASE_FOLDER if base.endswith(".gguf") else base
    return shlex.join(["mlx_lm.server", "--model", model, "--adapter-path", str(lora)])


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
    return shlex.join([*words, "--lora-modules", f"{lora.name or 'rasa'}={lora}"])


def sglang_command(base: str, lora: Path, rank: int) -> str:
    """The shell command that serves a LoRA whose experts share their outer sides with SGLang."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
    words += ["--max-lora-rank", str(rank), "--experts-shared-outer-loras"]
    return shlex.join([*words, "--lora-paths", f"{lora.name or 'rasa'}={lora}"])


def llama_cpp_commands(gguf: str, lora: Path) -> tuple[str, str]:
    """The shell commands that convert a LoRA for llama.cpp, and serve it over a .gguf."""
    converted = f"{lora}.gguf" if lora.name else GGUF
    convert = ["python", "convert_lora_to_gguf.py", str(lora), "--base", BASE_FOLDER]
    convert += ["--outtype", "f32", "--outfile", converted]
    return shlex.join(convert), llama_server_command(gguf, converted)


def llama_server_command(gguf: str, adapter: str) -> str:
    """The shell command that serves a LoRA in a GGUF file over a base in another."""
    # The cache in memory knows nothing of adapters: it mixes up requests with and without one.
    return shlex.join(["llama-server", "-m", gguf, "--lora", adapter, "--cache-ram", "0"])
