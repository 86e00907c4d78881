"""Cells of the table of modes: what generation, training, caches and copies give equals what the plain mode gives.

The cells here are a choice that runs in about a minute; `benchmarks/matrix/modes.py` runs all of them.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "matrix"))

from checks import NotApplicableError
from laws_forward import Comparison
from mode_subjects import IMPLEMENTATIONS, REPRESENTATIVES
from modes import (
    CELLS,
    MODES,
    Mode,
    find_difference,
    format_table,
    read_outcomes,
    run_cell,
    summarize,
    write_outcomes,
)

EVERYWHERE = ("forward", "checkpointing_reentrant", "greedy", "static", "continue_forward", "beams", "deepcopy")
# One type for all ways to choose the attention function, and those that are not quick.
IMPLEMENTED = ("forward", "packing", "greedy", "static")
COMPILED = ("compile", "compiled_generation", "export", "continuous_batching")
# In `qwen2_vl+image` and others, these run for longer than the rest of a cell's row.
SLOW = ("inductor", *COMPILED, *(name for name in MODES if name.startswith("base_")))


def is_tested(name: str, implementation: str, mode: str) -> bool:
    default = "sdpa" if name not in ("bloom", "deberta-v2", "gpt_oss", "gemma2") else "eager"
    return (
        (mode in EVERYWHERE and implementation == default)
        or (name == "llama" and implementation == "sdpa" and mode not in SLOW)
        or (name in ("llama", "gemma3_text") and mode in IMPLEMENTED)
        or (name == "bloom" and implementation == "eager" and mode in ("attentions", "fullgraph", "compile"))
        or (name in ("t5", "whisper") and implementation == "sdpa" and mode == "encoder_decoder_cache")
        or (name == "gpt2" and implementation == "sdpa" and mode in COMPILED)
        or (name == "bloom" and implementation in ("flash", "local") and mode == "forward")
    )


TESTED = [cell for cell in CELLS if is_tested(*cell)]


@pytest.mark.parametrize("cell", TESTED, ids="-".join)
def test_cell(cell):
    outcome = run_cell(*cell)
    if outcome.startswith("n/a"):
        pytest.skip(outcome)
    assert not outcome.startswith("fail"), outcome


def test_the_cells_are_complete():
    assert len(CELLS) == len(set(CELLS)) == len(REPRESENTATIVES) * len(IMPLEMENTATIONS) * len(MODES)
    assert {mode for _, _, mode in TESTED} >= set(MODES) - set(SLOW)


def compare(given: float, expected: float):
    """A law that gives one number without a prefix, and another one with it."""
    return lambda subject, build: Comparison([torch.tensor(given + build.args[0])], [torch.tensor(expected)])


def refuse(error: Exception):
    def law(subject, build):
        if build.args[0] or isinstance(error, NotApplicableError):
            raise error
        return Comparison([torch.tensor(1.0)], [torch.tensor(1.0)])

    return law


@pytest.mark.parametrize(
    ("law", "outcome"),
    [
        (compare(1.0, 2.0), "n/a: it does not hold for the base model: differs by 1.0e+00"),
        (compare(1.0, 1.0), "fail: FailedError: differs by 1.0e+00"),
        (refuse(NotApplicableError("why")), "n/a: why"),
        (refuse(KeyError("x")), "fail: KeyError: 'x'"),
        (
            refuse(ValueError("Flash kernels take no bias for single keys, or")),
            "error: ValueError: Flash kernels take",
        ),
        (lambda *args: Comparison([torch.ones(2)], [torch.ones(2)]), "fail: FailedError: the prefix has no effect"),
        (lambda subject, build: 1 / 0, "n/a: the base model cannot: ZeroDivisionError: division by zero"),
    ],
)
def test_outcomes(law, outcome, monkeypatch):
    monkeypatch.setitem(MODES, "made_up", Mode(law, "made up"))
    assert run_cell("llama", "sdpa", "made_up").startswith(outcome)


def test_difference():
    one = torch.tensor([1, 2])
    assert find_difference(Comparison([one], [one.clone()])) == ""
    assert find_difference(Comparison([one], [])) == "1 results instead of 0"
    assert find_difference(Comparison([one], [one[:1]])) == "shape (2,) instead of (1,)"
    assert find_difference(Comparison([one], [one + torch.tensor([0, 1])])) == "1 of 2 numbers differ"


def test_table(tmp_path: Path):
    outcomes = dict(zip(CELLS[:3], ("pass", "n/a: no reason", "fail: wrong"), strict=True))
    table = format_table(outcomes, CELLS[0][1])
    assert [line.split()[-1] for line in table.splitlines()[2:]] == ["+", ".", "X"]
    assert "1 fail: wrong" in summarize(outcomes)
    write_outcomes(tmp_path / "modes.json", outcomes)
    assert read_outcomes(tmp_path / "modes.json") == outcomes
