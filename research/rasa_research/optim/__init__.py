"""Optimizers for adapters: LoRA-Pro."""

from rasa_research.optim.lora_pro import LoraPro

__all__ = ["LoraPro"]
