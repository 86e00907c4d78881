"""The metric modules give what the libraries under them give, without a download."""

import evaluate
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from peft_prefix_plus.metrics import Bleu, Chrf, RougeL, compute_text_metrics

PREDICTIONS = ["the cat sat on the mat", "a dog barked loudly", "rain"]
REFERENCES = [["the cat sat on the mat", "a cat was on the mat"], ["the dog barked"], ["it rains", "rain", "snow"]]


def test_several_references_reach_sacrebleu_as_streams():
    streams = [
        ["the cat sat on the mat", "the dog barked", "it rains"],
        ["a cat was on the mat", None, "rain"],
        [None, None, "snow"],
    ]
    scores = compute_text_metrics(PREDICTIONS, REFERENCES)
    assert scores["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, streams).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(PREDICTIONS, streams).score


def test_a_perfect_prediction_scores_100_and_a_foreign_one_0():
    perfect = compute_text_metrics(["one two three four five"], [["something else", "one two three four five"]])
    foreign = compute_text_metrics(["xxx"], [["one two three four five"]])
    assert perfect == pytest.approx({"bleu": 100.0, "chrf": 100.0, "rouge_l": 100.0})
    assert foreign == pytest.approx({"bleu": 0.0, "chrf": 0.0, "rouge_l": 0.0})


def test_rouge_takes_the_best_reference():
    assert RougeL().compute(predictions=["a b"], references=[["c d", "a b"]]) == {"rouge_l": 100.0}


def test_rouge_reads_every_script_and_english_as_the_library_does():
    assert RougeL().compute(predictions=["Быстрый лис"], references=[["быстрый лис!"]]) == {"rouge_l": 100.0}
    assert RougeL().compute(predictions=["été élevé"], references=[["ôté plevé"]]) == {"rouge_l": 0.0}
    pairs = [
        ("The cat-sat, on_a mat 12.5", "a CAT sat 12"),
        *zip(PREDICTIONS, (r[0] for r in REFERENCES), strict=True),
    ]
    for prediction, reference in pairs:
        expected = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
        assert RougeL().compute(predictions=[prediction], references=[[reference]])["rouge_l"] == 100.0 * expected


@pytest.mark.parametrize("references", [["the cat"], [[]]])
def test_references_that_are_no_list_are_refused(references):
    with pytest.raises(ValueError, match="at least one reference for prediction 1"):
        compute_text_metrics(["the cat"], references)


@pytest.mark.parametrize("metric", [Bleu, Chrf, RougeL])
def test_metrics_are_modules_of_evaluate(metric):
    module = metric()
    assert isinstance(module, evaluate.Metric)
    module.add_batch(predictions=PREDICTIONS, references=REFERENCES)
    assert module.compute() == metric().compute(predictions=PREDICTIONS, references=REFERENCES)


def test_combined_with_the_library():
    combined = evaluate.combine([Bleu(), Chrf()])
    assert set(combined.compute(predictions=PREDICTIONS, references=REFERENCES)) == {"bleu", "chrf"}


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], [["a"], ["b"]])])
def test_counts_that_do_not_match_are_refused(predictions, references):
    with pytest.raises(ValueError, match="one list of references per prediction"):
        compute_text_metrics(predictions, references)
