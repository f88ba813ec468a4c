"""Command lines that serve what was exported."""

from __future__ import annotations

import shlex
from pathlib import Path

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""


def vllm_command(base: str, lora: Path, rank: int) -> str | None:
    """The shell command that serves a LoRA with vLLM, or None if the rank is above its largest."""
    limit = next((r for r in VLLM_RANKS if r >= rank), None)
    if limit is None:
        return None
    module = f"{lora.name or 'rasa'}={lora.resolve()}"
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(limit)]
    return shlex.join([*words, "--lora-modules", module])
