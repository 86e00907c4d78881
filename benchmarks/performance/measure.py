"""Measures speed and memory of a base model with the adapters of several methods, in interleaved rounds.

    python -m benchmarks.performance.measure --setting short --output benchmarks/performance/short.json

A round runs every rival once, in an order that changes from round to round; what is reported are the medians of the
ratios to the base model within a round, so slow phases of the machine hit all rivals alike.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.environment import list_versions
from benchmarks.performance.cases import (
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
from benchmarks.performance.rivals import BARE, LORA, NATIVE, PREFIX, build_prefix, build_rivals, share_weights
from benchmarks.performance.rounds import subtract, summarize, time_rounds
from peft_prefix_plus.base_models import load_base_model

SETTINGS: dict[str, dict[str, Any]] = {
    # About 14 minutes on two cores.
    "short": {
        "rounds": 5,
        "steps": [{"batch": 4, "length": 96}, {"batch": 4, "length": 96, "checkpointing": True}],
        "generation": [{"batch": 4, "context": 256, "new": 33}, {"batch": 1, "context": 64, "new": 33}],
        "mixed": [{"context": 64, "new": 16}],
        "lengths": [],
        "depths": [],
    },
    # About two hours.
    "full": {
        "rounds": 9,
        "steps": [
            {"batch": batch, "length": length, "checkpointing": checkpointing}
            for batch, length in ((1, 64), (1, 256), (1, 1024), (8, 64), (8, 256), (8, 1024))
            for checkpointing in (False, True)
        ],
        "generation": [
            {"batch": batch, "context": context, "new": 33}
            for batch in (1, 4, 16)
            for context in (64, 256, 1024, 2048)
        ],
        "mixed": [{"context": 64, "new": 16}, {"context": 64, "new": 64}],
        "lengths": [1, 4, 16, 64, 256],
        "depths": [6, 12, 18, 24, 30],
    },
}
STEP = {"batch": 4, "length": 96}
GENERATION = {"batch": 4, "context": 256, "new": 33}


class Measurement:
    """The figures of one base model.

    Args:
        base (`PreTrainedModel`): the model, with weights that nothing changes.
        setting (`dict`): an entry of `SETTINGS`.
    """

    def __init__(self, base: PreTrainedModel, setting: dict[str, Any]) -> None:
        self.base = base
        self.setting = setting
        self.rounds: int = setting["rounds"]
        self.models = build_rivals(base)

    def run(self) -> dict[str, Any]:
        """Measure everything that the setting names."""
        return {
            "steps": [self.measure_step(self.models, **step) for step in self.setting["steps"]],
            "generation": [self.measure_generation(self.models, **case) for case in self.setting["generation"]],
            "lengths": [self.measure_length(length) for length in self.setting["lengths"]],
            "depths": [self.measure_depth(depth) for depth in self.setting["depths"]],
            "adapters": self.measure_adapters(),
            "mixed_batches": self.measure_mixed_batches(),
        }

    def measure_step(self, models: dict[str, nn.Module], **step: Any) -> dict[str, Any]:
        """A training step: its time, what it keeps for the backward pass, and the peak of the memory."""
        if step.get("checkpointing"):
            models = {name: model for name, model in models.items() if name != NATIVE}
        runs = build_runs(models, train_step, **step)
        times = summarize(time_rounds(runs, self.rounds), BARE)
        saved = {name: count_saved_bytes(models[name], run) for name, run in runs.items()}
        peaks = {name: measure_peak(run) for name, run in runs.items()}
        return _report({"case": step, "times": times, "saved_bytes": saved, "peak_bytes": peaks})

    def measure_generation(self, models: dict[str, nn.Module], **case: int) -> dict[str, Any]:
        """Generation as a whole, its first token, which reads the context, and the others."""
        whole = time_rounds(build_runs(models, generate, **case), self.rounds)
        first = time_rounds(build_runs(models, generate, **case | {"new": 1}), self.rounds)
        parts = {"times": whole, "prefill": first, "decoding": subtract(whole, first)}
        return _report({"case": case} | {name: summarize(seconds, BARE) for name, seconds in parts.items()})

    def measure_length(self, num_virtual_tokens: int) -> dict[str, Any]:
        """A step and a generation with prefixes of one length."""
        names = (BARE, PREFIX, NATIVE)
        return self._measure_both(
            {"virtual tokens": num_virtual_tokens}, build_rivals(self.base, names, num_virtual_tokens)
        )

    def measure_depth(self, depth: int) -> dict[str, Any]:
        """A step and a generation with the first layers of the model."""
        base = truncate_layers(share_weights(self.base), depth)
        return self._measure_both({"layers": depth}, build_rivals(base, (BARE, PREFIX, LORA)))

    def _measure_both(self, case: dict[str, int], models: dict[str, nn.Module]) -> dict[str, Any]:
        step = time_rounds(build_runs(models, train_step, **STEP), self.rounds)
        generation = time_rounds(build_runs(models, generate, **GENERATION), self.rounds)
        return _report({"case": case, "step": summarize(step, BARE), "generation": summarize(generation, BARE)})

    def measure_adapters(self) -> dict[str, Any]:
        """Seconds to load one more adapter and delete it, and to make another one the active one, 20 times."""
        loading, switching = {}, {}
        with tempfile.TemporaryDirectory() as directory:
            for name in (PREFIX, LORA, NATIVE):
                model = self.models[name]
                loading[name] = build_loading(model, f"{directory}/{name}")
                model.add_adapter("other", model.peft_config["default"])
                switching[name] = build_switch(model, ["default", "other"])
            parts = {"loading": loading, "switching": switching}
            times = {name: summarize(time_rounds(runs, self.rounds), LORA) for name, runs in parts.items()}
        for name in loading:
            self.models[name].delete_adapter("other")
            self.models[name].set_adapter("default")
        return _report(times)

    def measure_mixed_batches(self) -> list[dict[str, Any]]:
        """One pass over eight rows with eight adapters against eight passes of one row."""
        model: Any = self.models[PREFIX]
        names = [f"adapter{number}" for number in range(8)]
        for number, name in enumerate(names):
            model.add_adapter(name, build_prefix("none", 16 + number))
        model.eval()
        return [self._measure_mixed_batch(model, names, **case) for case in self.setting["mixed"]]

    def _measure_mixed_batch(self, model: Any, names: list[str], context: int, new: int) -> dict[str, Any]:
        runs = build_mixed_batch(model, names, context, new)
        # What the same rows cost the base model tells how much of the gain is that of any batch.
        bare: Any = self.models[BARE]
        runs["base model, one pass"] = lambda: generate(bare, len(names), context, new)
        runs["base model, one pass for each"] = lambda: [generate(bare, 1, context, new) for _ in names]
        seconds = time_rounds(runs, self.rounds)
        return _report({"case": {"batch": 8, "context": context, "new": new}, "times": summarize(seconds, "mixed")})


def _report(result: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="short")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "threads": arguments.threads,
        "setting": SETTINGS[arguments.setting],
        "versions": list_versions(),
        "dtypes": {},
    }
    for dtype in arguments.dtypes:
        base, _ = load_base_model("smollm2-wheel", dtype=dtype)
        report["dtypes"][dtype] = Measurement(base, SETTINGS[arguments.setting]).run()
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
