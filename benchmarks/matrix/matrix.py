"""Runs every check on every model type, with PrefixPlus and with PEFT's PREFIX_TUNING, and writes the table."""

import argparse
import contextlib
import inspect
import json
import logging
import os
import platform
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from checks import CHECKS, INIT_TOKEN_IDS, NotApplicableError, Subject
from peft import PeftConfig, PrefixTuningConfig, TaskType
from transformers import PreTrainedModel
from zoo import GROUPS, UNBUILDABLE, list_model_types

from peft_prefix_plus import PrefixPlusConfig

RESULTS = Path(__file__).parents[2] / "peft_prefix_plus" / "supported_models.json"
SECONDS_PER_CHECK = 120
TASK_TYPES = {
    "causal": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "encoder": TaskType.FEATURE_EXTRACTION,
    "multimodal": TaskType.CAUSAL_LM,
    "vision": None,
}


def find_task_type(group: str, model: PreTrainedModel) -> TaskType | None:
    """PEFT's classes of tasks pass `input_ids`, which models of images and sound do not take."""
    takes_tokens = "input_ids" in inspect.signature(type(model).forward).parameters
    takes_embeddings = "inputs_embeds" in inspect.signature(type(model).forward).parameters
    generates = hasattr(model, "prepare_inputs_for_generation")
    return TASK_TYPES[group] if takes_tokens and takes_embeddings and (generates or group == "encoder") else None


def configure_prefix_plus(group: str, model: PreTrainedModel) -> PeftConfig:
    """Real tokens for language models."""
    is_language_model = group == "causal"
    return PrefixPlusConfig(
        task_type=find_task_type(group, model),
        prefix_init_token_ids=INIT_TOKEN_IDS if is_language_model else None,
        num_virtual_tokens=len(INIT_TOKEN_IDS),
        projection_dim=8,
    )


def configure_prefix_tuning(group: str, model: PreTrainedModel) -> PeftConfig:
    """PEFT's own method with as many virtual tokens."""
    task_type = find_task_type(group, model) or TaskType.FEATURE_EXTRACTION
    return PrefixTuningConfig(task_type=task_type, num_virtual_tokens=len(INIT_TOKEN_IDS))


METHODS = {"prefix_plus": configure_prefix_plus, "prefix_tuning": configure_prefix_tuning}


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise a `TimeoutError` after some time."""

    def stop(*args: object) -> None:
        raise TimeoutError(f"no result after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def run_checks(group: str, model_type: str, method: str) -> dict[str, str]:
    """Run all checks on one type: `"pass"`, `"n/a: reason"` or `"fail: reason"` by the check's name."""
    subject = Subject(group, model_type, METHODS[method])
    outcomes = {}
    for name, check in CHECKS.items():
        if method != "prefix_plus" and name == "exact":
            continue
        try:
            with time_limit(SECONDS_PER_CHECK):
                check(subject)
            outcomes[name] = "pass"
        except NotApplicableError as reason:
            outcomes[name] = f"n/a: {reason}"
            if name == "forward":
                break
        except Exception as error:
            message = str(error).strip().splitlines()
            outcomes[name] = f"fail: {type(error).__name__}: {message[0] if message else ''}"[:240]
            if name == "forward":
                break
    return outcomes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--types", nargs="*", help="only these model types")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name} in the package, if everything runs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for group in arguments.groups:
        unbuildable = [model_type for of_group, model_type in UNBUILDABLE if of_group == group]
        for model_type in sorted({*list_model_types(group), *unbuildable}):
            if arguments.types and model_type not in arguments.types:
                continue
            row: dict[str, object] = {"group": group, "model_type": model_type}
            if (group, model_type) in UNBUILDABLE:
                row["unbuildable"] = UNBUILDABLE[group, model_type]
            else:
                start = time.monotonic()
                for method in arguments.methods:
                    row[method] = run_checks(group, model_type, method)
                print(f"{group:11}{model_type:28}{time.monotonic() - start:5.1f} s  ", end="")
            print_row(row, arguments.methods)
            rows.append(row)
    for method in arguments.methods:
        for group in arguments.groups:
            print(method, group, dict(summarize(rows, group, method)))
    if arguments.output or not (arguments.types or len(arguments.groups) < len(GROUPS)):
        write_matrix(arguments.output or RESULTS, rows)


def write_matrix(path: Path, rows: list[dict[str, object]]) -> None:
    """Write the results, one type a line."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "peft-prefix-plus")}
    versions["python"] = platform.python_version()
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{"versions": {json.dumps(versions)}, "models": [\n{lines}\n]}}\n', encoding="utf-8")


def print_row(row: dict[str, object], methods: list[str]) -> None:
    """One line a type, and one for everything that failed."""
    if "unbuildable" in row:
        print(f"{row['group']:11}{row['model_type']:28} unbuildable: {row['unbuildable']}", flush=True)
        return
    marks = {"pass": "+", "n/a:": "o", "fail": "X"}
    outcomes = {method: row[method] for method in methods}
    print("  ".join("".join(marks[o[:4]] for o in by_name.values()) for by_name in outcomes.values()), flush=True)  # type: ignore[attr-defined]
    for name, outcome in outcomes.get("prefix_plus", {}).items():  # type: ignore[attr-defined]
        if outcome != "pass" and (outcome.startswith("fail") or "-v" in os.environ.get("MATRIX", "")):
            print(f"    {name}: {outcome}", flush=True)


def summarize(rows: list[dict[str, object]], group: str, method: str) -> Counter[str]:
    """Count the types of a group by their worst outcome."""
    counts: Counter[str] = Counter()
    for row in rows:
        if row["group"] == group and method in row:
            outcomes = row[method].values()  # type: ignore[attr-defined]
            counts["fail" if any(o.startswith("fail") for o in outcomes) else "pass"] += 1
        elif row["group"] == group:
            counts["unbuildable"] += 1
    return counts


if __name__ == "__main__":
    main()
