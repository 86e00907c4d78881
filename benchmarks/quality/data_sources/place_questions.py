"""Questions about two places and their answers. A question that would be ambiguous, or has no answer, is not asked."""

from collections.abc import Callable
from typing import NamedTuple

from .place_facts import DAYS, RULES, SUNDAY, Draw, Place
from .place_prose import NUMBERS, capitalize, format_time, list_days

WINTER_MONTHS = ("November", "December", "January", "February")
OTHER_MONTHS = ("March", "April", "May", "June", "July", "August", "September", "October")


class Question(NamedTuple):
    """What is asked, and the one answer."""

    text: str
    answer: str


Asker = Callable[[Draw, Place, Place], Question | None]


def ask_opening(draw: Draw, place: Place, _: Place) -> Question | None:
    """When it opens on a day."""
    day = draw.number(0, SUNDAY)
    spans = place.list_spans(day)
    text = draw.pick(("When does {it} open on {day}s?", "From when on can I visit {it} on a {day}?"))
    answer = f"At {format_time(spans[0].start)}." if spans else f"It is closed on {DAYS[day]}s."
    return Question(text.format(it=place.title, day=DAYS[day]), answer)


def ask_closing(draw: Draw, place: Place, _: Place) -> Question | None:
    """Until when it is open on a day, and in which month if that matters."""
    day = draw.number(0, SUNDAY)
    spans = place.list_spans(day)
    if place.winter and not spans:
        return None
    winter = draw.happens(0.6)
    month = f" in {draw.pick(WINTER_MONTHS if winter else OTHER_MONTHS)}" if place.winter else ""
    text, word = draw.pick(
        (
            ("Until when is {it} open on a {day}{month}?", "Until"),
            ("When does {it} close for the night on {day}s{month}?", "At"),
            ("It is a {day}{month}. When will {it} close for the night?", "At"),
        )
    )
    end = spans[-1].end - 60 * (place.winter and winter) if spans else None
    answer = f"It is closed on {DAYS[day]}s." if end is None else f"{word} {format_time(end)}."
    return Question(text.format(it=place.title, day=DAYS[day], month=month), answer)


def ask_time(draw: Draw, place: Place, _: Place) -> Question | None:
    """Whether it is open at a time, today or tomorrow; half of the answers are yes."""
    day = draw.number(0, SUNDAY)
    time = draw.number(16, 42) * 30
    if place.winter or _is_edge(place, day, time) or _is_open(place, day, time) != draw.happens(0.5):
        return None
    part = "morning" if time < 720 else "afternoon" if time < 1080 else "evening"
    text = draw.pick(
        (
            "Is {it} open on {day} {part} at {time}?",
            "Can I go to {it} on a {day} at {time}?",
            "It is {before}. Will {it} be open tomorrow at {time}?",
        )
    )
    question = text.format(
        it=place.title, day=DAYS[day], part=part, time=format_time(time), before=DAYS[(day - 1) % len(DAYS)]
    )
    return Question(question, _explain_time(place, day, time))


def ask_closed_days(draw: Draw, place: Place, _: Place) -> Question | None:
    """On which days it is closed."""
    closed = place.list_closed_days()
    text = draw.pick(("On which days is {it} closed?", "When in the week is {it} not open at all?"))
    return Question(text.format(it=place.title), f"On {list_days(closed)}." if closed else "It is open every day.")


def ask_duration(draw: Draw, place: Place, _: Place) -> Question | None:
    """How long it is open on a day, without the pause."""
    day = draw.pick(place.list_open_days())
    if place.winter:
        return None
    hours, minutes = divmod(sum(span.end - span.start for span in place.list_spans(day)), 60)
    text = draw.pick(("For how long is {it} open on a {day}?", "How many hours is {it} open on {day}s?"))
    answer = f"For {hours} hours{f' and {minutes} minutes' if minutes else ''}."
    return Question(text.format(it=place.title, day=DAYS[day]), answer)


def ask_earlier(draw: Draw, place: Place, other: Place) -> Question | None:
    """Which of two opens earlier on a day."""
    day = draw.number(0, SUNDAY)
    starts = {each: spans[0].start for each in (place, other) if (spans := each.list_spans(day))}
    text = draw.pick(
        ("Which opens earlier on {day}s, {one} or {two}?", "On {day}s, is it {one} or {two} that opens first?")
    )
    return _compare(text, day, place, other, starts, min)


def ask_later(draw: Draw, place: Place, other: Place) -> Question | None:
    """Which of two is open longer into the evening on a day."""
    day = draw.number(0, SUNDAY)
    if place.winter or other.winter:
        return None
    ends = {each: spans[-1].end for each in (place, other) if (spans := each.list_spans(day))}
    text = draw.pick(
        ("Which closes later on {day}s, {one} or {two}?", "On {day}s, is it {one} or {two} that closes last?")
    )
    return _compare(text, day, place, other, ends, max)


