"""Writes docs/quality.md and its figures from what run.py measured.

python -m benchmarks.quality.page
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.bootstrap import compare
from benchmarks.quality.figures import draw_parameters, draw_rates
from benchmarks.quality.method_results import (
    MethodResults,
    collect_results,
    find_best,
    list_diverged,
)
from benchmarks.quality.segment_scores import SCORES
from benchmarks.quality.summary import PREFIX_PLUS, build_summary
from benchmarks.quality.tables import summarize, write_difference, write_table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")

INTRODUCTION = """# Quality

Made by `make bench-quality` from `benchmarks/quality/results/*.json`; [Benchmarks](benchmarks.md) says how, and how to
repeat it.

Every method was trained with each of its learning rates on the first seed. The rate with the least loss on the set
`dev` was then used for all seeds. Values are means over the seeds, with the least and the greatest in brackets.
Rates are chosen on `dev`, so its values are slightly too good, for all methods alike. Those of PrefixPlus may be a
little better still, because what its defaults are was found out on `dev` of E2E, of WebNLG, of Django's messages, of
the synopses and, for flat prefixes, of the opening hours ([Recipes](recipes.md#what-was-tried)). Test sets had no part
in any choice. With 200 records of E2E, methods have the one rate that they chose with other sizes. "Value step 4" on
WebNLG: of an earlier state, in which a step moved the values of a projection four times as far as its keys, and the
embeddings of virtual tokens no further than the projection.
"""
SUMMARY = """## Summary

The PrefixPlus method with the least loss on `dev` beside rivals that train at most a quarter more parameters: LoRA,
and the one with the least loss on `dev` of PEFT's own prefix methods, and of IA3, P-tuning and prompt tuning.
Differences have intervals of 95 % by bootstrap over records and seeds, bold where they exclude zero; a negative
difference of the loss is in favour of PrefixPlus, as is a positive one of the score. "13 wide" starts from two
training examples and an instruction. "Instructed" reads the instruction in front of each input; plain LoRA shows what
the instruction does. Which part of a difference is due to the examples, methods that have them, too, would show
("prompted", "from examples"), where they have been run. All methods, and what they cost, are below.
"""
NO_RESULTS = """
There are no results yet. `make bench-quality DATA=directory` runs a short experiment and writes this page.
"""
# What a run has cost, with the titles of columns.
COSTS = {"train_cpu_seconds": "CPU time of training", "peak_memory_mib": "peak memory"}
COST = """CPU time and peak memory of training: means over the runs with the chosen rate, as ratios to those of LoRA on
the same kind of machine. Other processes ran beside them and slow memory down, so small differences mean nothing;
[Speed and memory](performance.md) has measurements side by side. A dash: not measured.
"""
DIFFERENCES = """### {name}: {best} minus the others

{best} had the least loss on `dev` {choice}, and is compared here with every other method: the difference and its
interval of 95 %, by bootstrap over the records, the same ones for both, and over the seeds of each (10,000 resamples).
Intervals that exclude zero are bold. For the loss lower is better, for everything else higher. There are {count}
intervals. They are approximate: three seeds drawn with replacement have two thirds of their variance, so where seeds
differ much, more than one interval in twenty would exclude zero if there were no difference at all.
"""


def build_section(name: str, report: dict[str, Any], images: Path) -> list[str]:
    """The lines about one results file; figures go to the directory `images`."""
    results = collect_results(report)
    trained = [result for result in results if result.peft_type is not None]
    lines = [f"## {report['experiment']['name']}", "", *describe_setting(report), ""]
    if not trained:
        return [*lines, "No method has been measured yet.", ""]
    for evaluation in report["experiment"]["task"]["evaluations"]:
        measured = [result for result in results if evaluation in result.evaluations]
        if measured:
            lines += [f"### {name}: {evaluation}", "", *build_score_table(measured, evaluation), ""]
    lines += [f"### {name}: cost", "", COST, *build_cost_table(trained), ""]
    lines += describe_rates(trained, report)
    best = find_best(results, PREFIX_PLUS)
    rivals = [result for result in trained if result.peft_type not in PREFIX_PLUS]
    if best is not None and rivals:
        count = sum(result.peft_type in PREFIX_PLUS for result in trained)
        choice = f"of {count} PrefixPlus methods" if count > 1 else "as the only PrefixPlus method"
        lines += build_comparison(name, best, choice, rivals)
    draw_rates(trained, images / f"{name}_rates.svg")
    draw_parameters(results, images / f"{name}_parameters.svg")
    return [
        *lines,
        f"![Loss against learning rate](images/{name}_rates.svg)",
        "",
        f"![Scores against trained parameters](images/{name}_parameters.svg)",
        "",
    ]


def describe_setting(report: dict[str, Any]) -> list[str]:
    """What all runs have in common, in one paragraph."""
    experiment = report["experiment"]
    task, training = experiment["task"], experiment["training"]
    sets = ", ".join(f"`{name}` ({own['path']}{describe_limit(own)})" for name, own in task["evaluations"].items())
    limit = f", {task['train_limit']} examples of it, drawn anew for each seed" if "train_limit" in task else ""
    arguments = ", ".join(f"{name} {value}" for name, value in training.items())
    versions = sorted({tuple(run["versions"].items()) for run in report["runs"]})
    listed = "; ".join(", ".join(f"{name} {number}" for name, number in own) for own in versions)
    return [
        f"`{experiment['model']}` in {experiment['dtype']}. Trained on {task['train']}{limit}. Evaluated on {sets}. "
        f"{arguments}. Seeds {', '.join(map(str, experiment['seeds']))}. {listed}."
    ]


def describe_limit(evaluation: dict[str, Any]) -> str:
    """Which records of a set were taken, if not all."""
    return f", the first {evaluation['limit']} records" if "limit" in evaluation else ""


def build_score_table(results: list[MethodResults], evaluation: str) -> list[str]:
    """One row for each method, with its scores on a set."""
    names = results[0].list_scores(evaluation)
    rows = []
    for result in results:
        rate = "" if result.learning_rate is None else f"{result.learning_rate:g}"
        seeds = "" if result.learning_rate is None else str(len(result.runs))
        scores = (summarize(result.get_scores(evaluation, name), SCORES[name].digits) for name in names)
        rows.append([result.name, f"{result.num_parameters:,}", rate, seeds, *scores])
    titles = [SCORES[name].title for name in names]
    return write_table(["method", "trained parameters", "learning rate", "seeds", *titles], rows)


def build_cost_table(results: list[MethodResults]) -> list[str]:
    """Sizes, and time and memory of training as ratios to LoRA on the same machine."""
    lora = [result for result in results if result.peft_type == "LORA"]
    # Older runs have no CPU time.
    measured = [result for result in lora if all(run.get(name) for run in result.runs for name in COSTS)]
    reference = next(iter(measured or lora), None)
    rows = []
    for result in results:
        size = result.average(lambda run: run["adapter_bytes"]) / 1024
        ratios = [write_ratio(result, reference, quantity) for quantity in COSTS]
        rows.append([result.name, f"{result.num_parameters:,}", f"{size:,.0f}", *ratios])
    titles = [f"{title} / {reference.name if reference else 'LoRA'}" for title in COSTS.values()]
    return write_table(["method", "trained parameters", "adapter KB", *titles], rows)


def write_ratio(result: MethodResults, reference: MethodResults | None, quantity: str) -> str:
    """The ratio of two means over runs on one machine, or a dash if there are none."""
    machine = result.runs[0]["machine"]
    means = []
    for own in (result, reference):
        runs = own.runs if own is not None else []
        values = [run[quantity] for run in runs if run["machine"] == machine and run.get(quantity)]
        if not values:
            return "–"
        means.append(mean(values))
    return f"{means[0] / means[1]:.2f}"


def describe_rates(results: list[MethodResults], report: dict[str, Any]) -> list[str]:
    """Which methods may do better with a rate that was not tried, and what diverged."""
    lines = []
    ends = [result.name for result in results if result.rate_is_at_an_end]
    if ends:
        lines += [
            f"The chosen rate is at an end of those tried, so another may be better still: {', '.join(ends)}.",
            "",
        ]
    diverged = list_diverged(report)
    if diverged:
        lines += [f"Diverged: {', '.join(diverged)}.", ""]
    return lines


def build_comparison(name: str, best: MethodResults, choice: str, rivals: list[MethodResults]) -> list[str]:
    """The table of differences, and in words every rival that is better on some score."""
    rows, better, count = [], [], 0
    columns = [(evaluation, score) for evaluation in best.evaluations for score in best.list_scores(evaluation)]
    for rival in rivals:
        row = [rival.name]
        for evaluation, score in columns:
            if evaluation not in rival.evaluations:
                row.append("–")
                continue
            difference = compare(best.get_records(evaluation), rival.get_records(evaluation), score)
            count += 1
            row.append(write_difference(difference, SCORES[score].digits))
            if difference.excludes_zero and (difference.value > 0) != SCORES[score].higher_is_better:
                better.append(f"- {rival.name}: {SCORES[score].title} on {evaluation}, {row[-1].replace('*', '')}")
        rows.append(row)
    titles = [f"{evaluation}: {SCORES[score].title}" for evaluation, score in columns]
    verdict = [f"Better than {best.name}, with an interval that excludes zero:", "", *better]
    if not better:
        verdict = [f"No other method is better than {best.name} on any score with an interval that excludes zero."]
    introduction = DIFFERENCES.format(name=name, best=best.name, choice=choice, count=count)
    return [introduction, *write_table(["minus", *titles], rows), "", *verdict, ""]


def write_page(results: Path, docs: Path) -> Path:
    """Write `quality.md` and `images/` into `docs` from the files in `results`; returns the page."""
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    lines = [INTRODUCTION, SUMMARY, *build_summary(reports), ""]
    for name, report in reports.items():
        lines += build_section(name, report, docs / "images")
    docs.mkdir(parents=True, exist_ok=True)
    page = docs / "quality.md"
    page.write_text("\n".join(lines) if reports else INTRODUCTION + NO_RESULTS, encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes")
    arguments = parser.parse_args()
    print(write_page(arguments.results, arguments.docs))


if __name__ == "__main__":
    main()
