"""Making RaSA known to PEFT under the name ``rasa``."""

from __future__ import annotations

import enum

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "RASA"


def extend_enum(kinds: type[enum.Enum], name: str) -> enum.Enum:
    """The member ``name`` of an enumeration of strings, made if it has none.

    Enumerations are closed, so this writes what ``enum`` itself writes for a member.
    """
    if name in kinds.__members__:
        return kinds[name]
    member = str.__new__(kinds, name)
    member._name_ = member._value_ = name
    member.__objclass__ = kinds
    member._sort_order_ = len(kinds.__members__)
    type.__setattr__(kinds, name, member)
    kinds._member_names_.append(name)
    kinds._member_map_[name] = member
    kinds._value2member_map_[name] = member
    return member


def register() -> None:
    """Register config and tuner with PEFT, once.

    Raises ImportError where PEFT has a RaSA of its own, which stays as it is.
    """
    from rasa_ext.peft.config import RasaConfig
    from rasa_ext.peft.model import RasaModel

    kind = extend_enum(PeftType, NAME)  # register_peft_method wants a member, and makes none
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is RasaConfig:
        return
    if known is not None:
        raise ImportError(
            f"PEFT has a method {NAME} already ({known.__module__}.{known.__qualname__}); use it, "
            "or rasa_ext.patch_model without PEFT."
        )
    register_peft_method(
        name=NAME.lower(), config_cls=RasaConfig, model_cls=RasaModel, prefix=RasaModel.prefix
    )
