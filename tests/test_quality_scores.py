"""The scores of the quality benchmark and their intervals are those of sacrebleu and of their definitions."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.bootstrap import compare
from benchmarks.quality.segment_scores import SCORES, count_text_records, score_records
from peft_prefix_plus.metrics import compute_text_metrics

RESULTS = Path(__file__).parents[1] / "benchmarks" / "quality" / "results"
TEXTS = ["the cat sat on the mat", "a dog", "", "blue birds fly over the old town", "no match here at all"]
REFERENCES = [
    ["the cat sat on a mat", "a cat was on the mat there"],
    ["a dog barks"],
    ["something"],
    ["blue birds fly over the town", "birds fly", "over the old town fly blue birds"],
    ["zzz"],
]


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [0, 0, 3], [1], [2], [4, 2], [1, 1, 4], [0, 2, 3, 3]])
def test_sums_of_statistics_give_the_scores_of_sacrebleu(chosen):
    texts, references = [TEXTS[i] for i in chosen], [REFERENCES[i] for i in chosen]
    records = count_text_records(TEXTS, REFERENCES)
    found = score_records({name: [column[i] for i in chosen] for name, column in records.items()})
    assert found == pytest.approx(compute_text_metrics(texts, references), abs=1e-4)


def test_scores_of_labels_are_those_of_their_definitions():
    scores = score_records({"label": [0, 0, 1, 2], "predicted": [0, 1, 1, 1], "loss": [1.0] * 4, "tokens": [1] * 4})
    assert scores == pytest.approx({"loss": 1.0, "accuracy": 50.0, "macro_f1": 100 * (2 / 3 + 1 / 2 + 0) / 3})


def draw_records(seed, count=40):
    generator = np.random.default_rng(seed)
    words = np.array(["the", "cat", "sat", "on", "a", "red", "mat", "and", "saw", "blue", "birds"])
    references = [[" ".join(generator.choice(words, 8))] for _ in range(count)]
    texts = [" ".join(word if generator.random() < 0.8 else "x" for word in own[0].split(" ")) for own in references]
    tokens = generator.integers(5, 15, count)
    records = count_text_records(texts, references) | {"loss": list(tokens * 1.5), "tokens": list(tokens)}
    records["exact"] = list(tokens % 2)
    return records | {"label": list(tokens % 3), "predicted": list(tokens % 2)}


@pytest.mark.parametrize("name", SCORES)
def test_a_method_does_not_differ_from_itself(name):
    assert compare([draw_records(0)] * 3, [draw_records(0)], name, resamples=200) == pytest.approx((0, 0, 0), abs=1e-9)
    records = [draw_records(0), draw_records(1)]
    difference = compare(records, records[::-1], name, resamples=200)
    assert difference.value == pytest.approx(0) and not difference.excludes_zero


def shift_losses(records, shift):
    losses = [loss + shift * n for loss, n in zip(records["loss"], records["tokens"], strict=True)]
    return {**records, "loss": losses}


def test_a_shift_of_every_loss_is_the_difference_in_every_resample():
    first = [draw_records(0)] * 2
    second = [shift_losses(own, 0.25) for own in first]
    assert compare(first, second, "loss", resamples=200) == pytest.approx((-0.25, -0.25, -0.25))
    assert compare(first, second, "loss", resamples=200).excludes_zero


def test_the_interval_covers_what_seeds_differ_by():
    records = draw_records(0)
    seeds = [shift_losses(records, shift) for shift in (-0.5, 0.0, 0.5)]
    # All three resampled seeds are the same extreme one with a probability of 1 / 27 each, more than a tail of 2.5 %.
    assert compare(seeds, [records], "loss", resamples=4000) == pytest.approx((0.0, -0.5, 0.5))


@pytest.mark.parametrize("name", ["bleu", "chrf", "loss", "accuracy"])
def test_the_interval_is_that_of_resampling_one_by_one(name):
    first, second = draw_records(0), draw_records(1)
    score, generator = SCORES[name], np.random.default_rng(5)
    rows = [score.select(records) for records in (first, second)]
    differences = []
    for _ in range(4000):
        chosen = generator.integers(0, 40, 40)
        differences.append(score.compute(rows[0][chosen].sum(0)) - score.compute(rows[1][chosen].sum(0)))
    found = compare([first], [second], name, resamples=4000)
    assert found.value == pytest.approx(score.score(first) - score.score(second))
    spread = np.std(differences)
    assert (found.lower, found.upper) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=0.15 * spread)


def test_methods_must_share_their_records():
    with pytest.raises(ValueError, match=r"same records, got runs of \[39, 40\]"):
        compare([draw_records(0, 40)], [draw_records(0, 39)], "loss")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_scores_are_those_of_their_records(path):
    for run in json.loads(path.read_text())["runs"]:
        for evaluation, scores in run["scores"].items():
            assert score_records(run["records"][evaluation]) == pytest.approx(scores)
