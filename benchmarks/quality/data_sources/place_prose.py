"""Puts the facts of a place into sentences, in one of several ways each, among sentences that nobody asks about."""

from collections.abc import Callable

from .place_facts import DAYS, SATURDAY, WEEKDAYS, Block, Draw, Place

RULE_SENTENCES = {
    ("dogs", True): ("Dogs are welcome at {it}.", "You may bring your dog to {it}."),
    ("dogs", False): ("Dogs have to wait outside {it}.", "{It} admits no animals except guide dogs."),
    ("photographs", True): ("Visitors of {it} may take pictures.", "Nobody minds cameras at {it}."),
    ("photographs", False): ("Cameras must stay in the lockers of {it}.", "Taking pictures is forbidden at {it}."),
    ("bicycles", True): ("{It} lets you wheel your bicycle in.", "There are racks for bicycles inside {it}."),
    ("bicycles", False): ("Bicycles may not be taken into {it}.", "{It} wants bicycles left at the gate."),
    ("food", True): ("You may eat what you bring along at {it}.", "{It} has tables for people with their own lunch."),
    ("food", False): ("Picnics are not allowed at {it}.", "{It} asks you not to eat what you have brought."),
    ("prams", True): ("Prams fit through every door of {it}.", "{It} has room for prams."),
    ("prams", False): ("Prams must be left at the entrance of {it}.", "{It} has no room for prams."),
    ("cards", True): ("{It} takes cards as well as cash.", "Cards are accepted at {it}."),
    ("cards", False): ("{It} takes cash only.", "Only notes and coins are accepted at {it}."),
}
DISTRACTORS = (
    "{It} was founded in {year}.",
    "{It} is run by {person}.",
    "The telephone number of {it} is {phone}.",
    "The car park next to {it} is locked at {late}.",
    "Buses to {it} leave every {minutes} minutes from {early} on.",
    "Until {recent} {it} was open every day from {early} to {late}.",
    "About {people} people come to {it} each year.",
    "Guided tours of {it} start at {noon} and take {minutes} minutes.",
    "{person} has written a book about {it}, which costs {price} euros.",
    "The staff of {it} arrive at {early}.",
    "{It} stands on {street} Street, number {small}.",
    "A family ticket for {it} was tried out in {recent} and given up.",
)
TIME_STYLES: tuple[Callable[[int], str], ...] = (
    lambda time: format_time(time),
    lambda time: format_time(time).replace(":", "."),
    lambda time: _format_half_day(time),
    lambda time: _format_words(time),
)
HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def format_time(time: int) -> str:
    """`9:30`, the way in which questions and answers give times."""
    return f"{time // 60}:{time % 60:02}"


def _format_half_day(time: int) -> str:
    hour, minute = divmod(time, 60)
    return f"{(hour - 1) % 12 + 1}{f':{minute:02}' if minute else ''} {'am' if hour < 12 else 'pm'}"


def _format_words(time: int) -> str:
    hour, minute = divmod(time, 60)
    if (hour, minute) == (12, 0):
        return "noon"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    if minute == 45:
        return f"a quarter to {HOURS[(hour + 1) % 12]} {part}"
    word = {0: "", 15: "a quarter past ", 30: "half past "}.get(minute)
    return _format_half_day(time) if word is None else f"{word}{HOURS[hour % 12]} {part}"


def list_days(days: list[int]) -> str:
    """`Mondays, Tuesdays and Sundays`."""
    names = [f"{DAYS[day]}s" for day in days]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def capitalize(text: str) -> str:
    """With a capital at the start and nothing else changed."""
    return text[0].upper() + text[1:]


