"""Writes docs/comparison.md from what comparison.py found out."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("comparison.json")
PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"

INTRODUCTION = """# What works with which method

Made by `make behaviours` with {versions}.

Each row is a function in `benchmarks/behaviours` that does what somebody would do with an adapter of PEFT, on a tiny
random model, and checks the result: "yes" if it is right, "no" if there is an error or a wrong result. The code of a
row is the same for every method, and the methods have their default settings. A "no" is not a verdict on a method that
was never meant to do this; its reason, the first line of the error, is below the table.

{counts}

The rows were chosen by the makers of PrefixPlus. Those about offloading (`cpu_offload`, `disk_offload`) were written
while it was made to work there; the common way, a `device_map`, is row 3 of its table, and works with LoRA as well.
"""


def escape(text: str) -> str:
    """Keep Markdown from taking a pipe for a column, or a name in angle brackets for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def write_counts(rows: list[dict[str, Any]], methods: list[str]) -> str:
    """How many rows each method passes."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    lines = [f"| | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for title in [*groups, "**all**"]:
        chosen = rows if title == "**all**" else [row for row in rows if row["group"] == title]
        cells = [f"{sum(row['outcomes'][method] == 'pass' for row in chosen)} of {len(chosen)}" for method in methods]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_group(group: str, rows: list[dict[str, Any]], methods: list[str]) -> str:
    """The table of one group, and why each "no" is one."""
    lines = [f"## {group}", "", f"| | | {' | '.join(methods)} |", "|---" * (len(methods) + 2) + "|"]
    reasons: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows, start=1):
        cells = ["yes" if row["outcomes"][method] == "pass" else "**no**" for method in methods]
        lines.append(f"| {number} | {escape(row['title'])} | {' | '.join(cells)} |")
        for method in methods:
            kind, _, reason = row["outcomes"][method].partition(": ")
            if kind != "pass":
                reasons[reason][number].append(method)
    if reasons:
        lines += ["", "Why not, by the number of the row:", ""]
    for reason, failed in reasons.items():
        numbers_by_methods: dict[str, list[str]] = defaultdict(list)
        for number, names in failed.items():
            numbers_by_methods[", ".join(names)].append(str(number))
        where = "; ".join(f"{', '.join(numbers)} ({names})" for names, numbers in numbers_by_methods.items())
        code = f"`` {reason} ``" if "`" in reason else f"`{reason}`"
        lines.append(f"- {where}: {code}")
    return "\n".join(lines)


def write_page(comparison: dict[str, Any]) -> str:
    """The whole page."""
    rows = list(comparison["behaviours"].values())
    methods = list(rows[0]["outcomes"])
    versions = ", ".join(f"{name} {number}" for name, number in comparison["versions"].items())
    parts = [INTRODUCTION.format(versions=versions, counts=write_counts(rows, methods))]
    for group in dict.fromkeys(row["group"] for row in rows):
        parts.append(write_group(group, [row for row in rows if row["group"] == group], methods))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(write_page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
