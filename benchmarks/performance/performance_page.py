"""Writes docs/performance.md from what measure.py measured."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("short.json")
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"

INTRODUCTION = """# Speed and memory

Made by `make bench-performance` with {model}, {threads} threads and {versions}.

Everything is a ratio to the bare base model, measured in the same round: the median of {rounds} rounds, and in
brackets the quartiles. The machine was shared, so differences smaller than the quartiles are noise. All methods train
230,400 parameters (PrefixPlus mlp: 912,000); prefixes have 20 virtual tokens.

- A training step is a forward and a backward pass; of the base model, with frozen weights, down to the input of the
  first layer.
- Saved bytes are what autograd keeps for the backward pass.
- Generation is greedy, 32 new tokens.
"""


def write_cell(times: dict[str, Any] | None) -> str:
    """A ratio with its quartiles."""
    if times is None:
        return "–"
    lower, upper = times["quartiles"]
    return f"{times['ratio']:.2f} ({lower:.2f} to {upper:.2f})"


def write_table(rows: dict[str, dict[str, str]]) -> list[str]:
    """One row for each case, one column for each method but the base model."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return [
        *lines,
        *(f"| {case} | {' | '.join(row.get(name, '–') for name in names)} |" for case, row in rows.items()),
    ]


def write_dtype(dtype: str, results: dict[str, Any]) -> list[str]:
    """The tables of one dtype."""
    rows: dict[str, dict[str, str]] = {}
    for step in results["steps"]:
        case = f"{step['batch']} x {step['length']} tokens" + (", checkpointing" if step.get("checkpointing") else "")
        times = {name: own for name, own in step["times"].items() if name != "base model"}
        rows[f"training step, {case}"] = {name: write_cell(own) for name, own in times.items()}
        saved, floor = step["saved_bytes"], step["saved_bytes"]["base model"]
        rows[f"saved bytes, {case}"] = {name: f"{saved[name] / floor:.3f}" for name in times}
    for case in results["generation"]:
        times = {name: own for name, own in case["times"].items() if name != "base model"}
        title = f"generation, batch {case['batch']}, context {case['context']}"
        rows[title] = {name: write_cell(own) for name, own in times.items()}
    mixed = results["mixed_batch"]
    gain = write_cell(mixed["times"]["eight passes"])
    return [
        f"## {dtype}",
        "",
        *write_table(rows),
        "",
        f"To generate {mixed['new']} tokens for eight rows with eight adapters, a pass for each row takes {gain} "
        "times as long as a mixed batch.",
        "",
    ]


def main() -> None:
    """Write the page."""
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    setting = report["setting"]
    lines = [
        INTRODUCTION.format(
            model=report["model"], threads=report["threads"], versions=versions, rounds=setting["rounds"]
        )
    ]
    for dtype, results in report["dtypes"].items():
        lines += write_dtype(dtype, results)
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
