"""`debian_section`: which of eight sections of the Debian archive a package is in."""

import re
from collections.abc import Iterable

from .debian_index import Package, choose_one_per_source, is_program
from .splits import Row, Splits, build_shingles, cut_splits, find_similar_pairs, merge_pairs, rank

NAME = "debian_section"
# Sections by purpose. Those of a programming language would be told by its name.
SECTIONS = ("admin", "devel", "games", "graphics", "net", "science", "sound", "text")
SIZES = {"train": 1600, "dev": 240, "test": 400}
WORDS = range(10, 61)
SIMILARITY = 0.3
HIDDEN_NAME = "[name]"
SENTENCE_END = re.compile(r"(?<![A-Z.])(?<!e\.g)(?<!i\.e)(?<!\bvs)(?<!\betc)[.!?](?=\s+[A-Z(\"'\[]|$)")
# What package names carry in front of, or behind, the name of the program.
AFFIXES = re.compile(
    r"^(python3?|gnome|kde|x|ruby|r|lib|ros|med)-|-(python3?|gtk\d?|qt\d?|cli|gui|tools?|utils?|x11|nox)$"
)


def build_splits(packages: Iterable[Package], sizes: dict[str, int] | None = None) -> Splits:
    """Choose the same number of packages from each section, and cut the splits.

    Args:
        packages (`Iterable[Package]`): the archive.
        sizes (`dict[str, int]`, *optional*): rows per split, `SIZES` by default. Each must be a multiple of eight.

    Returns:
        `Splits`: rows with `source`, `label` and, to use them for generation, `references`.
    """
    sizes = sizes or SIZES
    if any(size % len(SECTIONS) for size in sizes.values()):
        raise ValueError(f"Sizes must be multiples of {len(SECTIONS)}, the number of sections; got {sizes}.")
    candidates = choose_one_per_source(p for p in packages if p.section in SECTIONS and is_program(p))
    rows = drop_similar([build_row(package) for package in candidates])
    per_section = {split: size // len(SECTIONS) for split, size in sizes.items()}
    splits: Splits = {split: [] for split in sizes}
    for section in SECTIONS:
        ordered = sorted((row for row in rows if row["label"] == section), key=lambda row: rank(NAME, row["source"]))
        for split, part in cut_splits(f"{NAME}, section {section!r}", ordered, per_section).items():
            splits[split] += part
    # Rows of one section must not come in one piece: not every user shuffles.
    return {split: sorted(part, key=lambda row: rank(split, row["source"])) for split, part in splits.items()}


def build_row(package: Package) -> Row:
    """Synopsis and first sentence without the package's name, and the section."""
    text = f"{package.synopsis.rstrip('.')}. {find_first_sentence(package.description)}"
    return {
        "source": hide_name(text, package.name, package.source),
        "label": package.section,
        "references": [package.section],
    }


def find_first_sentence(description: str) -> str:
    """The first sentence of the first paragraph; all of it if no sentence ends there."""
    paragraph = description.split("\n")[0]
    end = SENTENCE_END.search(paragraph)
    return paragraph[: end.end()] if end else paragraph


def hide_name(text: str, *names: str) -> str:
    """Replace the names of a package, in every spelling, by `[name]`.

    Args:
        text (`str`): where to look.
        names (`str`): of the binary and the source package. They are hidden without their affixes, too, and with
            their parts written together, with a space, or with a version behind them.

    Returns:
        `str`: the text without them.
    """
    spellings = (
        set(names) | {AFFIXES.sub("", name) for name in names} | {name.rstrip("0123456789.-") for name in names}
    )
    for spelling in sorted(spellings, key=lambda name: (-len(name), name)):
        parts = [re.escape(part) for part in re.split(r"[-_.+]+", spelling) if part]
        if parts:
            pattern = rf"(?<!\w){r'[-_.+ ]*'.join(parts)}[\d.]*(?:\+\+)?(?!\w)"
            # Names of one or two letters are words of English in another case.
            flags = re.IGNORECASE if len(spelling) > 2 else re.NOFLAG
            text = re.sub(pattern, HIDDEN_NAME, text, flags=flags)
    return text


def drop_similar(rows: list[Row]) -> list[Row]:
    """Keep rows of a fitting length, and one of those with similar texts."""
    rows = [row for row in rows if len(row["source"].split()) in WORDS]
    groups = merge_pairs(len(rows), find_similar_pairs([build_shingles(r["source"], 2) for r in rows], SIMILARITY))
    return [row for number, row in enumerate(rows) if groups[number] == number]
