"""Markdown: tables and what stands in their cells."""

from collections.abc import Iterable
from statistics import mean

from benchmarks.quality.bootstrap import Difference


def write_table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rows)]


def summarize(values: Iterable[float], digits: int) -> str:
    """`mean (least to greatest)`, or the only value."""
    listed = list(values)
    if len(listed) == 1:
        return f"{listed[0]:.{digits}f}"
    return f"{mean(listed):.{digits}f} ({min(listed):.{digits}f} to {max(listed):.{digits}f})"


def write_difference(difference: Difference, digits: int) -> str:
    """A difference with its interval, bold if that excludes zero."""
    value, lower, upper = (f"{number:+.{digits}f}" for number in difference)
    mark = "**" if difference.excludes_zero else ""
    return f"{mark}{value} ({lower} to {upper}){mark}"
