"""Scores from what is counted in each record, so that any selection of records can be scored again without its texts.

Every score is a function of sums over records. `SCORES` says which columns of the records are summed, and how the sums
make the score.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

Array = NDArray[np.float64]
Records = dict[str, list[Any]]
BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2


def count_text_records(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Records:
    """Count in every text what BLEU, chrF and ROUGE-L need.

    Args:
        texts (`Sequence[str]`): generated, one per record.
        references (`Sequence[Sequence[str]]`): one or more per record.

    Returns:
        `dict[str, list]`: `bleu` and `chrf`, the statistics of sacrebleu, and `rouge_l`, the F-measure against the
        best reference in percent.
    """
    most = max(len(targets) for targets in references)
    streams = [[targets[i] if i < len(targets) else None for targets in references] for i in range(most)]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return {
        "bleu": BLEU()._extract_corpus_statistics(list(texts), streams),
        "chrf": CHRF()._extract_corpus_statistics(list(texts), streams),
        "rouge_l": [
            round(100 * scorer.score_multi(list(targets), text)["rougeL"].fmeasure, 4)
            for text, targets in zip(texts, references, strict=True)
        ],
    }


def compute_bleu(sums: Array) -> Array:
    """BLEU in percent with the smoothing of sacrebleu.

    Args:
        sums (`np.ndarray`): `[..., 10]`: lengths of the texts and of the references, matches and n-grams per order.

    Returns:
        `np.ndarray`: `[...]`.
    """
    length, reference_length = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER :]
    # Orders from the first without any n-gram on count as 0, however short the texts are.
    exists = np.cumprod(totals > 0, axis=-1).astype(bool)
    halvings = np.cumsum((matches == 0) & exists, axis=-1)
    counted = np.where(matches > 0, matches, 0.5**halvings)
    precisions = np.where(exists, counted / np.where(exists, totals, 1), 0)
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(precisions).mean(axis=-1))
        penalty = np.exp(np.minimum(0, 1 - reference_length / np.where(length > 0, length, np.nan)))
    return np.asarray(np.where(matches.any(axis=-1), 100 * np.nan_to_num(penalty) * mean, 0.0))


def compute_chrf(sums: Array) -> Array:
    """ChrF in percent.

    Args:
        sums (`np.ndarray`): `[..., 18]`: n-grams of the texts, of the references, and common ones, per order.

    Returns:
        `np.ndarray`: `[...]`.
    """
    texts, references, common = np.moveaxis(sums.reshape(*sums.shape[:-1], CHRF_ORDER, 3), -1, 0)
    exists = (texts > 0) & (references > 0)
    orders = np.maximum(exists.sum(axis=-1), 1)
    precision = np.where(exists, common / np.maximum(texts, 1), 0).sum(axis=-1) / orders
    recall = np.where(exists, common / np.maximum(references, 1), 0).sum(axis=-1) / orders
    denominator = CHRF_BETA**2 * precision + recall
    product = (1 + CHRF_BETA**2) * precision * recall
    return np.asarray(100 * product / np.where(denominator > 0, denominator, 1))


def _divide(sums: Array) -> Array:
    """Sum over count."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def _pair(records: Records, name: str, count: str | None = None) -> Array:
    """`[records, 2]`: a column, and how much each of its values counts."""
    values: Array = np.asarray(records[name], dtype=float)
    return np.stack([values, np.ones_like(values) if count is None else np.asarray(records[count], float)], axis=-1)


def _column(name: str) -> Callable[[Records], Array]:
    return lambda records: np.asarray(records[name], dtype=float)


class Score(NamedTuple):
    """A score of a set of records.

    Attributes:
        title (`str`): for tables.
        select (`Callable`): takes the records; `[records, numbers]`, what is summed.
        compute (`Callable`): takes sums, `[..., numbers]`; the score, `[...]`.
        higher_is_better (`bool`): or lower.
        digits (`int`): behind the point, in tables.
        column (`str`, *optional*): which the records must have; by default the one of the score's name.
    """

    title: str
    select: Callable[[Records], Array]
    compute: Callable[[Array], Array]
    higher_is_better: bool = True
    digits: int = 1
    column: str | None = None

    def score(self, records: Records) -> float:
        """The score of all records."""
        return float(self.compute(self.select(records).sum(axis=0)))


def _count_labels(records: Records) -> Array:
    """`[records, 3 * labels]`: right predictions, all predictions and all records of each label."""
    labels, predicted = np.asarray(records["label"]), np.asarray(records["predicted"])
    one_hot = np.eye(int(max(labels.max(), predicted.max())) + 1)
    is_label, is_predicted = one_hot[labels], one_hot[predicted]
    return np.concatenate([is_label * is_predicted, is_predicted, is_label], axis=-1)


def compute_macro_f1(sums: Array) -> Array:
    """Mean F1 in percent of the labels that occur or are predicted; `[..., 3 * labels]` to `[...]`."""
    right, predicted, existing = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
    occurs = predicted + existing > 0
    f1 = np.where(occurs, 2 * right / np.where(occurs, predicted + existing, 1), 0)
    return np.asarray(100 * f1.sum(axis=-1) / occurs.sum(axis=-1))


def _count_right(records: Records) -> Array:
    right = np.asarray(records["label"]) == np.asarray(records["predicted"])
    return np.stack([100.0 * right, np.ones(len(right))], axis=-1)


SCORES = {
    "loss": Score("loss", lambda records: _pair(records, "loss", "tokens"), _divide, False, 3),
    "bleu": Score("BLEU", _column("bleu"), compute_bleu),
    "chrf": Score("chrF", _column("chrf"), compute_chrf),
    "rouge_l": Score("ROUGE-L", lambda records: _pair(records, "rouge_l"), _divide),
    "exact_match": Score("exact match", lambda records: _pair(records, "exact") * [100, 1], _divide, column="exact"),
    "accuracy": Score("accuracy", _count_right, _divide, column="predicted"),
    "macro_f1": Score("macro F1", _count_labels, compute_macro_f1, column="predicted"),
}


def score_records(records: Records) -> dict[str, float]:
    """All scores that the columns of the records allow."""
    return {name: score.score(records) for name, score in SCORES.items() if (score.column or name) in records}


def is_finite(values: ArrayLike) -> bool:
    """Whether no value is infinite or not a number."""
    return bool(np.isfinite(np.asarray(values, dtype=float)).all())
