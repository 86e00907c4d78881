"""Rows, splits without overlap, and the files that hold them.

Nothing here draws random numbers. The order of a data set is that of the SHA-256 of each row's key, so it does not
depend on the version of Python, and a row that comes or goes moves few others.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Splits = dict[str, list[Row]]
SPLIT_NAMES = ("train", "dev", "test")


def rank(*words: str) -> str:
    """A key to sort by: as good as random, and always the same."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def split_words(text: str) -> list[str]:
    """The words and numbers of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def build_shingles(text: str, length: int) -> frozenset[str]:
    """All runs of `length` words of a text; the whole text if it is shorter."""
    words = split_words(text)
    return frozenset(" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1)))


def find_similar_pairs(features: Sequence[frozenset[str]], threshold: float) -> Iterator[tuple[int, int]]:
    """Find all pairs of sets whose Jaccard similarity reaches a threshold.

    Two such sets share at least one of their rarest `n - ceil(threshold * n) + 1` members, so only sets that share
    one of these are compared.

    Args:
        features (`Sequence[frozenset[str]]`): one set an item.
        threshold (`float`): above 0, at most 1.

    Yields:
        `tuple[int, int]`: indices of two items, the smaller first.
    """
    counts = Counter(member for feature in features for member in feature)
    holders: dict[str, list[int]] = defaultdict(list)
    for number, feature in enumerate(features):
        ordered = sorted(feature, key=lambda member: (counts[member], member))
        rarest = ordered[: len(ordered) - math.ceil(threshold * len(ordered) - 1e-9) + 1]
        candidates = {other for member in rarest for other in holders[member]}
        for other in sorted(candidates):
            if len(feature & features[other]) >= threshold * len(feature | features[other]) - 1e-9:
                yield other, number
        for member in rarest:
            holders[member].append(number)


def merge_pairs(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Number the groups that pairs connect, directly or over others.

    Args:
        count (`int`): number of items.
        pairs (`Iterable[tuple[int, int]]`): indices of items that belong together.

    Returns:
        `list[int]`: for each item the smallest index in its group.
    """
    parents = list(range(count))

    def find_root(item: int) -> int:
        while parents[item] != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    for one, other in pairs:
        first, second = sorted((find_root(one), find_root(other)))
        parents[second] = first
    return [find_root(item) for item in range(count)]


def cut_splits(name: str, rows: Sequence[Row], sizes: dict[str, int]) -> Splits:
    """Cut ordered rows into splits of given sizes.

    Args:
        name (`str`): the data set's, for the error.
        rows (`Sequence[Row]`): at least as many as all sizes together; the rest is left out.
        sizes (`dict[str, int]`): rows per split.

    Raises:
        ValueError: if there are too few rows.
    """
    if len(rows) < sum(sizes.values()):
        raise ValueError(
            f"{name}: {len(rows)} rows are left after filtering, {sum(sizes.values())} are needed ({sizes}). "
            "Compare the files in the directory of the downloads with the ones that docs/benchmark_data.md names."
        )
    splits, start = {}, 0
    for split, size in sizes.items():
        splits[split] = list(rows[start : start + size])
        start += size
    return splits


def check_splits(name: str, splits: Splits) -> None:
    """Make sure that no source occurs twice, be it in one split or in two, and that no split is empty.

    Raises:
        ValueError: naming the split and the text.
    """
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        if not rows:
            raise ValueError(f"{name}: the split {split!r} has no rows.")
        for row in rows:
            key = " ".join(split_words(row["source"]))
            if key in seen:
                raise ValueError(f"{name}: a row of {split!r} is also in {seen[key]!r}: {row['source']!r}.")
            seen[key] = split


def write_splits(directory: Path, splits: Splits) -> None:
    """Write one JSON lines file per split. An interrupted run leaves no half-written file under a final name."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        unfinished = directory / f"{split}.jsonl.part"
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(unfinished, directory / f"{split}.jsonl")


def is_complete(directory: Path) -> bool:
    """Whether all splits of a data set have been written."""
    return all((directory / f"{split}.jsonl").is_file() for split in SPLIT_NAMES)
