"""Runs an experiment file: every method with every learning rate on one seed, then its best rate on the other seeds.

    python -m benchmarks.quality.run benchmarks/quality/experiments/e2e.json --data DIR

`DIR` holds the data sets (`e2e/train.jsonl`, ...). Every finished run is written to `results/` at once; runs
that are already there are not repeated. Several processes may work on one experiment, each with its own `--only`.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments, set_seed

from benchmarks.environment import describe_machine, list_versions
from benchmarks.peak_memory import read_peak_memory, reset_peak_memory
from benchmarks.quality.experiment_files import load_experiment
from benchmarks.quality.initial_tokens import write_initial_text
from benchmarks.quality.methods import AppliedMethod, build_method, remove_method
from benchmarks.quality.results_file import BASE_MODEL, SETTING, ResultsFile, Run, choose_learning_rate
from benchmarks.quality.segment_scores import is_finite, score_records
from benchmarks.quality.tasks import Task, build_task

RESULTS = Path(__file__).parent / "results"
DEV = "dev"


class Benchmark:
    """One experiment with its data, its base model and its results.

    Args:
        path (`Path`): the experiment file.
        data (`Path`): directory of the data sets.
        results (`Path`): directory of the results files.
    """

    def __init__(self, path: Path, data: Path, results: Path = RESULTS) -> None:
        self.experiment = load_experiment(path)
        self.results = ResultsFile(results / path.name, self.experiment)
        self.task = build_task(self.experiment, data)
        self._evaluations = list(self.experiment["task"]["evaluations"])

    def run(self, names: list[str] | None = None) -> None:
        """Run what is missing; only the methods of those names, if any are given."""
        unknown = sorted(set(names or ()) - set(self.experiment["methods"]))
        if unknown:
            raise ValueError(f"The experiment has no methods {unknown}; it has {list(self.experiment['methods'])}.")
        self._measure_base_model()
        for name in names or self.experiment["methods"]:
            with tempfile.TemporaryDirectory() as directory:
                self._run_method(name, Path(directory))

    def _run_method(self, name: str, directory: Path) -> None:
        """Choose the rate by the set `dev` alone; the other sets are for the chosen rate only."""
        first_seed, *other_seeds = self.experiment["seeds"]
        for learning_rate in self.experiment["methods"][name]["learning_rates"]:
            self._run_once(name, learning_rate, first_seed, [DEV], directory)
        chosen = choose_learning_rate(self.results.runs, name, first_seed)
        if chosen is None:
            print(f"--- {name}: every learning rate diverged", flush=True)
            return
        for seed in (first_seed, *other_seeds):
            self._run_once(name, chosen, seed, self._evaluations, directory)

    def _run_once(self, name: str, learning_rate: float, seed: int, evaluations: list[str], directory: Path) -> None:
        """Train and evaluate, or evaluate what is missing with the parameters of a run that was trained before."""
        done = self.results.find(name, learning_rate, seed)
        missing = [evaluation for evaluation in evaluations if done is None or evaluation not in done["scores"]]
        if not missing or (done is not None and done["diverged"]):
            return
        print(f"--- {name}, learning rate {learning_rate:g}, seed {seed}: {', '.join(missing)}", flush=True)
        applied, task, examples = self._build(name, seed)
        kept = directory / f"{learning_rate:g}-{seed}.pt"
        if done is not None and kept.exists():
            applied.load_trainable(kept)
        else:
            trained = self._train(applied, task, examples, self.experiment["methods"][name], learning_rate, seed)
            # If an earlier call has trained this run, its measurements stay.
            done = done or {"method": name, "learning_rate": learning_rate, "seed": seed, **trained}
            if evaluations != self._evaluations:
                applied.save_trainable(kept)
        run = done | self._evaluate(applied, task, missing)
        remove_method(applied)
        self._add(run)

    def _build(self, name: str, seed: int) -> tuple[AppliedMethod, Task, list[Any]]:
        """A method with a seed, its task, whose prompts may be its own, and the training set."""
        method, init_text = self.experiment["methods"][name], self.experiment["task"].get("init_text", "")
        examples = self.task.draw_examples(seed)
        # A prefix that starts from examples starts from other ones for every seed.
        start = random.Random(seed).sample(examples, len(examples))
        task = self.task
        if "prompt" in method:
            task = task.prompted(write_initial_text(method["prompt"], task.model, task.tokenizer, init_text, start))
        set_seed(seed)
        applied = build_method(
            method["peft_type"],
            method["config"],
            task.model,
            task.tokenizer,
            init_text,
            start,
            task.task_type,
        )
        return applied, task, examples

    def _train(
        self,
        applied: AppliedMethod,
        task: Task,
        examples: list[Any],
        method: dict[str, Any],
        learning_rate: float,
        seed: int,
    ) -> Run:
        own = method.get("training", {})
        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                output_dir=directory,
                learning_rate=learning_rate,
                seed=seed,
                report_to="none",
                save_strategy="no",
                logging_steps=20,
                disable_tqdm=True,
                **(self.experiment["training"] | own),
            )
            rows = task.tokenize(examples)
            trainer = Trainer(applied.model, arguments, train_dataset=rows, data_collator=task.collator)
            reset_peak_memory()
            start = time.process_time()
            loss = trainer.train().training_loss
            seconds, peak = time.process_time() - start, read_peak_memory()
        return {name: method[name] for name in SETTING if name in method} | {
            "trainable_parameters": applied.count_parameters(),
            "adapter_bytes": applied.measure_bytes(),
            "train_loss": loss if is_finite(loss) else None,
            "train_cpu_seconds": round(seconds, 1),
            "peak_memory_mib": None if peak is None else peak // 2**20,
            "machine": describe_machine(),
            "versions": list_versions(),
        }

    def _evaluate(self, applied: AppliedMethod, task: Task, evaluations: list[str]) -> Run:
        evaluated: Run = {"diverged": False, "scores": {}, "records": {}}
        for name in evaluations:
            records, samples = task.evaluate(applied.model, name)
            if not is_finite(records["loss"]):
                return {"diverged": True, "scores": {}, "records": {}}
            evaluated["scores"][name] = score_records(records)
            evaluated["records"][name] = records
            if name == DEV:
                evaluated["samples"] = samples
        return evaluated

    def _measure_base_model(self) -> None:
        run = {"method": BASE_MODEL, "learning_rate": None, "seed": None, "trainable_parameters": 0}
        done = self.results.find(BASE_MODEL, None, None) or {"scores": {}}
        missing = [name for name in self._evaluations if name not in done["scores"]]
        if missing:
            base = AppliedMethod(self.task.model, self.task.model)
            self._add(run | {"versions": list_versions()} | self._evaluate(base, self.task, missing))

    def _add(self, run: Run) -> None:
        self.results.add(run)
        scores = {
            name: {score: round(value, 3) for score, value in own.items()} for name, own in run["scores"].items()
        }
        print("diverged" if run["diverged"] else scores, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", type=Path, help="an experiment file")
    parser.add_argument("--data", type=Path, required=True, help="directory of the data sets")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results files")
    parser.add_argument("--only", nargs="*", help="names of methods")
    arguments = parser.parse_args()
    Benchmark(arguments.experiment, arguments.data, arguments.results).run(arguments.only)


if __name__ == "__main__":
    main()
