"""`django_french`: short English messages of web applications and their French translations."""

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import polib

from .downloads import Wheel
from .splits import Row, Splits, find_similar_pairs, merge_pairs, rank, split_words

NAME = "django_french"
WHEELS = (
    Wheel(
        "Django",
        "5.2.8",
        "django-5.2.8-py3-none-any.whl",
        "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
    ),
    Wheel(
        "wagtail",
        "7.2",
        "wagtail-7.2-py3-none-any.whl",
        "2c0d41545976b57266e84df3f03e7dd812e6a4d0a8d61d5b76863fe021613973",
    ),
    Wheel(
        "django-oscar",
        "4.0",
        "django_oscar-4.0-py3-none-any.whl",
        "71e5f6bcd28ca2cc58765003dc2fe8a74839c9cf58e8a4933c8dd905ea167a9e",
    ),
)
CATALOGUE = re.compile(r"/locale/fr/LC_MESSAGES/django(js)?\.po$")
PLACEHOLDER = re.compile(r"%\(\w+\)[sdif]|%[sd]|\{\w*\}")
MARKUP = re.compile(r"<[a-zA-Z/]|&\w+;|https?://|`|\n\s*\n")
WORDS = range(3, 26)
# Messages that share this part of their words, in English or in French, stay in one split.
SIMILARITY = 0.6
TEST_SHARE, DEV_SHARE = 0.15, 0.10


def read_catalogues(path: Path) -> list[str]:
    """The texts of the French catalogues in a wheel.

    Raises:
        ValueError: if it has none.
    """
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in sorted(wheel.namelist()) if CATALOGUE.search(name)]
        if not names:
            raise ValueError(f"{path} holds no file locale/fr/LC_MESSAGES/django.po.")
        return [wheel.read(name).decode("utf-8") for name in names]


def parse_messages(catalogues: Iterable[str]) -> dict[str, list[str]]:
    """Read the messages that can be used out of message catalogues.

    Args:
        catalogues (`Iterable[str]`): texts of `.po` files.

    Returns:
        `dict[str, list[str]]`: each English message with all its translations. Of messages that differ in capitals or
            punctuation only, the first one stands for all.
    """
    messages: dict[str, list[str]] = {}
    spellings: dict[str, str] = {}
    for catalogue in catalogues:
        for entry in polib.pofile(catalogue):
            if entry.translated() and not entry.msgid_plural and is_suitable(entry.msgid, entry.msgstr):
                english = clean_text(entry.msgid)
                english = spellings.setdefault(" ".join(split_words(english)), english)
                translations = messages.setdefault(english, [])
                if clean_text(entry.msgstr) not in translations:
                    translations.append(clean_text(entry.msgstr))
    return messages


def clean_text(text: str) -> str:
    """Make one line, with the plain apostrophe and space that only some of the catalogues use."""
    return " ".join(text.replace("’", "'").split())


def is_suitable(english: str, french: str) -> bool:
    """Whether a message is one paragraph without markup, with at most one placeholder, and really translated."""
    placeholders = PLACEHOLDER.findall(english)
    return (
        len(english.split()) in WORDS
        and len(french.split()) in WORDS
        and english != french
        and not MARKUP.search(f"{english}|{french}")
        and len(placeholders) <= 1
        and placeholders == PLACEHOLDER.findall(french)
        and "%" not in PLACEHOLDER.sub("", english + french)
    )


def build_splits(messages: dict[str, list[str]]) -> Splits:
    """Cut the splits, about 75, 10 and 15 percent. Groups of similar messages are not cut.

    Args:
        messages (`dict[str, list[str]]`): from [`parse_messages`].
    """
    texts = list(messages)
    english = [frozenset(split_words(text)) for text in texts]
    french = [frozenset(split_words(messages[text][0])) for text in texts]
    pairs = [*find_similar_pairs(english, SIMILARITY), *find_similar_pairs(french, SIMILARITY)]
    groups: dict[int, list[str]] = {}
    for text, group in zip(texts, merge_pairs(len(texts), pairs), strict=True):
        groups.setdefault(group, []).append(text)
    splits: Splits = {"train": [], "dev": [], "test": []}
    for members in sorted(groups.values(), key=lambda members: rank(NAME, min(members))):
        rows: list[Row] = [{"source": text, "references": messages[text]} for text in members]
        fits_test = len(splits["test"]) + len(rows) <= round(TEST_SHARE * len(texts))
        fits_dev = len(splits["dev"]) + len(rows) <= round(DEV_SHARE * len(texts))
        splits["test" if fits_test else "dev" if fits_dev else "train"] += rows
    return {split: sorted(rows, key=lambda row: rank(split, row["source"])) for split, rows in splits.items()}
