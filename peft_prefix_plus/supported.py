"""Which model types are known to work: what `make matrix` has measured, as data."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

PASS, NOT_APPLICABLE, FAIL = "pass", "n/a", "fail"


@dataclass(frozen=True)
class SupportedModel:
    """A model type and what was checked on a tiny random model of it.

    Attributes:
        group (`str`): `"causal"`, `"seq2seq"`, `"encoder"`, `"multimodal"` or `"vision"`.
        model_type (`str`): the `model_type` of its configuration in transformers.
        outcomes (`dict[str, str]`): by the name of the check, `"pass"`, `"n/a: reason"` or `"fail: reason"`; empty if
            no tiny model of the type can be built.
    """

    group: str
    model_type: str
    outcomes: dict[str, str]

    @property
    def works(self) -> bool:
        """Whether the type takes a prefix, and every check that applies to it holds, that of exactness aside."""
        return self.outcomes.get("forward") == PASS and not any(
            outcome.startswith(FAIL) for name, outcome in self.outcomes.items() if name != "exact"
        )

    @property
    def is_exact(self) -> bool:
        """Whether a prefix initialized from real tokens acts exactly like the tokens as a prompt."""
        return self.works and self.outcomes.get("exact") == PASS


def supported_model_types(group: str | None = None) -> list[SupportedModel]:
    """List the model types that work with PrefixPlus, as measured for `docs/supported_models.md`.

    Args:
        group (`str`, *optional*): only this group: `"causal"`, `"seq2seq"`, `"encoder"`, `"multimodal"` or `"vision"`.

    Returns:
        `list[SupportedModel]`: those that work. A type that is missing has failed a check, has no softmax attention,
        could not be built tiny, or is newer; it may work all the same, and every layer checks that its prefix is used.

    Raises:
        ValueError: if there is no such group.

    Example:

    ```py
    >>> from peft_prefix_plus import supported_model_types
    >>> "llama" in [model.model_type for model in supported_model_types("causal")]
    True
    ```
    """
    models = [
        SupportedModel(row["group"], row["model_type"], row.get("prefix_plus", {})) for row in read_matrix()["models"]
    ]
    groups = sorted({model.group for model in models})
    if group is not None and group not in groups:
        raise ValueError(f"There is no group {group!r}; the groups are {', '.join(groups)}.")
    return [model for model in models if model.works and group in (None, model.group)]


@cache
def read_matrix() -> dict[str, Any]:
    """Read everything that was measured: `versions`, and one entry per type and method under `models`."""
    matrix: dict[str, Any] = json.loads(
        files(__package__).joinpath("supported_models.json").read_text(encoding="utf-8")
    )
    return matrix
