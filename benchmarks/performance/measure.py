"""Measures speed and memory of a base model with the adapters of several methods, in interleaved rounds.

    python -m benchmarks.performance.measure --setting short --output benchmarks/performance/short.json

A round runs every rival once, in an order that changes from round to round; what is reported are the medians of the
ratios to the base model within a round, so slow phases of the machine hit all rivals alike. Every case is written when
it is measured; with `--resume`, an interrupted measurement goes on with what is missing.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.environment import describe_machine, list_versions
from benchmarks.instructions import count_instructions
from benchmarks.performance.cases import (
    Run,
    build_loading,
    build_mixed_batch,
    build_runs,
    build_switch,
    count_saved_bytes,
    generate,
    measure_peak,
    train_step,
    truncate_layers,
)
from benchmarks.performance.rivals import (
    BARE,
    LORA,
    NATIVE,
    PACKAGE,
    PREFIX,
    build_prefix,
    build_rivals,
    share_weights,
)
from benchmarks.performance.rounds import subtract, summarize, time_rounds
from peft_prefix_plus.base_models import choose_fast_dtype, load_base_model

Case = dict[str, Any]
# By kind, the cases; what they hold are arguments of the methods of `Measurement`.
SETTINGS: dict[str, dict[str, Any]] = {
    # At most 15 minutes on two cores.
    "short": {
        "rounds": 5,
        "budget": 30,
        "cases": {
            "steps": [{"batch": 4, "length": 96}, {"batch": 4, "length": 96, "checkpointing": True}],
            "generation": [{"batch": 4, "context": 256, "new": 33}, {"batch": 1, "context": 64, "new": 33}],
            "adapters": [{}],
            "mixed_batches": [{"context": 64, "new": 16}],
        },
    },
    "full": {
        "rounds": 9,
        # Seconds after which a case begins no further round.
        "budget": 60,
        # By dtype, the tokens of the largest case; what is larger would take hours.
        "most_tokens": {"float32": 4096},
        "cases": {
            "lengths": [{"num_virtual_tokens": length} for length in (1, 4, 16, 64, 150, 256)],
            "depths": [{"depth": depth} for depth in (6, 12, 18, 24, 30)],
            "adapters": [{}],
            "mixed_batches": [{"context": 64, "new": 16}, {"context": 64, "new": 64}],
            "steps": [
                *({"batch": batch, "length": length} for batch in (1, 8) for length in (64, 256, 1024)),
                {"batch": 1, "length": 1024, "checkpointing": True},
                {"batch": 8, "length": 256, "checkpointing": True},
            ],
            "generation": [
                {"batch": batch, "context": context, "new": 33}
                for batch in (1, 16)
                for context in (64, 256, 1024, 2048)
            ],
        },
    },
}
STEP = {"batch": 4, "length": 96}
GENERATION = {"batch": 4, "context": 256, "new": 33}
NUM_MIXED = 8
DTYPES = ("float32", "bfloat16")


class Measurement:
    """The figures of one base model.

    Args:
        base (`PreTrainedModel`): the model, with weights that nothing changes.
        rounds (`int`): how often everything is timed, at most.
        budget (`float`, *optional*): see [`time_rounds`].
    """

    def __init__(self, base: PreTrainedModel, rounds: int, budget: float | None = None) -> None:
        self.base = base
        self.models = build_rivals(base)
        self._time = partial(time_rounds, rounds=rounds, budget=budget)
        self._kinds: dict[str, Callable[..., Case]] = {
            "steps": self.measure_step,
            "generation": self.measure_generation,
            "lengths": self.measure_length,
            "depths": self.measure_depth,
            "adapters": self.measure_adapters,
            "mixed_batches": self.measure_mixed_batch,
        }

    def measure(self, kind: str, case: Case) -> Case:
        """Measure one case of a setting; returns its figures, and the case itself as `case`."""
        return {"case": case} | self._kinds[kind](**case)

    def measure_step(self, **step: Any) -> Case:
        """A training step: its time, its instructions, what it keeps for the backward pass, and the peak memory."""
        models = dict(self.models)
        if step.get("checkpointing"):
            del models[NATIVE]
        runs = build_runs(models, train_step, **step)
        times = summarize(self._time(runs), BARE)
        instructions = count_each(runs)
        saved = {name: count_saved_bytes(models[name], run) for name, run in runs.items()}
        peaks = {name: measure_peak(run) for name, run in runs.items()}
        return {"times": times, "instructions": instructions, "saved_bytes": saved, "peak_bytes": peaks}

    def measure_generation(self, **case: int) -> Case:
        """Generation as a whole, with its instructions; its first token, which reads the context; and the others."""
        first: dict[str, list[float]] = {name: [] for name in self.models}
        runs = build_runs(self.models, generate, **case)
        noted = {name: partial(lambda name: first[name].append(runs[name]()), name) for name in runs}
        whole = self._time(noted)
        # Without those of the round that does not count.
        first = {name: own[1:] for name, own in first.items()}
        parts = {"times": whole, "prefill": first, "decoding": subtract(whole, first)}
        instructions = count_each(runs)
        return {name: summarize(seconds, BARE) for name, seconds in parts.items()} | {"instructions": instructions}

    def measure_length(self, num_virtual_tokens: int) -> Case:
        """A step and a generation with prefixes of one length, and the instructions of both."""
        return self._measure_both(build_rivals(self.base, (BARE, PACKAGE, LORA, NATIVE), num_virtual_tokens))

    def measure_depth(self, depth: int) -> Case:
        """A step and a generation with the first layers of the model, and the instructions of both."""
        base = truncate_layers(share_weights(self.base), depth)
        return self._measure_both(build_rivals(base, (BARE, PACKAGE, LORA)))

    def _measure_both(self, models: dict[str, nn.Module]) -> Case:
        parts = {
            "step": build_runs(models, train_step, **STEP),
            "generation": build_runs(models, generate, **GENERATION),
        }
        times = {part: summarize(self._time(runs), BARE) for part, runs in parts.items()}
        return times | {"instructions": {part: count_each(runs) for part, runs in parts.items()}}

    def measure_adapters(self) -> Case:
        """Seconds to load one more adapter and delete it, and to make another one the active one, 20 times."""
        loading, switching = {}, {}
        with tempfile.TemporaryDirectory() as directory:
            for name in (PREFIX, LORA, NATIVE):
                model = self.models[name]
                loading[name] = build_loading(model, f"{directory}/{name}")
                model.add_adapter("other", model.peft_config["default"])
                switching[name] = build_switch(model, ["default", "other"])
            parts = {"loading": loading, "switching": switching}
            times = {name: summarize(self._time(runs), LORA) for name, runs in parts.items()}
        for name in loading:
            self.models[name].delete_adapter("other")
            self.models[name].set_adapter("default")
        return times

    def measure_mixed_batch(self, context: int, new: int) -> Case:
        """One pass over eight rows with eight adapters against eight passes of one row."""
        model: Any = self.models[PREFIX]
        names = [f"adapter{number}" for number in range(NUM_MIXED)]
        for number, name in enumerate(names):
            model.add_adapter(name, build_prefix("none", 16 + number))
        runs = build_mixed_batch(model.eval(), names, context, new)
        # What the same rows cost the base model tells how much of the gain is that of any batch.
        bare = self.models[BARE]
        runs["base model, one pass"] = lambda: generate(bare, NUM_MIXED, context, new)
        runs["base model, one pass for each"] = lambda: [generate(bare, 1, context, new) for _ in names]
        times = summarize(self._time(runs), "mixed")
        model.set_adapter("default")
        for name in names:
            model.delete_adapter(name)
        return {"times": times}


def count_each(runs: dict[str, Run]) -> dict[str, int | None]:
    """The instructions of each run; `None` where they cannot be counted."""
    return {name: count_instructions(run) for name, run in runs.items()}


def count_tokens(case: Case) -> int:
    """How many tokens a case reads; 0, if that is not what its time depends on."""
    return int(case.get("batch", 0) * case.get("length", case.get("context", 0)))


def list_cases(setting: dict[str, Any], dtype: str) -> dict[str, list[Case]]:
    """By their kind, the cases of a setting that are measured in a dtype."""
    most = setting.get("most_tokens", {}).get(dtype, math.inf)
    return {kind: [case for case in cases if count_tokens(case) <= most] for kind, cases in setting["cases"].items()}


def list_missing(setting: dict[str, Any], dtype: str, results: dict[str, list[Case]]) -> Iterator[tuple[str, Case]]:
    """The kinds and the cases of a setting that have not been measured in a dtype, in their order."""
    for kind, cases in list_cases(setting, dtype).items():
        measured = [result["case"] for result in results.get(kind, [])]
        yield from ((kind, case) for case in cases if case not in measured)


def read_report(path: Path, head: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted measurement has left in a file.

    Raises:
        ValueError: if the file comes from other settings or versions.
    """
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name, value in head.items() if report.get(name) != value]
    if different:
        raise ValueError(
            f"{path} was measured with another {' and '.join(different)}. Measure again without `--resume`."
        )
    return report


