"""RaSA as a PEFT method (PEFT 0.21 or newer). Importing this module registers it.

import rasa_ext.peft
model = peft.get_peft_model(model, rasa_ext.peft.RasaConfig(r=8))
"""

from peft.utils import register_peft_method

from rasa_ext.peft.config import RasaConfig
from rasa_ext.peft.experts import RasaPeftExperts, RasaPeftExpertWeight
from rasa_ext.peft.layer import RasaPeftLinear
from rasa_ext.peft.lora import export_lora
from rasa_ext.peft.model import RasaModel
from rasa_ext.peft.peft_type import RASA

__all__ = [
    "RasaConfig",
    "RasaModel",
    "RasaPeftExpertWeight",
    "RasaPeftExperts",
    "RasaPeftLinear",
    "export_lora",
]

register_peft_method(
    name=RASA.name.lower(), config_cls=RasaConfig, model_cls=RasaModel, prefix=RasaModel.prefix
)
