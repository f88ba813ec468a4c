"""RaSA's member in PEFT's enumeration of methods."""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType


def extend_enum(kinds: Any, name: str) -> Any:
    """Return the member ``name`` of a string enumeration, and add it if missing.

    Enumerations are closed, so this writes the attributes that ``enum`` writes for a member.
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
