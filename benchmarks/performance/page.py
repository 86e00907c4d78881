"""Writes docs/performance.md, and its figure, from what measure.py measured."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.performance.measure import DTYPES, list_cases, list_missing
from benchmarks.performance.rivals import BARE, LORA, NATIVE, PACKAGE, PREFIX
from benchmarks.performance.rounds import LEAST_ROUNDS

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"

INTRODUCTION = """# Speed and memory

`make bench-performance` makes the measurements of the short setting, in 15 minutes, and this page. The full setting
takes about an hour and a quarter in bfloat16, twice that in float32, needs 12 GB for its largest steps, and goes on
where it was interrupted:

    python -m benchmarks.performance.measure --setting full --resume --output benchmarks/performance/full.json
    python -m benchmarks.performance.page

`--kinds steps generation` measures only those cases. Without instructions for bfloat16 in the processor, only float32
is measured.

Everything is measured with SmolLM2-135M-Instruct on a CPU, and given as a ratio to the bare base model in the same
round: the median of all rounds, and in brackets the quartiles. The machines were shared, so differences smaller than
the quartiles are noise. Prefixes have 20 virtual tokens; where a table says otherwise, a step is one of 4 x 96 tokens,
and generation has batch 4 and context 256. PrefixPlus flat, LoRA and PREFIX_TUNING train 230,400 parameters each,
PrefixPlus (with its default projection) 205,440.

