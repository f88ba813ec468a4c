"""RaSA as a PEFT method (PEFT 0.21 or newer). Importing this module registers it.

import rasa_ext.peft
model = peft.get_peft_model(model, rasa_ext.peft.RasaConfig(r=8))
"""

from typing import Any

from peft.optimizers import loraplus
from peft.utils import register_peft_method

from rasa_ext.peft.config import RasaConfig
from rasa_ext.peft.experts import RasaPeftExperts, RasaPeftExpertWeight
from rasa_ext.peft.layer import RasaPeftLinear
from rasa_ext.peft.lora import export_lora, import_lora
from rasa_ext.peft.model import RasaModel
from rasa_ext.peft.named import NamedAdapters
from rasa_ext.peft.peft_type import RASA

__all__ = [
    "RasaConfig",
    "RasaModel",
    "RasaPeftExpertWeight",
    "RasaPeftExperts",
    "RasaPeftLinear",
    "export_lora",
    "import_lora",
]

register_peft_method(
    name=RASA.name.lower(), config_cls=RasaConfig, model_cls=RasaModel, prefix=RasaModel.prefix
)


def _refusing(parameter_names: Any) -> Any:
    """Return the function that LoRA+ asks first for a model's names, refusing our adapters."""

    def names_of(model: Any, *args: Any) -> Any:
        if any(isinstance(module, NamedAdapters) for module in model.modules()):
            raise ValueError(
                "model: expected a LoRA of PEFT for create_loraplus_optimizer, which looks for its "
                "names; make the optimizer with rasa_ext.training.parameter_groups(model, lr, "
                "loraplus_lr_ratio=...)."
            )
        return parameter_names(model, *args)

    return names_of


_module: Any = loraplus
_module.get_parameter_names = _refusing(_module.get_parameter_names)
