"""Checkpoints of other codes that the core does not read."""

from rasa_research.checkpoint.official_experts import load_official_experts

__all__ = ["load_official_experts"]
