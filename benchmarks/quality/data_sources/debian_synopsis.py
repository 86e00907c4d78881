"""`debian_synopsis`: from the long description of a Debian package to its one-line synopsis."""

from collections import Counter
from collections.abc import Iterable

from .debian_index import Package, choose_one_per_source, is_program
from .splits import Row, Splits, build_shingles, cut_splits, find_similar_pairs, merge_pairs, rank

NAME = "debian_synopsis"
SIZES = {"train": 2000, "dev": 150, "test": 300}
DESCRIPTION_WORDS = range(40, 161)
SYNOPSIS_WORDS = range(4, 15)
# Modules for Python would be a fourth of all rows otherwise.
ROWS_PER_SECTION = 250
# Pairs of descriptions that share this part of their runs of three words are one text in two versions.
SIMILARITY = 0.3


def build_splits(packages: Iterable[Package], sizes: dict[str, int] | None = None) -> Splits:
    """Choose the packages and cut the splits.

    Args:
        packages (`Iterable[Package]`): the archive.
        sizes (`dict[str, int]`, *optional*): rows per split, `SIZES` by default.

    Returns:
        `Splits`: no source package, and no two similar descriptions, are in more than one row.
    """
    suitable = [package for package in packages if is_suitable(package)]
    chosen = drop_similar(choose_one_per_source(suitable))
    chosen.sort(key=lambda package: rank(NAME, package.source))
    counts: Counter[str] = Counter()
    rows: list[Row] = []
    for package in chosen:
        counts[package.section] += 1
        if counts[package.section] <= ROWS_PER_SECTION:
            rows.append({"source": package.description, "references": [package.synopsis]})
    return cut_splits(NAME, rows, sizes or SIZES)


def is_suitable(package: Package) -> bool:
    """Whether both texts have a fitting length and the synopsis is not a part of the description."""
    return (
        is_program(package)
        and len(package.description.split()) in DESCRIPTION_WORDS
        and len(package.synopsis.split()) in SYNOPSIS_WORDS
        and package.synopsis.lower() not in package.description.lower()
    )


def drop_similar(packages: list[Package]) -> list[Package]:
    """Of packages with similar descriptions or the same synopsis keep one."""
    texts = [build_shingles(package.description, 3) for package in packages]
    synopses = [frozenset([package.synopsis.lower()]) for package in packages]
    pairs = [*find_similar_pairs(texts, SIMILARITY), *find_similar_pairs(synopses, 1.0)]
    groups = merge_pairs(len(packages), pairs)
    return [package for number, package in enumerate(packages) if groups[number] == number]
