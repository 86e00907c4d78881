"""Invented places with opening hours, prices and rules, which `opening_hours` tells and asks about."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from .splits import rank

T = TypeVar("T")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEEKDAYS, SATURDAY, SUNDAY = (0, 1, 2, 3, 4), 5, 6
KINDS = (
    *(
        "library",
        "museum",
        "gallery",
        "bakery",
        "workshop",
        "garden",
        "observatory",
        "archive",
        "market hall",
        "bookshop",
    ),
    *(
        "swimming pool",
        "climbing hall",
        "boathouse",
        "greenhouse",
        "toy shop",
        "print shop",
        "tea room",
        "skating rink",
    ),
)
RULES = {
    "dogs": "bring a dog",
    "photographs": "take photographs",
    "bicycles": "bring a bicycle",
    "food": "eat your own food",
    "prams": "bring a pram",
    "cards": "pay by card",
}
NAME_STARTS = (
    *("Alder", "Ask", "Bar", "Bel", "Bran", "Cald", "Cor", "Dal", "Dun", "El", "Fen", "Fal", "Gar", "Gris", "Hal"),
    *("Hes", "Iver", "Kel", "Kirn", "Lang", "Lor", "Mar", "Mel", "Nor", "Oak", "Or", "Pen", "Quar", "Rav", "Ros"),
    *("Sel", "Skel", "Tar", "Thorn", "Ul", "Ver", "Wend", "Wil", "Yar", "Zel"),
)
NAME_ENDS = (
    *("beck", "brook", "by", "combe", "dale", "den", "field", "ford", "gate", "ham", "holt", "ing", "ley", "mere"),
    *("mont", "ness", "sted", "stow", "ton", "wick"),
)
NAME_SHARES = {"train": 0.7, "dev": 0.1, "test": 0.2}


class Draw:
    """Chance that is the same on every version of Python, which promises that for `random()` alone."""

    def __init__(self, seed: str) -> None:
        self._generator = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        """A whole number, both bounds included."""
        return low + int(self._generator.random() * (high - low + 1))

    def pick(self, choices: Sequence[T]) -> T:
        """One of several."""
        return choices[self.number(0, len(choices) - 1)]

    def shuffle(self, items: Sequence[T]) -> list[T]:
        """All of them in another order."""
        keys = [self._generator.random() for _ in items]
        return [items[i] for i in sorted(range(len(items)), key=lambda i: keys[i])]

    def happens(self, share: float) -> bool:
        """True in this share of the cases."""
        return self._generator.random() < share


class Span(NamedTuple):
    """From one time to another, in minutes after midnight."""

    start: int
    end: int


class Block(NamedTuple):
    """Days with the same hours."""

    days: tuple[int, ...]
    hours: Span


@dataclass(frozen=True, eq=False)
class Place:
    """What is true of a place.

    Attributes:
        name (`str`): a proper name, used nowhere else.
        kind (`str`): one of `KINDS`.
        blocks (`tuple[Block, ...]`): hours; on days in no block the place is closed.
        pause (`Span`, *optional*): it closes in between, on the days of the first block.
        last_entry (`int`, *optional*): nobody is let in during that many minutes before closing.
        winter (`bool`): from November to February it closes an hour earlier.
        holidays (`bool`): on public holidays the hours of a Sunday hold.
        prices (`tuple[int, int]`): for an adult and a child, in euros.
        free_day (`int`, *optional*): a day on which nobody pays.
        rules (`dict[str, bool]`): two of `RULES`, and whether that is allowed.
    """

    name: str
    kind: str
    blocks: tuple[Block, ...]
    pause: Span | None
    last_entry: int | None
    winter: bool
    holidays: bool
    prices: tuple[int, int]
    free_day: int | None
    rules: dict[str, bool]

    @property
    def title(self) -> str:
        """The name in a sentence."""
        return f"the {self.name} {self.kind}"

    def list_spans(self, day: int) -> tuple[Span, ...]:
        """When the place is open on a day: never, once, or before and after the pause."""
        for number, block in enumerate(self.blocks):
            if day in block.days:
                if self.pause and number == 0:
                    return Span(block.hours.start, self.pause.start), Span(self.pause.end, block.hours.end)
                return (block.hours,)
        return ()

    def list_open_days(self) -> list[int]:
        return [day for day in range(7) if self.list_spans(day)]

    def list_closed_days(self) -> list[int]:
        return [day for day in range(7) if not self.list_spans(day)]


def list_names(split: str) -> list[str]:
    """The proper names of a split. No name belongs to two splits."""
    names = sorted((start + end for start in NAME_STARTS for end in NAME_ENDS), key=lambda name: rank("names", name))
    first = 0
    for other, share in NAME_SHARES.items():
        last = first + round(share * len(names))
        if other == split:
            return names[first:last]
        first = last
    raise ValueError(f"There is no split {split!r}; expected one of {', '.join(NAME_SHARES)}.")


def draw_place(draw: Draw, name: str, kind: str) -> Place:
    """Invent a place."""
    blocks = _draw_blocks(draw)
    long_enough = blocks[0].hours.start <= 11 * 60 and blocks[0].hours.end >= 15 * 60
    pause_start = draw.pick((720, 735, 750, 765, 780))
    pause = Span(pause_start, pause_start + draw.pick((30, 45, 60, 75, 90)))
    open_days = [day for block in blocks for day in block.days]
    adult = draw.number(4, 15)
    return Place(
        name=name,
        kind=kind,
        blocks=blocks,
        pause=pause if long_enough and draw.happens(0.35) else None,
        last_entry=draw.pick((15, 20, 30, 45, 60)) if draw.happens(0.3) else None,
        winter=draw.happens(0.25),
        holidays=draw.happens(0.25),
        prices=(adult, adult // 2 if draw.happens(0.4) else draw.number(1, adult - 1)),
        free_day=draw.pick(open_days) if draw.happens(0.25) else None,
        rules={rule: draw.happens(0.5) for rule in draw.shuffle(list(RULES))[:2]},
    )


def _draw_blocks(draw: Draw) -> tuple[Block, ...]:
    first = draw.pick(
        (
            *((WEEKDAYS,) * 3),
            *((0, 1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5), (2, 3, 4), (2, 3, 4, 5), (0, 1, 3, 4), (0, 2, 4), (1, 3)),
        )
    )
    blocks = [Block(first, _draw_hours(draw, draw.pick((8, 9, 10, 11)), draw.pick((15, 16, 17, 18, 19))))]
    if first[-1] < SATURDAY and len(first) < 5 and draw.happens(0.5):
        free = [day for day in WEEKDAYS if day not in first]
        blocks.append(Block((draw.pick(free),), _draw_hours(draw, draw.pick((12, 13, 14)), draw.pick((19, 20, 21)))))
    weekend = [day for day in (SATURDAY, SUNDAY) if day not in first]
    if len(weekend) == 2 and draw.happens(0.25):
        blocks.append(Block((SATURDAY, SUNDAY), _draw_hours(draw, draw.pick((9, 10, 11)), draw.pick((14, 16, 18)))))
    else:
        for day in weekend:
            if draw.happens(0.65):
                hours = _draw_hours(draw, draw.pick((9, 10, 11, 12)), draw.pick((14, 15, 17, 18)))
                blocks.append(Block((day,), hours))
    return tuple(blocks)


def _draw_hours(draw: Draw, start: int, end: int) -> Span:
    return Span(start * 60 + draw.pick((0, 0, 15, 30, 45)), end * 60 + draw.pick((0, 0, 15, 30, 45)))
