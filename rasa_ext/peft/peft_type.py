"""RaSA's member of PEFT's closed list of methods."""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType


def extend_enum(kinds: Any, name: str) -> Any:
    """Give the member ``name`` of an enumeration of strings, made if it has none.

    Enumerations are closed, so this writes what ``enum`` itself writes for a member.
    """
    if name in kinds.__members__:
        return kinds[name]
    member: Any = str.__new__(kinds, name)
    member._name_ = member._value_ = name
    member.__objclass__ = kinds
    member._sort_order_ = len(kinds.__members__)
    type.__setattr__(kinds, name, member)
    kinds._member_names_.append(name)
    kinds._member_map_[name] = member
    kinds._value2member_map_[name] = member
    return kinds[name]


RASA = extend_enum(PeftType, "RASA")
