"""The results of an experiment, which several processes may add to at the same time."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Run = dict[str, Any]
KEY = ("method", "learning_rate", "seed")
SETTING = ("peft_type", "config", "prompt", "training")
BASE_MODEL = "base model"


class ResultsFile:
    """A results file: the experiment, and its runs in the order in which they ended.

    Args:
        path (`Path`): a JSON file; it need not exist.
        experiment (`dict`): the experiment as its file says now.

    Raises:
        ValueError: if the file has runs of another experiment. Methods and seeds may differ, and evaluation sets
            may be new.
    """

    def __init__(self, path: Path, experiment: dict[str, Any]) -> None:
        self.path = path
        self.experiment = experiment
        self._read()

    @property
    def runs(self) -> list[Run]:
        """Runs of the methods as the experiment describes them now."""
        return [run for run in self._read() if self._is_current(run)]

    def find(self, method: str, learning_rate: float | None, seed: int | None) -> Run | None:
        """The run with this key, if there is one."""
        key = (method, learning_rate, seed)
        return next((run for run in self.runs if _get_key(run) == key), None)

    def add(self, run: Run) -> None:
        """Add a run, or the evaluations of a run that is there already."""
        with self._locked():
            runs = self._read()
            same = next((other for other in runs if _get_key(other) == _get_key(run)), None)
            if same is None:
                runs.append(run)
            elif self._is_current(same):
                runs[runs.index(same)] = _join(same, run)
            else:
                runs[runs.index(same)] = run
            self._write(runs)

    def _read(self) -> list[Run]:
        if not self.path.exists():
            return []
        report = json.loads(self.path.read_text(encoding="utf-8"))
        different = _list_differences(report["experiment"], self.experiment)
        if different:
            raise ValueError(
                f"{self.path} has runs of another experiment: {', '.join(different)} differ. Delete the file to "
                "measure again, or give the experiment file another name."
            )
        runs: list[Run] = report["runs"]
        return runs

    def _write(self, runs: Sequence[Run]) -> None:
        """One line a run. The file is replaced at once, so nobody reads half of it."""
        lines = ",\n".join(json.dumps(run, ensure_ascii=False, separators=(",", ":")) for run in runs)
        experiment = json.dumps(self.experiment, ensure_ascii=False, indent=1)
        text = f'{{"experiment": {experiment},\n"runs": [\n{lines}\n]}}\n'
        unfinished = self.path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.path)

    def _is_current(self, run: Run) -> bool:
        if run["method"] == BASE_MODEL:
            return True
        method = self.experiment["methods"].get(run["method"])
        return method is None or has_settings(run, method)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the directory, which stays when the file is replaced, and needs no file for the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def has_settings(run: Run, method: dict[str, Any]) -> bool:
    """Whether a run was made with the settings that a method has now."""
    return all(run.get(name) == method.get(name) for name in SETTING)


def list_current_runs(runs: Sequence[Run], name: str, method: dict[str, Any]) -> list[Run]:
    """The runs of a method with its present settings and rates; earlier rates would be more than the others have."""
    own = [run for run in runs if run["method"] == name and has_settings(run, method)]
    return [run for run in own if run["learning_rate"] in method["learning_rates"]]


def choose_learning_rate(runs: Sequence[Run], method: str, first_seed: int) -> float | None:
    """The rate with the least loss on the set `dev` in the runs of the first seed; `None` if all diverged."""
    candidates = [run for run in runs if run["method"] == method and run["seed"] == first_seed and not run["diverged"]]
    if not candidates:
        return None
    best: float = min(candidates, key=lambda run: run["scores"]["dev"]["loss"])["learning_rate"]
    return best


def _get_key(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in KEY)


def _join(run: Run, other: Run) -> Run:
    """A run with the evaluations of both."""
    return {**run, **{name: {**run[name], **other[name]} for name in ("scores", "records")}}


def _list_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of what all runs have in common, and is not the same."""
    settings = []
    for experiment in (before, now):
        own = {name: value for name, value in experiment.items() if name not in ("name", "task", "methods", "seeds")}
        task = {f"task.{name}": value for name, value in experiment["task"].items() if name != "evaluations"}
        settings.append({**own, **task})
    for name in before["task"]["evaluations"].keys() & now["task"]["evaluations"].keys():
        for own, experiment in zip(settings, (before, now), strict=True):
            own[f"task.evaluations.{name}"] = experiment["task"]["evaluations"][name]
    first, second = settings
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