No prefix makes a model faster. Where generation takes less time than with the bare model, it is because this package
writes new tokens behind the others in the cache, where transformers copies the whole cache for each, and because it
gives the kernel for half precision the queries of a group as one head ([Method](method.md#where-it-enters)). The
gradient of up to 256 queries is computed in float32, where that is faster. All of it would help the bare model, too.

- A **training step** is a forward and a backward pass; of the base model, with frozen weights, down to the input of
  the first layer.
- **Instructions** are how many the processor executes, with one thread, outside of the system. What else a machine
  does has no part in them, so they tell more where quartiles are far apart; but some take longer than others.
- **Saved bytes** are what autograd keeps for the backward pass, without the parameters.
- **Peak memory** is by how much a step raises the resident memory of the process.
- **Generation** is greedy, with 33 new tokens. Prefill is the time to the first of them, decoding that of the others.
"""

QUANTITIES = {"num_virtual_tokens": "virtual token", "depth": "layer"}
Row = dict[str, str]


def write_ratio(times: dict[str, Any]) -> str:
    """A ratio with its quartiles."""
    lower, upper = times["quartiles"]
    return f"{times['ratio']:.2f} ({lower:.2f} to {upper:.2f})"


def write_table(rows: dict[str, Row], first: str = "") -> list[str]:
    """One row for each case, one column for each method."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| {first} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    cells = (f"| {case} | {' | '.join(row.get(name, '–') for name in names)} |" for case, row in rows.items())
    return [*lines, *cells, ""]


def write_ratios(times: dict[str, Any], base: str = BARE) -> Row:
    """The cells of one row."""
    return {name: write_ratio(own) for name, own in times.items() if name != base}


def write_counts(counts: dict[str, int | None]) -> Row:
    """The cells of one row, of what was counted once; none, if it was not counted."""
    known = {name: count for name, count in counts.items() if count}
    if not known or len(known) < len(counts):
        return {}
    return {name: f"{count / known[BARE]:.3f}" for name, count in known.items() if name != BARE}


def describe_step(case: dict[str, Any]) -> str:
    """The batch and the length of a training step."""
    return f"{case['batch']} x {case['length']} tokens" + (", checkpointing" if case.get("checkpointing") else "")


def list_steps(steps: Iterable[dict[str, Any]]) -> dict[str, Row]:
    """Rows of the training steps."""
    rows: dict[str, Row] = {}
    for step in steps:
        case = describe_step(step["case"])
        rows[f"step, {case}"] = write_ratios(step["times"])
        counts = (("instructions", "instructions"), ("saved bytes", "saved_bytes"), ("peak memory", "peak_bytes"))
        for title, key in counts:
            if cells := write_counts(step.get(key, {})):
                rows[f"{title}, {case}"] = cells
    return rows


def list_generation(cases: Iterable[dict[str, Any]]) -> dict[str, Row]:
    """Rows of generation, as a whole and in its parts."""
    rows: dict[str, Row] = {}
    for result in cases:
        case = f"batch {result['case']['batch']}, context {result['case']['context']}"
        for title, key in (("generation", "times"), ("prefill", "prefill"), ("decoding", "decoding")):
            rows[f"{title}, {case}"] = write_ratios(result[key])
        if cells := write_counts(result.get("instructions", {})):
            rows[f"instructions, {case}"] = cells
    return rows


def list_series(results: Iterable[dict[str, Any]]) -> dict[str, Row]:
    """Rows of a step and a generation for every value of one quantity."""
    rows: dict[str, Row] = {}
    for result in results:
        (name, value), *_ = result["case"].items()
        for part in ("step", "generation"):
            case = f"{part}, {value} {QUANTITIES[name]}{'' if value == 1 else 's'}"
            rows[case] = write_ratios(result[part])
            if cells := write_counts(result.get("instructions", {}).get(part, {})):
                rows[f"instructions, {case}"] = cells
    return rows


def write_adapters(adapters: dict[str, Any]) -> list[str]:
    """The table of loading and switching, in milliseconds."""
    rows = {
        "load and delete": {name: f"{1000 * own['seconds']:.1f} ms" for name, own in adapters["loading"].items()},
        "switch": {name: f"{1000 * own['seconds'] / 20:.2f} ms" for name, own in adapters["switching"].items()},
    }
    return write_table(rows, "adapters")


def write_mixed_batch(mixed: dict[str, Any]) -> str:
    """What a mixed batch gains."""
    case, times = mixed["case"], mixed["times"]
    bare = times["base model, one pass for each"]["ratio"] / times["base model, one pass"]["ratio"]
    return (
        f"To generate {case['new']} tokens for eight rows with eight adapters, one pass for each row takes "
        f"{write_ratio(times['one pass for each'])} times as long as a mixed batch. With the base model, a pass for "
        f"each row takes {bare:.2f} times as long as one batch of the same rows, and one batch of it "
        f"{write_ratio(times['base model, one pass'])} of the time of the mixed batch."
    )


# By the kind of cases, the title of a table and what makes its rows.
TABLES: tuple[tuple[str, str, Callable[[Iterable[dict[str, Any]]], dict[str, Row]]], ...] = (
    ("steps", "training", list_steps),
    ("generation", "inference", list_generation),
    ("lengths", "lengths", list_series),
    ("depths", "depths", list_series),
)


def write_dtype(dtype: str, results: dict[str, Any], machine: dict[str, Any] | None) -> list[str]:
    """The tables of one dtype."""
    lines = [f"### {dtype}", ""]
    if machine is not None:
        lines += [f"Measured on {machine['processor']}, {machine['instructions']}.", ""]
    for kind, title, list_rows in TABLES:
        if results.get(kind):
            lines += write_table(list_rows(results[kind]), title)
    for adapters in results.get("adapters", []):
        lines += write_adapters(adapters)
    return [*lines, *(f"- {write_mixed_batch(mixed)}" for mixed in results.get("mixed_batches", [])), ""]


def describe_rounds(setting: dict[str, Any]) -> str:
    """How often everything was timed."""
    rounds = f"{setting['rounds']} rounds"
    return f"{LEAST_ROUNDS} to {rounds}, as time allowed" if "budget" in setting else rounds


def describe_missing(report: dict[str, Any]) -> list[str]:
    """What is not measured in a dtype, and what an interrupted measurement has yet to measure."""
    lines = []
    for dtype, most in report["setting"].get("most_tokens", {}).items():
        lines += [f"In {dtype}, cases of more than {most:,} tokens are left out: they would take hours.", ""]
    for dtype in DTYPES:
        results = report["dtypes"].get(dtype, {})
        cases = list_cases(report["setting"], dtype)
        left = Counter(kind for kind, _ in list_missing(report["setting"], dtype, results))
        if not results:
            lines += [f"Nothing has been measured in {dtype} yet.", ""]
        elif left:
            counts = ", ".join(f"{count} of {len(cases[kind])} {kind}" for kind, count in left.items())
            lines += [f"Not measured yet in {dtype}: {counts}.".replace("_", " "), ""]
    return lines


def draw_lengths(report: dict[str, Any], path: Path) -> None:
    """Lines of the ratios to the base model against the length of the prefix."""
    measured = {dtype: results["lengths"] for dtype, results in report["dtypes"].items() if results.get("lengths")}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, part in zip(axes, ("step", "generation"), strict=True):
        for dtype, results in measured.items():
            lengths = [result["case"]["num_virtual_tokens"] for result in results]
            for name in (PACKAGE, LORA, NATIVE):
                times = [result[part][name] for result in results]
                errors = [[abs(own["ratio"] - own["quartiles"][side]) for own in times] for side in (0, 1)]
                label = name if len(measured) == 1 else f"{name}, {dtype}"
                axis.errorbar(
                    lengths, [own["ratio"] for own in times], yerr=errors, capsize=2, marker=".", label=label
                )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("virtual tokens")
        axis.set_title(part)
    axes[0].set_ylabel("time / base model")
    axes[0].legend()
    _save(figure, path)


def draw_bars(report: dict[str, Any], path: Path) -> None:
    """Bars of the ratios to the base model, for each step, generation and method."""
    figure, axes = plt.subplots(1, len(report["dtypes"]), figsize=(6 * len(report["dtypes"]), 5), squeeze=False)
    for axis, (dtype, results) in zip(axes[0], report["dtypes"].items(), strict=True):
        cases = {f"step, {describe_step(step['case'])}": step["times"] for step in results.get("steps", [])}
        for result in results.get("generation", []):
            cases[f"generation, {result['case']['batch']} x {result['case']['context']}"] = result["times"]
        for offset, name in enumerate((PREFIX, LORA, NATIVE)):
            places = [index + 0.25 * (offset - 1) for index, times in enumerate(cases.values()) if name in times]
            own = [times[name] for times in cases.values() if name in times]
            errors = [[abs(item["ratio"] - item["quartiles"][side]) for item in own] for side in (0, 1)]
            axis.bar(places, [item["ratio"] for item in own], 0.22, yerr=errors, capsize=2, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(cases)), cases, fontsize=7, rotation=40, ha="right")
        axis.set_title(dtype)
        axis.set_ylim(bottom=0.6)
        axis.set_ylabel("time / base model")
    axes[0][0].legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


# By the kinds of cases that they show: what draws them, how their files end, and a title.
FIGURES = (
    (("steps", "generation"), draw_bars, "", "Time of training steps and of generation"),
    (("lengths",), draw_lengths, "_lengths", "Time against the length of the prefix"),
)


def write_page(reports: dict[str, dict[str, Any]], docs: Path) -> None:
    """Write the page and its figure.

    Args:
        reports (`dict[str, dict]`): what `measure.py` wrote, by the name of the setting.
        docs (`Path`): directory of the documentation.
    """
    lines = [INTRODUCTION]
    for name, report in reports.items():
        versions = ", ".join(f"{module} {number}" for module, number in report["versions"].items())
        lines += [f"## The {name} setting", ""]
        lines += [
            f"{report['model']}, {report['threads']} threads, {describe_rounds(report['setting'])}. {versions}.",
            "",
        ]
        lines += describe_missing(report)
        for kinds, draw, file, title in FIGURES:
            if any(kind in results for results in report["dtypes"].values() for kind in kinds):
                draw(report, docs / "images" / f"performance_{name}{file}.png")
                lines += [f"![{title}](images/performance_{name}{file}.png)", ""]
        for dtype, results in report["dtypes"].items():
            lines += write_dtype(dtype, results, report.get("machines", {}).get(dtype))
    (docs / "performance.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    """Write the page of what has been measured."""
    paths = [path for name in ("short", "full") if (path := HERE / f"{name}.json").exists()]
    write_page({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}, DOCS)


if __name__ == "__main__":
    main()