def describe_place(draw: Draw, place: Place, person: str, topics: frozenset[str]) -> list[str]:
    """Tell the hours of a place with all exceptions, what else is wanted, and one thing beside the point.

    Args:
        draw (`Draw`): chooses the words.
        place (`Place`): the place.
        person (`str`): a proper name for the sentences that no question asks about.
        topics (`frozenset[str]`): may hold `"prices"` and `"rules"`.

    Returns:
        `list[str]`: sentences. Each names the place, so they can be put into any order.
    """
    time = draw.pick(TIME_STYLES)
    sentences = [*_describe_hours(draw, place, time), *_describe_exceptions(draw, place), draw.pick(DISTRACTORS)]
    if "prices" in topics:
        sentences += _describe_prices(draw, place)
    if "rules" in topics:
        sentences += [draw.pick(RULE_SENTENCES[rule, allowed]) for rule, allowed in place.rules.items()]
    numbers = {
        "year": draw.number(1860, 1999),
        "recent": draw.number(2015, 2024),
        "phone": f"{draw.number(200, 999)} {draw.number(1000, 9999)}",
        "early": time(draw.number(24, 31) * 15),
        "noon": time(draw.number(44, 60) * 15),
        "late": time(draw.number(80, 90) * 15),
        "minutes": draw.pick((12, 25, 35, 40, 50)),
        "people": f"{draw.number(2, 90)},000",
        "price": draw.number(11, 29),
        "small": draw.number(2, 60),
        "person": f"{draw.pick(('Ms', 'Mr'))} {person}",
        "street": person,
    }
    return [text.format(it=place.title, It=capitalize(place.title), **numbers) for text in draw.shuffle(sentences)]


def _describe_hours(draw: Draw, place: Place, time: Callable[[int], str]) -> list[str]:
    clauses = []
    for block in place.blocks:
        days, start, end = _describe_days(draw, block), time(block.hours.start), time(block.hours.end)
        clauses.append(
            draw.pick(
                (
                    f"{days} from {start} to {end}",
                    f"from {start} until {end} {days}",
                    f"{days} between {start} and {end}",
                )
            )
        )
    opening = draw.pick(("{It} is open {hours}.", "You can visit {it} {hours}.", "The hours of {it} are: {hours}."))
    sentences = []
    if len(clauses) > 1 and draw.happens(0.3):
        sentences.append("{It} also opens " + clauses.pop() + ".")
    hours = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
    sentences.insert(0, opening.replace("{hours}", hours))
    closed = place.list_closed_days()
    if closed and draw.happens(0.35):
        sentences.append("{It} stays closed on " + list_days(closed) + ".")
    if place.pause:
        start, end, days = time(place.pause.start), time(place.pause.end), _describe_days(draw, place.blocks[0])
        sentences.append(
            draw.pick(
                ("{It} shuts for lunch {days} from {a} to {b}.", "There is a break at {it} {days} from {a} to {b}.")
            )
            .replace("{days}", days)
            .replace("{a}", start)
            .replace("{b}", end)
        )
    return sentences


def _describe_days(draw: Draw, block: Block) -> str:
    days = block.days
    if days == WEEKDAYS:
        return draw.pick(("on weekdays", "from Monday to Friday", "Mondays to Fridays"))
    if days == (SATURDAY, SATURDAY + 1):
        return draw.pick(("at weekends", "on Saturdays and Sundays", "on both days of the weekend"))
    if len(days) > 2 and days == tuple(range(days[0], days[-1] + 1)):
        first, last = DAYS[days[0]], DAYS[days[-1]]
        return draw.pick((f"from {first} to {last}", f"{first}s to {last}s", f"on {list_days(list(days))}"))
    return f"on {list_days(list(days))}"


def _describe_exceptions(draw: Draw, place: Place) -> list[str]:
    sentences = []
    if place.last_entry:
        sentences.append(
            draw.pick(
                (
                    "{It} lets nobody in during the last %s minutes.",
                    "Be at {it} %s minutes before closing at the latest.",
                )
            )
            % place.last_entry
        )
    if place.winter:
        sentences.append(
            draw.pick(
                (
                    "From November to February {it} closes an hour earlier.",
                    "In November, December, January and February the day at {it} ends an hour sooner.",
                )
            )
        )
    if place.holidays:
        sentences.append(
            draw.pick(("On public holidays {it} keeps Sunday hours.", "{It} treats public holidays like Sundays."))
        )
    return sentences


def _describe_prices(draw: Draw, place: Place) -> list[str]:
    adult, child = place.prices
    if adult == 2 * child:
        prices = draw.pick(
            ("Adults pay {a} euros at {it}, children half.", "{It} costs {a} euros, half of that for children.")
        )
    else:
        prices = draw.pick(
            (
                "Entry to {it} is {a} euros for adults and {c} for children.",
                "At {it} a child pays {c} and an adult {a} euros.",
                "A ticket for {it} costs {a} euros, or {c} for a child.",
            )
        )
    sentences = [prices.replace("{a}", str(adult)).replace("{c}", str(child))]
    if place.free_day is not None:
        free = draw.pick(("Nobody pays at {it} on %ss.", "On %ss entry to {it} is free."))
        sentences.append(free % DAYS[place.free_day])
    return sentences
