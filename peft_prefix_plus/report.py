"""A one-page report of what a prefix changed."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 1.6rem }
table { border-collapse: collapse; width: 100% } td, th { border-bottom: 1px solid #ddd; padding: .35rem .5rem }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums } td { vertical-align: top }
img { max-width: 100% }
"""


def build_report(
    title: str,
    facts: Mapping[str, str],
    scores: Mapping[str, tuple[float, float]],
    figure: Figure,
    samples: Sequence[Mapping[str, str]],
) -> str:
    """Write an HTML page that needs no other file.

    Args:
        title (`str`): heading.
        facts (`Mapping[str, str]`): settings and sizes, by name.
        scores (`Mapping[str, tuple[float, float]]`): before and after, by name.
        figure (`matplotlib.figure.Figure`): drawn into the page.
        samples (`Sequence[Mapping[str, str]]`): at least one; equal keys, which head the columns.

    Returns:
        `str`: the page.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    picture = base64.b64encode(buffer.getvalue()).decode("ascii")
    score_rows = [[name, f"{before:.3f}", f"{after:.3f}"] for name, (before, after) in scores.items()]
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            _build_table([], [[name, value] for name, value in facts.items()]),
            "<h2>Scores on held-out examples</h2>",
            _build_table(["", "base model", "with the prefix"], score_rows, numbers=True),
            "<h2>Loss</h2>",
            f'<img alt="Loss over the training steps" src="data:image/png;base64,{picture}">',
            "<h2>Samples</h2>",
            _build_table(list(samples[0]), [list(sample.values()) for sample in samples]),
            "</body></html>",
        ]
    )


def _build_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = [f"<tr>{cells}</tr>"] if head else []
    for row in rows:
        columns = [
            f'<td class="number">{html.escape(cell)}</td>' if numbers and index else f"<td>{html.escape(cell)}</td>"
            for index, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(columns)}</tr>")
    return f"<table>{''.join(lines)}</table>"
