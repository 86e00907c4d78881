"""Scores of generated text, as modules of the library `evaluate` that need no download."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

_FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
)


class _TextMetric(evaluate.Metric):
    """Compares each prediction with one or more references."""

    description = ""
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions: list of str; references: list of lists of str.",
            features=_FEATURES,
        )


class Bleu(_TextMetric):
    """Corpus BLEU of sacrebleu, in percent; any number of references per prediction."""

    description = "Corpus BLEU (sacrebleu)."
    citation = "Post 2018, https://aclanthology.org/W18-6319"

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"bleu": _score_corpus(sacrebleu.corpus_bleu, predictions, references)}


class Chrf(_TextMetric):
    """Corpus chrF of sacrebleu, in percent; any number of references per prediction."""

    description = "Corpus chrF (sacrebleu)."
    citation = "Popović 2015, https://aclanthology.org/W15-3049"

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"chrf": _score_corpus(sacrebleu.corpus_chrf, predictions, references)}


class _WordTokenizer(Tokenizer):
    """Words of letters and digits of every script; rouge-score's own knows those of ASCII, and drops the others."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


class RougeL(_TextMetric):
    """Mean ROUGE-L F-measure against the best reference of each prediction, in percent, in every script."""

    description = "ROUGE-L F-measure (rouge-score), best reference."
    citation = "Lin 2004, https://aclanthology.org/W04-1013"

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        scorer = RougeScorer(["rougeL"], tokenizer=_WordTokenizer())
        scores = [
            scorer.score_multi(list(targets), prediction)["rougeL"].fmeasure
            for prediction, targets in zip(predictions, references, strict=True)
        ]
        return {"rouge_l": 100.0 * sum(scores) / len(scores)}


def _score_corpus(score: Callable[..., Any], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Call a corpus score of sacrebleu, which wants one stream of references per position, padded with `None`."""
    most = max(len(targets) for targets in references)
    streams = [[targets[i] if i < len(targets) else None for targets in references] for i in range(most)]
    return float(score(list(predictions), streams).score)


def compute_text_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score predictions by BLEU, chrF and ROUGE-L.

    Args:
        predictions (`Sequence[str]`): one text per example.
        references (`Sequence[Sequence[str]]`): one or more right texts per example.

    Returns:
        `dict[str, float]`: `bleu`, `chrf` and `rouge_l`, each in percent.

    Raises:
        ValueError: if there are none, their numbers differ, or a prediction has no list of references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"Expected one list of references per prediction and at least one of each, got {len(predictions)} "
            f"predictions and {len(references)} lists of references."
        )
    for number, targets in enumerate(references, start=1):
        if isinstance(targets, str) or not targets:
            raise ValueError(f"Expected a list of at least one reference for prediction {number}, got {targets!r}.")
    scores: dict[str, float] = {}
    for metric in (Bleu(), Chrf(), RougeL()):
        scores.update(
            metric.compute(predictions=list(predictions), references=[list(targets) for targets in references])
        )
    return scores
