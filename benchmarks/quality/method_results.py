"""The runs of a results file by method, with the chosen learning rate."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.quality.results_file import BASE_MODEL, Run, choose_learning_rate, list_current_runs
from benchmarks.quality.segment_scores import SCORES, Records

DEV = "dev"


@dataclass
class MethodResults:
    """What is known of a method.

    Attributes:
        name (`str`): as the experiment calls it.
        peft_type (`str`, *optional*): `None` for the base model.
        learning_rate (`float`, *optional*): the chosen one.
        runs (`list[Run]`): those with the chosen rate that did not diverge, one per seed.
        first_seed_runs (`list[Run]`): those of the first seed, one per learning rate.
        diverged (`int`): how many runs diverged, with any rate.
    """

    name: str
    peft_type: str | None
    learning_rate: float | None
    runs: list[Run]
    first_seed_runs: list[Run]
    diverged: int = 0

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained; the mean over seeds whose prefixes differ in length."""
        return round(self.average(lambda run: run["trainable_parameters"]))

    @property
    def evaluations(self) -> list[str]:
        """The sets that every run of the chosen rate was evaluated on."""
        return [name for name in self.runs[0]["scores"] if all(name in run["scores"] for run in self.runs)]

    @property
    def rate_is_at_an_end(self) -> bool:
        """Whether a lower or a higher rate than those tried may be better; a single one was not chosen."""
        rates = [run["learning_rate"] for run in self.first_seed_runs]
        return len(rates) > 1 and self.learning_rate in (min(rates), max(rates))

    def list_scores(self, evaluation: str) -> list[str]:
        """Names of the scores on a set, in the order of `SCORES`."""
        return [name for name in SCORES if name in self.runs[0]["scores"][evaluation]]

    def get_scores(self, evaluation: str, score: str) -> list[float]:
        """One value per seed."""
        return [run["scores"][evaluation][score] for run in self.runs]

    def get_records(self, evaluation: str) -> list[Records]:
        """The records of each seed."""
        return [run["records"][evaluation] for run in self.runs]

    def average(self, get: Callable[[Run], float]) -> float:
        """Mean of a quantity of the runs."""
        return mean(get(run) for run in self.runs)


def collect_results(report: dict[str, Any]) -> list[MethodResults]:
    """Sort the runs of a results file.

    Args:
        report (`dict`): what `run.py` wrote.

    Returns:
        `list[MethodResults]`: the base model, then the methods in the order of the experiment; those without a run
        that did not diverge are left out.
    """
    experiment, runs = report["experiment"], report["runs"]
    base_runs = [run for run in runs if run["method"] == BASE_MODEL]
    results = [MethodResults(BASE_MODEL, None, None, base_runs, [])]
    for name, method in experiment["methods"].items():
        own = list_current_runs(runs, name, method)
        rate = choose_learning_rate(own, name, experiment["seeds"][0])
        chosen = [run for run in own if run["learning_rate"] == rate and not run["diverged"]]
        first = [run for run in own if run["seed"] == experiment["seeds"][0]]
        diverged = sum(run["diverged"] for run in own)
        results.append(MethodResults(name, method["peft_type"], rate, chosen, first, diverged))
    return [own for own in results if own.runs]


def list_diverged(report: dict[str, Any]) -> list[str]:
    """Sentences' worth of what diverged: the method, the rate and the seed of each such run."""
    return [
        f"{run['method']} at {run['learning_rate']:g} (seed {run['seed']})"
        for run in report["runs"]
        if run["diverged"]
    ]


def find_best(results: list[MethodResults], peft_types: Container[str]) -> MethodResults | None:
    """The method of some types with the least mean loss on the set `dev`."""
    own = [result for result in results if result.peft_type in peft_types]
    return min(own, key=lambda result: mean(result.get_scores(DEV, "loss")), default=None)
