"""One table of all experiments: the best prefix of PrefixPlus, and what rivals of its size reach."""

from collections.abc import Sequence
from typing import Any

from benchmarks.quality.bootstrap import compare
from benchmarks.quality.method_results import DEV, MethodResults, collect_results, find_best
from benchmarks.quality.segment_scores import SCORES
from benchmarks.quality.tables import summarize, write_difference, write_table

PREFIX_PLUS = ("PREFIX_PLUS",)
LORA = ("LORA",)
# Of each family the best method is shown: PEFT's own prefixes, and what else is small.
FAMILIES = (("CARTRIDGE", "PREFIX_TUNING"), ("IA3", "P_TUNING", "PROMPT_TUNING"))
# How many parameters a rival of the same size may train, relative to PrefixPlus.
SIZE = 1.25
# What a table shows beside the loss: the first of these that a task has.
MAIN_SCORES = ("exact_match", "bleu", "accuracy")


def build_summary(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a table.

    Args:
        reports (`dict`): what `run.py` wrote, by experiment.

    Returns:
        `list[str]`: for each set that had no part in any choice (or else for `dev`) the PrefixPlus method with the
        least loss on `dev`, LoRA, and that of each family; empty without a rival.
    """
    rows = [row for report in reports.values() for row in _summarize_experiment(report)]
    titles = ["data", "method", "parameters", "loss", "score", "PrefixPlus minus it: loss", "score"]
    return write_table(titles, rows) if rows else []


def _summarize_experiment(report: dict[str, Any]) -> list[list[str]]:
    results = collect_results(report)
    best = find_best(results, PREFIX_PLUS)
    if best is None:
        return []
    similar = [own for own in results if own.num_parameters <= SIZE * best.num_parameters]
    rivals = [own for own in similar if own.peft_type in LORA]
    rivals += [own for own in (find_best(similar, family) for family in FAMILIES) if own is not None]
    if not rivals:
        return []
    evaluations = [name for name in best.evaluations if name != DEV] or [DEV]
    return [row for name in evaluations for row in _summarize_set(report, name, best, rivals)]


def _summarize_set(
    report: dict[str, Any], evaluation: str, best: MethodResults, rivals: Sequence[MethodResults]
) -> list[list[str]]:
    main = next(name for name in MAIN_SCORES if name in best.list_scores(evaluation))
    own = [f"{report['experiment']['name']}: {evaluation}", *_describe(best, evaluation, main), "", ""]
    rows = [own]
    for rival in rivals:
        if evaluation in rival.evaluations:
            records = best.get_records(evaluation), rival.get_records(evaluation)
            differences = (write_difference(compare(*records, name), SCORES[name].digits) for name in ("loss", main))
            rows.append(["", *_describe(rival, evaluation, main), *differences])
    return rows


def _describe(result: MethodResults, evaluation: str, main: str) -> list[str]:
    loss, score = (summarize(result.get_scores(evaluation, name), SCORES[name].digits) for name in ("loss", main))
    return [result.name, f"{result.num_parameters:,}", loss, f"{SCORES[main].title} {score}"]
