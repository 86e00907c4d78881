"""Pictures of a training run; needs the extra `plot`."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


def plot_loss_curve(log_history: Sequence[Mapping[str, Any]], base_loss: float | None = None) -> Figure:
    """Draw the training and evaluation loss of a `Trainer`.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`.
        base_loss (`float`, *optional*): evaluation loss of the base model, drawn as a line.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    if base_loss is not None:
        axes.axhline(base_loss, color="grey", linestyle=":", label="base model, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
