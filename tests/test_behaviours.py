"""What a LoRA user does, done with PrefixPlus; benchmarks/behaviours does the same with other methods of PEFT."""

import json
import os
import signal
import sys
import time

import pytest
from behaviours import BEHAVIOURS, METHODS, comparison, comparison_page
from behaviours.behaviour import Behaviour

COMPARISON = json.loads(comparison_page.RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_behaviour(name, tmp_path):
    BEHAVIOURS[name].check(METHODS["PrefixPlus"], tmp_path)


def test_the_comparison_has_every_behaviour_and_method():
    """If this fails, run `make behaviours`."""
    written = {name: (row["group"], row["title"]) for name, row in COMPARISON["behaviours"].items()}
    assert written == {name: (behaviour.group, behaviour.title) for name, behaviour in BEHAVIOURS.items()}
    assert all(list(row["outcomes"]) == list(METHODS) for row in COMPARISON["behaviours"].values())


def test_prefix_plus_passes_everything_in_the_comparison():
    outcomes = {name: row["outcomes"]["PrefixPlus"] for name, row in COMPARISON["behaviours"].items()}
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "pass"} == {}


def test_every_other_outcome_has_a_reason():
    outcomes = [outcome for row in COMPARISON["behaviours"].values() for outcome in row["outcomes"].values()]
    assert all(outcome == "pass" or len(outcome) > len("fail: ") for outcome in outcomes)


def test_the_page_is_made_from_the_comparison():
    assert comparison_page.PAGE.read_text(encoding="utf-8") == comparison_page.write_page(COMPARISON)


def test_titles_are_unique():
    titles = [(behaviour.group, behaviour.title) for behaviour in BEHAVIOURS.values()]
    assert len(set(titles)) == len(titles)


def crash(method, directory):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(method, directory):
    time.sleep(60)


def leave(method, directory):
    sys.exit(3)


def fail(method, directory):
    raise ValueError(f"{directory / 'adapter'} is not there.\nMore lines.")


def fail_without_a_message(method, directory):
    raise AssertionError


def work(method, directory):
    assert list(directory.iterdir()) == []


def test_nothing_that_a_behaviour_does_stops_the_comparison(monkeypatch, tmp_path):
    expected = {
        crash: "fail: the process ended with exit code -9",
        hang: "fail: did not end within 3 seconds",
        leave: "fail: SystemExit: 3",
        fail: "fail: ValueError: DIRECTORY/adapter is not there.",
        fail_without_a_message: "fail: AssertionError: raise AssertionError",
        work: "pass",
    }
    monkeypatch.setattr(comparison, "TIME_LIMIT", 3.0)
    for check in expected:
        monkeypatch.setitem(BEHAVIOURS, check.__name__, Behaviour("", "", check))
    pairs = [(check.__name__, "PrefixPlus") for check in expected]
    outcomes = {run.name: outcome for run, outcome in comparison.iterate_outcomes(pairs, 2, tmp_path)}
    assert {name: outcomes[name] for name, _ in pairs} == {check.__name__: text for check, text in expected.items()}
