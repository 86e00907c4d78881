"""Draws the figures of docs/quality.md. The same results give the same files, byte for byte."""

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.quality.method_results import DEV, MethodResults
from benchmarks.quality.segment_scores import SCORES

STYLE = {"svg.hashsalt": "peft_prefix_plus", "svg.fonttype": "path", "font.size": 8, "axes.grid": True}
MARKERS = "osD^v<>pP*Xh8"


def draw_rates(results: list[MethodResults], path: Path) -> None:
    """Loss against learning rate, on the first seed; the chosen rate is filled."""
    with plt.rc_context(STYLE):
        _, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        for index, result in enumerate(results):
            runs = [run for run in result.first_seed_runs if not run["diverged"]]
            if not runs:
                continue
            runs.sort(key=lambda run: run["learning_rate"])
            rates = [run["learning_rate"] for run in runs]
            losses = [run["scores"][DEV]["loss"] for run in runs]
            color, marker = f"C{index % 10}", MARKERS[index % len(MARKERS)]
            axes.plot(rates, losses, color=color, marker=marker, markerfacecolor="white", label=result.name)
            chosen = rates.index(result.learning_rate)
            axes.plot(rates[chosen], losses[chosen], color=color, marker=marker)
        axes.set(xscale="log", xlabel="learning rate", ylabel=f"loss ({DEV}, first seed)")
        _finish(axes, path)


def draw_parameters(results: list[MethodResults], path: Path) -> None:
    """Loss, and BLEU or accuracy, against the number of trained parameters; bars are the range of the seeds."""
    trained = [result for result in results if result.peft_type is not None]
    if not trained:
        return
    names = trained[0].list_scores(DEV)
    second = next(name for name in names if name != "loss")
    with plt.rc_context(STYLE):
        _, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axes, name in zip(panels, ("loss", second), strict=True):
            for index, result in enumerate(trained):
                values = result.get_scores(DEV, name)
                middle = mean(values)
                bars = [[middle - min(values)], [max(values) - middle]]
                parameters = result.num_parameters
                style = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)], "linestyle": "none"}
                axes.errorbar(parameters, middle, yerr=bars, label=result.name, **style)
            axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{SCORES[name].title} ({DEV})")
        _finish(panels[-1], path)


def _finish(axes: Axes, path: Path) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A date would make every file a new one.
    axes.figure.savefig(path, metadata={"Date": None})
    plt.close(axes.figure)
