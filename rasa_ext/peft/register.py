"""Registration of RaSA with PEFT, as ``rasa``."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from rasa_ext.peft.config import RasaConfig
from rasa_ext.peft.model import RasaModel
from rasa_ext.peft.peft_type import RASA


def register() -> None:
    """Register config and tuner with PEFT, once.

    Raises ImportError if PEFT has a RaSA of its own, which is left as it is.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(RASA)
    if known is RasaConfig:
        return
    if known is not None:
        raise ImportError(
            f"PEFT has a method {RASA.name} already ({known.__module__}.{known.__qualname__}); use "
            "it, or rasa_ext.patch_model without PEFT."
        )
    register_peft_method(
        name=RASA.name.lower(), config_cls=RasaConfig, model_cls=RasaModel, prefix=RasaModel.prefix
    )
