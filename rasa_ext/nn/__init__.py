"""Autograd and modules: packs, the low-rank linear, the adapted layers."""

from rasa_ext.nn.adapter import AdaptedModule
from rasa_ext.nn.functional import adapted_group
from rasa_ext.nn.rasa import RasaLinear, RasaPool
from rasa_ext.nn.rasa_experts import RasaExperts

__all__ = ["AdaptedModule", "RasaExperts", "RasaLinear", "RasaPool", "adapted_group"]
