"""Paired bootstrap of the difference between two methods (Koehn 2004, https://aclanthology.org/W04-3250).

    python -m benchmarks.quality.bootstrap benchmarks/quality/results/e2e.json "PrefixPlus" "LoRA r=4"

Both methods are scored on the same resampled records. The score of a method is the mean over its seeds, which are
resampled, too, for each method by itself.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.quality.method_results import collect_results
from benchmarks.quality.segment_scores import SCORES, Array, Records, Score

RESAMPLES = 10_000
LEVEL = 0.95


class Difference(NamedTuple):
    """How much the first of two methods scores above the second.

    Attributes:
        value (`float`): on all records.
        lower, upper (`float`): the interval.
    """

    value: float
    lower: float
    upper: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is the same in the whole interval."""
        return self.lower > 0 or self.upper < 0


def compare(
    first: Sequence[Records], second: Sequence[Records], name: str, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Resample the records of two methods together, and the seeds of each.

    Args:
        first (`Sequence[Records]`): the records of one method, for each of its seeds.
        second (`Sequence[Records]`): those of the other; the same records in the same order.
        name (`str`): a key of `SCORES`.
        resamples (`int`): how often.
        seed (`int`): of the resampling.

    Returns:
        `Difference`: first minus second, with an interval of 95 %.

    Raises:
        ValueError: if the numbers of records differ.
    """
    score = SCORES[name]
    selected = [[score.select(records) for records in runs] for runs in (first, second)]
    counts = {len(rows) for runs in selected for rows in runs}
    if len(counts) != 1:
        raise ValueError(f"The methods must be measured on the same records, got runs of {sorted(counts)} records.")
    (count,) = counts
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    shares = [
        generator.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples) / len(runs)
        for runs in selected
    ]
    equal_shares = [np.full((1, len(runs)), 1 / len(runs)) for runs in selected]
    (value,) = _subtract(selected, score, np.ones((1, count)), equal_shares)
    margin = 50 * (1 - LEVEL)
    lower, upper = np.percentile(_subtract(selected, score, weights, shares), [margin, 100 - margin])
    return Difference(float(value), float(lower), float(upper))


def _subtract(selected: list[list[Array]], score: Score, weights: Array, shares: list[Array]) -> Array:
    """The difference for each row of `[resamples, records]` weights and `[resamples, seeds]` shares of each method."""
    means = [
        np.sum(np.stack([score.compute(weights @ rows) for rows in runs], axis=1) * own, axis=1)
        for runs, own in zip(selected, shares, strict=True)
    ]
    return np.asarray(means[0] - means[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="a results file")
    parser.add_argument("methods", nargs=2, help="names of two methods")
    arguments = parser.parse_args()
    results = {own.name: own for own in collect_results(json.loads(arguments.results.read_text(encoding="utf-8")))}
    missing = [name for name in arguments.methods if name not in results]
    if missing:
        parser.error(f"{arguments.results} has no runs of {missing}; it has {list(results)}.")
    first, second = (results[name] for name in arguments.methods)
    for evaluation in first.evaluations:
        for name in first.list_scores(evaluation):
            difference = compare(first.get_records(evaluation), second.get_records(evaluation), name)
            print(f"{evaluation} {SCORES[name].title}: {difference.value:+.3f}", end=" ")
            print(f"({difference.lower:+.3f} to {difference.upper:+.3f})")


if __name__ == "__main__":
    main()
