"""Readers for checkpoints of other codes that rasa_ext cannot read."""

from rasa_research.checkpoint.official_experts import load_official_experts

__all__ = ["load_official_experts"]