def note_machine(report: dict[str, Any], dtype: str) -> None:
    """Write down which machine a dtype is measured on; nothing, if that of earlier cases is not known.

    Raises:
        ValueError: if the file's cases of this dtype come from another one: ratios depend on the processor.
    """
    machines, machine = report.setdefault("machines", {}), describe_machine()
    if not report["dtypes"][dtype]:
        machines[dtype] = machine
    elif machines.get(dtype, machine) != machine:
        raise ValueError(
            f"The cases in {dtype} were measured on {machines[dtype]}, this is {machine}. Measure the rest there, or "
            "everything again without `--resume`."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="short")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(dict.fromkeys((DTYPES[0], choose_fast_dtype()))),
        help="default: float32, and bfloat16 if the processor has instructions for it",
    )
    kinds = list(SETTINGS["full"]["cases"])
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="only these cases")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="keep what the output file has, measure what is missing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = SETTINGS[arguments.setting]
    head = {
        "model": "SmolLM2-135M-Instruct",
        "threads": arguments.threads,
        "setting": setting,
        "versions": list_versions(),
    }
    resumes = arguments.resume and arguments.output.exists()
    report = read_report(arguments.output, head) if resumes else head | {"dtypes": {}}
    for dtype in arguments.dtypes:
        results: dict[str, list[Case]] = report["dtypes"].setdefault(dtype, {})
        missing = [(kind, case) for kind, case in list_missing(setting, dtype, results) if kind in arguments.kinds]
        # What takes longest comes last.
        missing.sort(key=lambda kind_and_case: count_tokens(kind_and_case[1]))
        if not missing:
            continue
        note_machine(report, dtype)
        base, _ = load_base_model("smollm2-wheel", dtype=dtype)
        measurement = Measurement(base, setting["rounds"], setting.get("budget"))
        for kind, case in missing:
            result = measurement.measure(kind, case)
            print(json.dumps(result), flush=True)
            results.setdefault(kind, []).append(result)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
