"""The configs under the name that users import; ``methods`` documents their fields."""

from rasa_ext.methods.base import ALL_LINEAR, AdapterConfig
from rasa_ext.methods.rasa import RasaConfig

__all__ = ["ALL_LINEAR", "AdapterConfig", "RasaConfig"]