def ask_total(draw: Draw, place: Place, _: Place) -> Question | None:
    """What a group pays on a day."""
    day = draw.pick(place.list_open_days())
    if place.free_day is not None and draw.happens(0.4):
        day = place.free_day
    adults, children = draw.number(1, 3), draw.number(1, 4)
    group = f"{NUMBERS[adults]} adult{'s' * (adults > 1)} and {NUMBERS[children]} child{'ren' * (children > 1)}"
    text = draw.pick(("What do {group} pay at {it} on a {day}?", "How much is {it} for {group} on a {day}?"))
    total = adults * place.prices[0] + children * place.prices[1]
    answer = f"Nothing, entry is free on {DAYS[day]}s." if day == place.free_day else f"{total} euros."
    return Question(text.format(group=group, it=place.title, day=DAYS[day]), answer)


def ask_both(draw: Draw, place: Place, other: Place) -> Question | None:
    """Whether both, one or none of the two is open at a time."""
    day, time = draw.number(0, SUNDAY), draw.number(17, 38) * 30
    if place.winter or other.winter or _is_edge(place, day, time) or _is_edge(other, day, time):
        return None
    open_ones = [each for each in (place, other) if _is_open(each, day, time)]
    if len(open_ones) != draw.number(0, 2):
        return None
    text = f"Are both {place.title} and {other.title} open on {DAYS[day]}s at {format_time(time)}?"
    answers = ("No, neither is.", f"No, only {open_ones[0].title if open_ones else ''} is.", "Yes, both are.")
    return Question(text, answers[len(open_ones)])


def ask_last_entry(draw: Draw, place: Place, _: Place) -> Question | None:
    """When the last visitor is let in on a day."""
    if place.last_entry is None or place.winter:
        return None
    day = draw.pick(place.list_open_days())
    text = draw.pick(("How late can I still enter {it} on a {day}?", "Until when does {it} let people in on {day}s?"))
    latest = place.list_spans(day)[-1].end - place.last_entry
    return Question(text.format(it=place.title, day=DAYS[day]), f"Until {format_time(latest)}.")


def ask_holiday(draw: Draw, place: Place, _: Place) -> Question | None:
    """What holds on a public holiday."""
    if not place.holidays:
        return None
    spans = place.list_spans(SUNDAY)
    text = draw.pick(
        ("When does {it} open on a public holiday?", "{It} on a public holiday: from when on is it open?")
    )
    answer = f"At {format_time(spans[0].start)}, as on Sundays." if spans else "It is closed then, as on Sundays."
    return Question(text.format(it=place.title, It=capitalize(place.title)), answer)


def ask_rule(draw: Draw, place: Place, other: Place) -> Question | None:
    """Whether something is allowed; the other place may have another rule for it."""
    rule = draw.pick(list(place.rules))
    text = draw.pick(("May I {action} at {it}?", "Is it all right to {action} at {it}?"))
    answer = "Yes, that is allowed." if place.rules[rule] else "No, that is not allowed."
    return Question(text.format(action=RULES[rule], it=place.title), answer)


ASKERS: dict[str, Asker] = {
    "opening": ask_opening,
    "closing": ask_closing,
    "time": ask_time,
    "closed days": ask_closed_days,
    "duration": ask_duration,
    "earlier": ask_earlier,
    "later": ask_later,
    "total": ask_total,
    "both": ask_both,
    "last entry": ask_last_entry,
    "holiday": ask_holiday,
    "rule": ask_rule,
}


def _is_open(place: Place, day: int, time: int) -> bool:
    return any(span.start <= time < span.end for span in place.list_spans(day))


def _is_edge(place: Place, day: int, time: int) -> bool:
    """Whether something opens or closes at that very minute, or nobody is let in any more."""
    ends = [span.end for span in place.list_spans(day)]
    starts = [span.start for span in place.list_spans(day)]
    near_end = place.last_entry is not None and bool(ends) and ends[-1] - place.last_entry <= time <= ends[-1]
    return time in ends or time in starts or near_end


def _explain_time(place: Place, day: int, time: int) -> str:
    spans = place.list_spans(day)
    if not spans:
        return f"No, it is closed on {DAYS[day]}s."
    for span in spans:
        if span.start <= time < span.end:
            return f"Yes, until {format_time(span.end)}."
    if time < spans[0].start:
        return f"No, it opens at {format_time(spans[0].start)}."
    if time < spans[-1].start:
        return f"No, it has a break until {format_time(spans[-1].start)}."
    return f"No, it closes at {format_time(spans[-1].end)}."


def _compare(
    text: str, day: int, place: Place, other: Place, times: dict[Place, int], choose: Callable[..., Place]
) -> Question | None:
    if not times or len(set(times.values())) < len(times):
        return None
    winner = choose(times, key=lambda each: times[each])
    question = text.format(day=DAYS[day], one=place.title, two=other.title)
    if len(times) == 1:
        loser = other if winner is place else place
        return Question(question, f"{capitalize(winner.title)}; {loser.title} is closed then.")
    return Question(question, f"{capitalize(winner.title)}, at {format_time(times[winner])}.")
