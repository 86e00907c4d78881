"""A behaviour: a function that does with a method what a user would do, and raises if it does not work."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .methods import Method

Check = Callable[[Method, Path], None]


class Behaviour(NamedTuple):
    """One row of the table.

    Attributes:
        group (`str`): heading that it stands under.
        title (`str`): what a user would say.
        check (`Callable`): takes a [`Method`] and an empty directory.
    """

    group: str
    title: str
    check: Check

    @property
    def name(self) -> str:
        return self.check.__name__


BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(group: str) -> Callable[[Check], Check]:
    """Register a function under a heading; the first line of its docstring is the title."""

    def register(check: Check) -> Check:
        title = (check.__doc__ or "").strip().splitlines()[0].rstrip(".")
        if check.__name__ in BEHAVIOURS:
            raise ValueError(f"There are two behaviours named {check.__name__!r}.")
        BEHAVIOURS[check.__name__] = Behaviour(group, title, check)
        return check

    return register
