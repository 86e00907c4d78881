"""Rows of embeddings that are trained beside a prefix: `trainable_token_indices`."""

from collections.abc import Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from .architectures import find_position_tables, find_token_embeddings, read_table_shape
from .config import PrefixPlusConfig


def find_token_rows(config: PrefixPlusConfig, model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Find the tables that `trainable_token_indices` means in a model, by PEFT's rule: names that end so.

    Args:
        config ([`PrefixPlusConfig`]): the configuration.
        model (`PreTrainedModel`): the base model, with or without other adapters.

    Returns:
        `dict[str, tuple[int, int]]`: for each table the shape of the rows that are trained.

    Raises:
        ValueError: if there is no such table, or it has no such row, is trained as a whole, or holds the positions in
            which the prefix moves the input; or if there are no indices, but another adapter has some.
    """
    indices = config.trainable_token_indices
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    if indices is None:
        _refuse_rows_of_others(wrappers)
        return {}
    inside = tuple(f"{name}." for name in wrappers)
    tables = {name: _unwrap(module) for name, module in model.named_modules() if not name.startswith(inside)}
    if isinstance(indices, list):
        embeddings = find_token_embeddings(model)
        chosen = {name: indices for name, table in tables.items() if table is _unwrap(embeddings)}
    else:
        chosen = {name: rows for key, rows in indices.items() for name in tables if name.endswith(key)}
    numbering = find_position_tables(model) if config.initializes_from_tokens else {}
    shapes = {}
    for name, rows in chosen.items():
        if name in numbering:
            raise ValueError(
                f"`trainable_token_indices` means {name}, which numbers the input behind a prefix made from tokens. "
                "Leave it out, or use `prefix_init='random'`."
            )
        shape = read_table_shape(tables[name])
        if shape is None or (rows and max(rows) >= shape[0]):
            raise ValueError(
                f"`trainable_token_indices` has {rows!r:.200} for {name}, which has "
                + ("no rows." if shape is None else f"the rows 0 to {shape[0] - 1}.")
            )
        if isinstance(wrappers.get(name), ModulesToSaveWrapper) or name.endswith(tuple(config.modules_to_save or ())):
            raise ValueError(
                f"`trainable_token_indices` names rows of {name}, which is trained as a whole (`modules_to_save`), by "
                "this adapter or by another of the model. Leave one of the two out."
            )
        shapes[name] = (len(rows), shape[1])
    if not shapes:
        raise ValueError(f"`trainable_token_indices` {indices!r:.200} matches no table of embeddings of the model.")
    return shapes


def _refuse_rows_of_others(wrappers: Mapping[str, nn.Module]) -> None:
    """PEFT asks such a wrapper for the rows of every adapter, when it saves one and when it loads one."""
    for name, wrapper in wrappers.items():
        if isinstance(wrapper, TrainableTokensWrapper):
            adapters = ", ".join(map(repr, sorted(wrapper._get_available_adapters())))
            raise ValueError(
                f"The adapter {adapters} of the model trains rows of {name} (`trainable_token_indices`), and PEFT "
                "neither saves nor loads an adapter without such rows beside it. Give the prefix rows of its own, or "
                "use a model without that adapter."
            )


def _unwrap(module: Any) -> Any:
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
