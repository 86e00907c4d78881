"""Runs an experiment file: every method with every learning rate on one seed, then its best rate on the other seeds.

    python benchmarks/run.py benchmarks/experiments/e2e.json --data DIR

`DIR` holds the data sets (`e2e/train.jsonl`, ...). Every finished run is written to `benchmarks/results/` at once;
runs that are already there are not repeated.
"""

import argparse
import json
import math
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from methods import build_method, remove_method
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

import peft_prefix_plus
from peft_prefix_plus.base_models import load_base_model
from peft_prefix_plus.evaluation import compute_loss, evaluate_model
from peft_prefix_plus.examples import load_examples, tokenize_examples

RESULTS = Path(__file__).parent / "results"
VERSIONS = {
    module.__name__: module.__version__ for module in (torch, transformers, peft, accelerate, peft_prefix_plus)
} | {"python": platform.python_version()}


class Benchmark:
    """One experiment file with its data, its base model and its results.

    Args:
        path (`Path`): the experiment file.
        data (`Path`): directory of the data sets.
    """

    def __init__(self, path: Path, data: Path) -> None:
        self.experiment = json.loads(path.read_text())
        self.results_path = RESULTS / path.name
        self.runs: list[dict[str, Any]] = []
        if self.results_path.exists():
            self.runs = json.loads(self.results_path.read_text())["runs"]
        task = self.experiment["task"]
        self.model, self.tokenizer = load_base_model(self.experiment["model"], dtype=self.experiment["dtype"])
        self.train = load_examples(str(data / task["train"]), self.tokenizer)
        self.evaluation = load_examples(str(data / task["evaluation"]), self.tokenizer, limit=task.get("limit"))

    def run(self, names: list[str] | None) -> None:
        """Run what is missing; only the methods of those names, if any are given."""
        if not any(run["method"] == "base model" for run in self.runs):
            self._add(self._measure_base_model())
        seeds = self.experiment["seeds"]
        for method in self.experiment["methods"]:
            if names and method["name"] not in names:
                continue
            for learning_rate in method["learning_rates"]:
                self._run_once(method, learning_rate, seeds[0])
            for seed in seeds[1:]:
                self._run_once(method, self._choose_learning_rate(method), seed)

    def _choose_learning_rate(self, method: dict[str, Any]) -> float:
        """The rate with the least evaluation loss on the first seed."""
        first = [
            run for run in self.runs if run["method"] == method["name"] and run["seed"] == self.experiment["seeds"][0]
        ]
        best: float = min(first, key=lambda run: run["loss"])["learning_rate"]
        return best

    def _run_once(self, method: dict[str, Any], learning_rate: float, seed: int) -> None:
        key = {"method": method["name"], "learning_rate": learning_rate, "seed": seed}
        if any(key.items() <= run.items() for run in self.runs):
            return
        print(f"--- {key}", flush=True)
        set_seed(seed)
        model = build_method(
            method["peft_type"], method["config"], self.model, self.tokenizer, self.experiment["task"]["init_text"]
        )
        trainable, _ = model.get_nb_trainable_parameters()
        initial_loss = compute_loss(model, self.tokenizer, self.evaluation[:20])
        seconds, train_loss = self._train(model, learning_rate, seed, method.get("training", {}))
        scores, texts = evaluate_model(model, self.tokenizer, self.evaluation, **self.experiment["generation"])
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        self.model = remove_method(model)
        self._add(
            key
            | {"peft_type": method["peft_type"], "config": method["config"], "trainable_parameters": trainable}
            | {"adapter_bytes": size, "train_seconds": seconds, "train_loss": train_loss}
            | {"initial_loss_20_examples": initial_loss}
            | scores
            | {"samples": texts[:3], "versions": VERSIONS}
        )

    def _train(
        self, model: peft.PeftModel, learning_rate: float, seed: int, own: dict[str, Any]
    ) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                output_dir=directory,
                learning_rate=learning_rate,
                seed=seed,
                report_to="none",
                save_strategy="no",
                logging_steps=20,
                **(self.experiment["training"] | own),
            )
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=tokenize_examples(self.train, self.tokenizer),
                data_collator=DataCollatorForSeq2Seq(self.tokenizer),
            )
            start = time.perf_counter()
            output = trainer.train()
            return time.perf_counter() - start, output.training_loss

    def _measure_base_model(self) -> dict[str, Any]:
        scores, _ = evaluate_model(self.model, self.tokenizer, self.evaluation, **self.experiment["generation"])
        return {"method": "base model", "learning_rate": None, "seed": None, "trainable_parameters": 0} | scores

    def _add(self, run: dict[str, Any]) -> None:
        if not math.isfinite(run["loss"]):
            run["loss"] = run["perplexity"] = 1e9
        run["peak_memory_mib_of_process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self.runs.append(run)
        print({name: run[name] for name in ("method", "learning_rate", "seed", "loss", "bleu")}, flush=True)
        self.results_path.parent.mkdir(exist_ok=True)
        report = {"experiment": self.experiment, "runs": self.runs}
        self.results_path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", type=Path, help="an experiment file")
    parser.add_argument("--data", type=Path, required=True, help="directory of the data sets")
    parser.add_argument("--only", nargs="*", help="names of methods")
    arguments = parser.parse_args()
    Benchmark(arguments.experiment, arguments.data).run(arguments.only)


if __name__ == "__main__":
    main()
