"""Adds `PeftType.PREFIX_PLUS` to PEFT's closed enumeration of methods."""

import enum
from typing import Any

from peft import PeftType

METHOD_NAME = "prefix_plus"
MEMBER_NAME = METHOD_NAME.upper()


def add_string_member(enumeration: type[enum.Enum], name: str) -> enum.Enum:
    """Add a member whose value is its own name to an enumeration of strings, once.

    PEFT has no door for third-party methods: `register_peft_method` refuses a name that is not a member of `PeftType`.
    A member made here behaves like one written in the class body: lookup by name, by value and by attribute,
    iteration, identity, pickling, copying and JSON.

    Args:
        enumeration (`type[enum.Enum]`): an enumeration that also derives from `str`.
        name (`str`): name and value of the member.

    Returns:
        `enum.Enum`: the new member, or the one that is already there.
    """
    if name in enumeration.__members__:
        return enumeration.__members__[name]
    member: Any = str.__new__(enumeration, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enumeration
    member._sort_order_ = len(enumeration._member_names_)
    # `EnumMeta.__setattr__` refuses to touch members, so the attribute goes in before the name becomes one.
    type.__setattr__(enumeration, name, member)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    added: enum.Enum = member
    return added


PREFIX_PLUS = add_string_member(PeftType, MEMBER_NAME)
