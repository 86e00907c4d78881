"""Runs an experiment file: every method with every learning rate on one seed, then its best rate on the other seeds.

    python -m benchmarks.quality.run benchmarks/quality/experiments/e2e.json --data DIR

`DIR` holds the data sets (`e2e/train.jsonl`, ...). Every finished run is written to `results/` at once; runs
that are already there are not repeated. Several processes may work on one experiment, each with its own `--only`.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.environment import list_versions
from benchmarks.half_precision import multiply_in_float32
from benchmarks.quality.experiment_files import load_experiment
from benchmarks.quality.method_results import DEV
from benchmarks.quality.methods import AppliedMethod, remove_method
from benchmarks.quality.results_file import BASE_MODEL, ResultsFile, Run, choose_learning_rate, list_current_runs
from benchmarks.quality.tasks import build_task
from benchmarks.quality.trial import build_trial, evaluate

RESULTS = Path(__file__).parent / "results"


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
        for name in names or self.experiment["methods"]:
            with tempfile.TemporaryDirectory() as directory:
                self._run_method(name, Path(directory))
        # Last, as processes that start together would all measure it.
        self._measure_base_model()

    def _run_method(self, name: str, directory: Path) -> None:
        """Choose the rate by the set `dev` alone; the other sets are for the chosen rate only."""
        first_seed, *other_seeds = self.experiment["seeds"]
        method = self.experiment["methods"][name]
        for learning_rate in method["learning_rates"]:
            self._run_once(name, learning_rate, first_seed, [DEV], directory)
        chosen = choose_learning_rate(list_current_runs(self.results.runs, name, method), name, first_seed)
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
        trial = build_trial(self.experiment, self.task, name, learning_rate, seed)
        kept = directory / f"{learning_rate:g}-{seed}.pt"
        if done is not None and kept.exists():
            trial.applied.load_trainable(kept)
        else:
            trained = trial.train(self.experiment["training"])
            # If an earlier call has trained this run, its measurements stay.
            done = done or {"method": name, "learning_rate": learning_rate, "seed": seed, **trained}
            if evaluations != self._evaluations:
                trial.applied.save_trainable(kept)
        run = done | evaluate(trial.applied, trial.task, missing)
        remove_method(trial.applied)
        self._add(run)

    def _measure_base_model(self) -> None:
        run = {"method": BASE_MODEL, "learning_rate": None, "seed": None, "trainable_parameters": 0}
        done = self.results.find(BASE_MODEL, None, None) or {"scores": {}}
        missing = [name for name in self._evaluations if name not in done["scores"]]
        if missing:
            base = AppliedMethod(self.task.model, self.task.model)
            self._add(run | {"versions": list_versions()} | evaluate(base, self.task, missing))

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
    multiply_in_float32()
    Benchmark(arguments.experiment, arguments.data, arguments.results).run(arguments.only)


if __name__ == "__main__":
    main()
