"""`opening_hours`: questions about invented places that a paragraph describes. All of it is made by rules."""

from .place_facts import KINDS, Draw, draw_place, list_names
from .place_prose import describe_place
from .place_questions import ASKERS
from .splits import Row, Splits

NAME = "opening_hours"
SIZES = {"train": 1000, "dev": 150, "test": 300}
NEEDED_TOPICS = {"total": "prices", "rule": "rules"}
TOPIC_SHARE = 0.2
# In this share of the rows all sentences are mixed.
MIXED_SHARE = 0.3
MAX_WORDS = 100
MAX_ATTEMPTS = 1000


def build_splits(sizes: dict[str, int] | None = None) -> Splits:
    """Invent all rows.

    Args:
        sizes (`dict[str, int]`, *optional*): rows per split, `SIZES` by default.

    Returns:
        `Splits`: the kinds of questions are equally frequent; no proper name occurs in two splits.
    """
    kinds = list(ASKERS)
    return {
        split: [build_row(split, number, kinds[number % len(kinds)]) for number in range(size)]
        for split, size in (sizes or SIZES).items()
    }


def build_row(split: str, number: int, kind: str) -> Row:
    """Invent one row.

    Args:
        split (`str`): decides which names are used.
        number (`int`): of the row; the same number gives the same row.
        kind (`str`): of the question, a key of `ASKERS`.

    Returns:
        `Row`: `source`, `references` with one answer, and the `kind`.
    """
    names = list_names(split)
    for attempt in range(MAX_ATTEMPTS):
        row = _try_row(Draw(f"{NAME} {split} {number} {attempt}"), names, kind)
        if row is not None:
            return row
    raise RuntimeError(f"No question of the kind {kind!r} could be asked in {MAX_ATTEMPTS} attempts.")


def _try_row(draw: Draw, names: list[str], kind: str) -> Row | None:
    chosen, nouns = draw.shuffle(names)[:4], draw.shuffle(KINDS)[:2]
    place, other = (draw_place(draw, chosen[i], nouns[i]) for i in range(2))
    question = ASKERS[kind](draw, place, other)
    if question is None:
        return None
    topics = frozenset(
        topic for topic in ("prices", "rules") if draw.happens(TOPIC_SHARE) or NEEDED_TOPICS.get(kind) == topic
    )
    described = [place, other] if other.title in question.text else [place]
    people = zip(described, chosen[2:], strict=False)
    parts = draw.shuffle([describe_place(draw, each, person, topics) for each, person in people])
    sentences = [sentence for part in parts for sentence in part]
    if draw.happens(MIXED_SHARE):
        sentences = draw.shuffle(sentences)
    source = f"{' '.join(sentences)}\nQuestion: {question.text}"
    if len(source.split()) > MAX_WORDS:
        return None
    return {"source": source, "references": [question.answer], "kind": kind}
