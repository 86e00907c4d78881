"""The report and its picture."""

import base64
import re

from peft_prefix_plus.plotting import plot_loss_curve
from peft_prefix_plus.report import build_report

HISTORY = [{"step": 5, "loss": 2.0}, {"step": 10, "loss": 1.0}, {"step": 10, "eval_loss": 1.5}, {"train_runtime": 3.0}]


def test_the_curve_shows_what_was_logged():
    axes = plot_loss_curve(HISTORY, base_loss=2.5).axes[0]
    lines = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}
    assert lines["training"] == [(5, 2.0), (10, 1.0)]
    assert lines["held out"] == [(10, 1.5)]
    assert [y for _, y in lines["base model, held out"]] == [2.5, 2.5]


def test_a_curve_without_evaluation_has_one_line():
    assert len(plot_loss_curve(HISTORY[:2]).axes[0].lines) == 1


def test_the_page_stands_alone_and_escapes_what_models_write():
    page = build_report(
        "A <title>",
        {"Base model": "a & b"},
        {"bleu": (1.0, 2.5)},
        plot_loss_curve(HISTORY),
        [{"input": "<script>alert(1)</script>", "with the prefix": "fine"}],
    )
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "A &lt;title&gt;" in page
    assert "a &amp; b" in page
    assert "2.500" in page
    picture = re.search(r"data:image/png;base64,([^\"]+)", page)
    assert base64.b64decode(picture.group(1)).startswith(b"\x89PNG")
    assert not re.search(r"(src|href)=\"http", page)
