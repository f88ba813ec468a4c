"""The configs, where users import them: see ``methods`` for what each means."""

from rasa_ext.methods.base import ALL_LINEAR, AdapterConfig
from rasa_ext.methods.rasa import RasaConfig

__all__ = ["ALL_LINEAR", "AdapterConfig", "RasaConfig"]
