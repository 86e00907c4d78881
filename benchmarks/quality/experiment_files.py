"""Reads experiment files. One may extend another and say only what differs."""

import json
from pathlib import Path
from typing import Any

FIELDS = {"name", "model", "dtype", "task", "training", "generation", "seeds", "methods"}
OPTIONAL_FIELDS = {"generation"}
TASK_FIELDS = {"kind", "train", "train_limit", "evaluations", "init_text", "prompt_template", "exact_match"}
METHOD_FIELDS = {"peft_type", "config", "prompt", "learning_rates", "training"}
EVALUATION_FIELDS = {"path", "limit"}


def load_experiment(path: Path) -> dict[str, Any]:
    """Read an experiment file.

    With `"extends": "other.json"` it is the file of that name beside it, changed by what this one says: objects are
    merged, `null` removes a field, anything else replaces what was there. `"only": [names]` leaves out all methods
    but those.

    Args:
        path (`Path`): a JSON file.

    Returns:
        `dict[str, Any]`: the complete experiment, without `extends` and `only`.

    Raises:
        ValueError: if a field is missing or unknown, or `only` names a method that there is not.
    """
    experiment = _read(path)
    _check_fields(path, "the experiment", experiment, FIELDS, required=FIELDS - OPTIONAL_FIELDS)
    task = experiment["task"]
    _check_fields(path, "the task", task, TASK_FIELDS, required={"train", "evaluations"})
    if "dev" not in task["evaluations"]:
        raise ValueError(f"{path}: `evaluations` needs a set named 'dev', which chooses the learning rates.")
    for name, evaluation in task["evaluations"].items():
        _check_fields(path, f"the evaluation {name!r}", evaluation, EVALUATION_FIELDS, required={"path"})
    for name, method in experiment["methods"].items():
        required = {"peft_type", "config", "learning_rates"}
        _check_fields(path, f"the method {name!r}", method, METHOD_FIELDS, required)
        if not method["learning_rates"]:
            raise ValueError(f"{path}: the method {name!r} needs at least one learning rate.")
    if not experiment["seeds"]:
        raise ValueError(f"{path}: `seeds` needs at least one seed.")
    return experiment


def merge_settings(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes; neither is altered."""
    merged = dict(settings)
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = merge_settings(merged[name], value)
        else:
            merged[name] = value
    return merged


def _read(path: Path) -> dict[str, Any]:
    own: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    extended, only = own.pop("extends", None), own.pop("only", None)
    experiment = own if extended is None else merge_settings(_read(path.with_name(extended)), own)
    if only is not None:
        methods = experiment["methods"]
        unknown = sorted(set(only) - set(methods))
        if unknown:
            raise ValueError(f"{path}: `only` has {unknown}; the methods are {list(methods)}.")
        experiment["methods"] = {name: methods[name] for name in only}
    return experiment


def _check_fields(path: Path, what: str, given: dict[str, Any], known: set[str], required: set[str]) -> None:
    unknown, missing = sorted(set(given) - known), sorted(required - set(given))
    if unknown or missing:
        raise ValueError(
            f"{path}: {what} has unknown fields {unknown} and lacks {missing}. Known are {sorted(known)}."
        )
