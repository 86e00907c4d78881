"""Times runs against each other: in rounds, of which each has every run once, in an order that changes."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

LEAST_ROUNDS = 3


def time_rounds(
    runs: dict[str, Callable[[], object]], rounds: int, budget: float | None = None
) -> dict[str, list[float]]:
    """Time runs, after one round that does not count.

    Args:
        runs (`dict[str, Callable]`): what is timed.
        rounds (`int`): at most so many.
        budget (`float`, *optional*): seconds after which no further round begins, if there have been three.

    Returns:
        `dict[str, list[float]]`: seconds of each run in each round.
    """
    begin = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    # What is there already need not be searched for garbage in every round.
    gc.freeze()
    for number in range(rounds + 1):
        if budget is not None and number > LEAST_ROUNDS and time.perf_counter() - begin > budget:
            break
        random.Random(number).shuffle(order)
        for name in order:
            gc.collect()
            start = time.perf_counter()
            runs[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    gc.unfreeze()
    return seconds


def subtract(seconds: dict[str, list[float]], others: dict[str, list[float]]) -> dict[str, list[float]]:
    """Differences of the rounds of two cases, run by run."""
    return {name: [own - other for own, other in zip(seconds[name], others[name], strict=True)] for name in seconds}


def summarize(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Median seconds, and the median and the quartiles of the ratio to a base within a round."""
    summary = {}
    for name, own in seconds.items():
        ratios = sorted(mine / other for mine, other in zip(own, seconds[base], strict=True))
        lower, _, upper = statistics.quantiles(ratios, n=4)
        summary[name] = {
            "seconds": round(statistics.median(own), 5),
            "ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(lower, 4), round(upper, 4)],
        }
    return summary
