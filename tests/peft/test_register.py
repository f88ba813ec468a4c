"""Registering RaSA with PEFT, which has a fixed list of methods."""

import enum
import importlib
import json
import pickle

import peft
import pytest
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType

import rasa_ext.peft
from rasa_ext.peft.peft_type import extend_enum

MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


class Kind(str, enum.Enum):  # noqa: UP042 - as PeftType is
    """An enum to extend."""

    FIRST = "FIRST"


def test_a_new_member_is_like_any_other():
    member = extend_enum(Kind, "RASA")
    assert list(Kind) == [Kind.FIRST, member]
    assert Kind.RASA is Kind("RASA") is Kind["RASA"] is member
    assert (member.name, member.value, member) == ("RASA", "RASA", "RASA")
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps({"kind": member}) == '{"kind": "RASA"}'
    assert extend_enum(Kind, "RASA") is member
    assert extend_enum(Kind, "FIRST") is Kind.FIRST


def test_importing_registers():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RASA] is rasa_ext.peft.RasaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["RASA"] is rasa_ext.peft.RasaModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RASA] == "rasa_"
    config = peft.get_peft_config({"peft_type": "RASA", "r": 16})
    assert isinstance(config, rasa_ext.peft.RasaConfig)
    assert config.rasa_k == 2


def test_a_peft_with_a_rasa_of_its_own_is_left_alone():
    before = [dict(mapping) for mapping in MAPPINGS]
    with pytest.raises(KeyError, match="already PEFT method called 'rasa'"):
        importlib.reload(rasa_ext.peft)
    assert [dict(mapping) for mapping in MAPPINGS] == before
