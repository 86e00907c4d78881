"""Makes the Markdown table of a results file: the chosen learning rate of every method, mean and range over its seeds.

python benchmarks/table.py benchmarks/results/e2e.json
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

COLUMNS = ("method", "trained parameters", "learning rate", "seeds", "loss", "BLEU", "chrF", "ROUGE-L", "adapter KB")


def build_table(report: dict[str, Any]) -> str:
    """Lay out a results file as Markdown.

    Args:
        report (`dict`): what `run.py` wrote.

    Returns:
        `str`: a table with one row per method, in the order of the experiment file.
    """
    rows = [_build_row([run for run in report["runs"] if run["method"] == "base model"])]
    for method in report["experiment"]["methods"]:
        runs = [run for run in report["runs"] if run["method"] == method["name"]]
        if runs:
            rows.append(_build_row(choose_runs(runs)))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def choose_runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs with the learning rate that had the least loss on the first seed."""
    first_seed = min(run["seed"] for run in runs)
    best = min((run for run in runs if run["seed"] == first_seed), key=lambda run: run["loss"])
    return [run for run in runs if run["learning_rate"] == best["learning_rate"]]


def _build_row(runs: list[dict[str, Any]]) -> list[str]:
    run = runs[0]
    return [
        run["method"],
        f"{run['trainable_parameters']:,}",
        "" if run["learning_rate"] is None else f"{run['learning_rate']:g}",
        "" if run["seed"] is None else str(len(runs)),
        _summarize((run["loss"] for run in runs), digits=3),
        *(_summarize((run[name] for run in runs), digits=1) for name in ("bleu", "chrf", "rouge_l")),
        f"{run['adapter_bytes'] // 1024}" if "adapter_bytes" in run else "",
    ]


def _summarize(values: Iterable[float], digits: int) -> str:
    """`mean (least to most)`, or the only value."""
    listed = list(values)
    if len(listed) == 1:
        return f"{listed[0]:.{digits}f}"
    return f"{mean(listed):.{digits}f} ({min(listed):.{digits}f} to {max(listed):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="a results file")
    print(build_table(json.loads(parser.parse_args().results.read_text())))


if __name__ == "__main__":
    main()
