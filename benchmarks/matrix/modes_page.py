"""Writes docs/modes.md from what modes.py measured."""

import json
from collections import Counter, defaultdict
from pathlib import Path

from page import escape

RESULTS = Path(__file__).with_name("modes.json")
PAGE = Path(__file__).parents[2] / "docs" / "modes.md"
MARKS = {"pass": "yes", "n/a": "–", "error": "error", "fail": "**no**"}

INTRODUCTION = """# Attention implementations and ways to use a model

Made by `make modes` with {versions}.

Every cell compares, on a tiny random model with a prefix, what a way to use it gives with what the plain way gives: a
compiled forward with an uncompiled one, cached tokens with recomputed ones, a packed sequence with the sequence alone,
and so on. Of {total} cells {passed} pass; {failed} fail.

"yes": equal. "error": an error that the documentation explains, see below. "–": says nothing, mostly because the base
model alone cannot do it here; the reasons are below each table. "no": fails.

There is no GPU here. "flash" runs transformers' own code around flash kernels, with a stand-in for the kernels in
plain torch. Offloaded caches need a GPU in transformers itself.
"""


def write_implementation(implementation: str, title: str, matrix: dict) -> str:
    """One table: modes by types."""
    rows = {row["model"]: row["outcomes"] for row in matrix["rows"] if row["implementation"] == implementation}
    reasons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    lines = [f"## {title}", "", f"| | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    for mode, name in matrix["modes"].items():
        cells = []
        for model, outcomes in rows.items():
            kind, _, reason = outcomes.get(mode, "n/a").partition(": ")
            cells.append(MARKS[kind])
            if reason:
                reasons[f"{MARKS[kind]}, {escape(reason)}"][name].append(model)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Reasons:", ""]
    for reason, modes in sorted(reasons.items()):
        where = "; ".join(
            f"{name} (all)" if len(models) == len(rows) else f"{name} ({', '.join(models)})"
            for name, models in modes.items()
        )
        lines.append(f"- {reason}: {where}")
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    matrix = json.loads(RESULTS.read_text(encoding="utf-8"))
    counts = Counter(outcome.partition(":")[0] for row in matrix["rows"] for outcome in row["outcomes"].values())
    versions = ", ".join(f"{name} {number}" for name, number in matrix["versions"].items())
    kinds = "\n".join(f"| `{model}` | {kind} |" for model, kind in matrix["models"].items())
    parts = [
        INTRODUCTION.format(
            versions=versions, total=counts.total(), passed=counts["pass"], failed=counts["fail"] or "none"
        ),
        f"| type | stands for |\n|---|---|\n{kinds}",
        *(write_implementation(name, title, matrix) for name, title in matrix["implementations"].items()),
    ]
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
