"""Measures speed and memory of a base model with the adapters of several methods, in interleaved rounds.

    python benchmarks/performance/measure.py --setting short --output benchmarks/performance/short.json

A round runs every rival once, in an order that changes from round to round; what is reported are the medians of the
ratios to the base model within a round, so slow phases of the machine hit all rivals alike.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from rivals import BARE, build_prefix, build_rivals
from torch import nn

import peft_prefix_plus
from peft_prefix_plus.base_models import load_base_model

SETTINGS: dict[str, dict[str, Any]] = {
    # About 12 minutes on two cores.
    "short": {
        "rounds": 5,
        "steps": [{"batch": 4, "length": 96}, {"batch": 4, "length": 96, "checkpointing": True}],
        "generation": [{"batch": 4, "context": 256, "new": 32}, {"batch": 1, "context": 64, "new": 32}],
    },
    "full": {
        "rounds": 7,
        "steps": [
            {"batch": batch, "length": length, "checkpointing": checkpointing}
            for batch, length in ((1, 64), (1, 256), (1, 1024), (8, 64), (8, 256))
            for checkpointing in (False, True)
        ],
        "generation": [
            {"batch": batch, "context": context, "new": 32} for batch in (1, 4, 16) for context in (64, 256, 1024)
        ],
    },
}


def draw_ids(batch: int, length: int) -> torch.Tensor:
    """Random tokens, the same ones every time."""
    return torch.randint(5, 40000, (batch, length), generator=torch.Generator().manual_seed(0))


def train_step(model: nn.Module, batch: int, length: int, checkpointing: bool = False) -> None:
    """Forward and backward; of the base model, down to the input of its first layer."""
    ids = draw_ids(batch, length)
    model.train()
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
    model.zero_grad(set_to_none=True)


def count_saved_bytes(model: nn.Module, **step: Any) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train_step(model, **step)
    return sum(kept.values())


@torch.no_grad()
def generate(model: nn.Module, batch: int, context: int, new: int) -> None:
    """Greedy generation of a fixed number of tokens."""
    ids = draw_ids(batch, context)
    model.eval()
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


def time_rounds(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            gc.collect()
            start = time.perf_counter()
            runs[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: dict[str, list[float]], base: str = BARE) -> dict[str, dict[str, float]]:
    """Median seconds, and the median and the quartiles of the ratio to a base within a round."""
    summary = {}
    for name, own in seconds.items():
        ratios = sorted(mine / other for mine, other in zip(own, seconds[base], strict=True))
        lower, _, upper = statistics.quantiles(ratios, n=4)
        summary[name] = {
            "seconds": round(statistics.median(own), 4),
            "ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(lower, 4), round(upper, 4)],
        }
    return summary


def measure_methods(models: dict[str, nn.Module], setting: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Training steps with what they keep in memory, and generation."""
    results: dict[str, list[dict[str, Any]]] = {"steps": [], "generation": []}
    for step in setting["steps"]:
        usable = {
            name: model
            for name, model in models.items()
            if not (step.get("checkpointing") and name == "PREFIX_TUNING")
        }
        runs = {name: partial(train_step, model, **step) for name, model in usable.items()}
        saved = {name: count_saved_bytes(model, **step) for name, model in usable.items()}
        results["steps"].append(
            step | {"times": summarize(time_rounds(runs, setting["rounds"])), "saved_bytes": saved}
        )
        print(json.dumps(results["steps"][-1]), flush=True)
    for case in setting["generation"]:
        runs = {name: partial(generate, model, **case) for name, model in models.items()}
        results["generation"].append(case | {"times": summarize(time_rounds(runs, setting["rounds"]))})
        print(json.dumps(results["generation"][-1]), flush=True)
    return results


def measure_mixed_batch(model: nn.Module, rounds: int) -> dict[str, Any]:
    """One pass over rows with eight adapters against eight passes of one row."""
    names = [f"adapter{number}" for number in range(8)]
    for number, name in enumerate(names):
        model.add_adapter(name, build_prefix("none", 16 + number))
    model.eval()
    ids = draw_ids(len(names), 64)
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}

    def mixed() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **settings)

    def alone() -> None:
        for row, name in enumerate(names):
            model.set_adapter(name)
            row_ids = ids[row : row + 1]
            model.generate(input_ids=row_ids, attention_mask=torch.ones_like(row_ids), **settings)

    seconds = time_rounds({"eight passes": alone, "mixed": mixed}, rounds)
    return {"batch": 8, "context": 64, "new": 16, "times": summarize(seconds, base="mixed")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="short")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = SETTINGS[arguments.setting]
    modules = (torch, transformers, peft, accelerate, peft_prefix_plus)
    report: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "threads": arguments.threads,
        "setting": setting,
        "versions": {module.__name__: module.__version__ for module in modules}
        | {"python": platform.python_version()},
        "dtypes": {},
    }
    for dtype in arguments.dtypes:
        base, _ = load_base_model("smollm2-wheel", dtype=dtype)
        models = build_rivals(base)
        results: dict[str, Any] = measure_methods(models, setting)
        results["mixed_batch"] = measure_mixed_batch(models["PrefixPlus flat"], setting["rounds"])
        report["dtypes"][dtype] = results
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
