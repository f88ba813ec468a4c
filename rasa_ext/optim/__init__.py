"""Optimizers that know what an adapter is: LoRA-Pro."""

from rasa_ext.optim.lora_pro import LoraPro

__all__ = ["LoraPro"]
