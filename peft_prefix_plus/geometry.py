"""Asks models about their attention: the only place that looks into architectures."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# What modeling files call their tables of learned absolute positions.
POSITION_TABLE_NAMES = frozenset(
    {"wpe", "embed_positions", "position_embedding", "position_embeddings", "pos_embed", "positions_embed"}
)


@dataclass(frozen=True)
class AttentionGeometry:
    """Shapes of the keys and values that an attention module hands to its attention function.

    Attributes:
        num_key_value_heads (`int`): heads of keys and values, before they are repeated for grouped queries.
        key_dim (`int`): size of one head's key.
        value_dim (`int`): size of one head's value.
        device (`torch.device`): where the module's parameters live.
    """

    num_key_value_heads: int
    key_dim: int
    value_dim: int
    device: torch.device


def read_geometry(module: nn.Module) -> AttentionGeometry:
    """Read the geometry of an attention module from its attributes and its configuration.

    Args:
        module (`nn.Module`): an attention module of transformers.

    Returns:
        [`AttentionGeometry`]

    Raises:
        ValueError: if the number of heads or their size cannot be found.
    """
    config: PreTrainedConfig = module.config
    num_heads = _first_attribute((module, config), ("num_attention_heads", "num_heads", "n_head"))
    key_dim = _first_attribute((module, config), ("qk_head_dim", "head_dim", "head_size", "attention_head_size"))
    if key_dim is None and num_heads:
        key_dim = config.hidden_size // num_heads
    num_key_value_heads = _first_attribute((module,), ("num_key_value_heads", "num_kv_heads", "kv_heads"))
    key_projection: Any = getattr(module, "k_proj", None)
    if num_key_value_heads is None and key_dim and key_projection is not None:
        num_key_value_heads = key_projection.out_features // key_dim
    if num_key_value_heads is None:
        num_key_value_heads = _first_attribute((config,), ("num_key_value_heads",)) or num_heads
    if not num_key_value_heads or not key_dim:
        raise ValueError(
            f"Cannot find the number of key/value heads and their size for {type(module).__name__}: looked for "
            "`num_key_value_heads`, `num_attention_heads` and `head_dim` on the module and its config. Exclude the "
            "module with `exclude_modules`, or report the architecture."
        )
    value_dim = _first_attribute((module,), ("v_head_dim",)) or key_dim
    return AttentionGeometry(num_key_value_heads, key_dim, value_dim, next(module.parameters()).device)


def _first_attribute(owners: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


@cache
def find_attention_call(module_class: type[nn.Module]) -> FunctionType | None:
    """Find the method of an attention class that looks its attention function up in `ALL_ATTENTION_FUNCTIONS`.

    Its `__globals__` hold what the lookup uses: the interface and the eager function of that modeling file.

    Args:
        module_class (`type[nn.Module]`): any module class.

    Returns:
        `FunctionType`, *optional*: `None` if the class never asks the interface.
    """
    for owner in module_class.__mro__:
        for attribute in vars(owner).values():
            function = inspect.unwrap(attribute) if inspect.isfunction(attribute) else None
            if isinstance(function, FunctionType) and "ALL_ATTENTION_FUNCTIONS" in function.__code__.co_names:
                return function
    return None


def is_attention_module(module: nn.Module) -> bool:
    """Whether `module` is an attention module whose attention function can be routed."""
    # A `PreTrainedModel` also names the interface, to check implementations, but never calls it.
    return (
        not isinstance(module, PreTrainedModel)
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
        and find_attention_call(type(module)) is not None  # type: ignore[arg-type]
    )


def is_cross_attention(module: nn.Module) -> bool:
    """Whether an attention module reads its keys and values from another model's output."""
    return bool(getattr(module, "is_cross_attention", False))


def iterate_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of the model by the name it has without adapters.

    Args:
        model (`nn.Module`): a model, with or without tuner layers in it.

    Yields:
        `tuple[str, nn.Module]`: the name as in the bare model, and the bare module.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        bare = module
        while isinstance(bare, BaseTunerLayer):
            bare = bare.base_layer
        if id(bare) not in seen:
            seen.add(id(bare))
            yield name.replace(".base_layer", ""), bare


def find_attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find every attention module that can carry a prefix, in the order of the model.

    Args:
        model (`nn.Module`): a transformers model.

    Returns:
        `dict[str, nn.Module]`: bare attention modules by name; cross-attention is not among them.
    """
    return {
        name: module
        for name, module in iterate_base_modules(model)
        if is_attention_module(module) and not is_cross_attention(module)
    }


def find_position_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Find the tables of learned absolute positions; empty for rotary, ALiBi and relative positions.

    Args:
        model (`nn.Module`): a transformers model.

    Returns:
        `dict[str, nn.Embedding]`: bare tables by name.
    """
    return {
        name: module
        for name, module in iterate_base_modules(model)
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLE_NAMES
    }


def uses_sectioned_rotary(model: PreTrainedModel) -> bool:
    """Whether positions have several coordinates (time, height, width), as in some multimodal models."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in rope


def find_first_position(table: nn.Embedding) -> int:
    """The row that a text's first token takes: the RoBERTa family counts from behind the padding's row."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def count_positions(table: nn.Embedding) -> int:
    """How many positions a table holds, without the rows that some architectures reserve."""
    offset = getattr(table, "offset", 0)
    return table.num_embeddings - find_first_position(table) - (offset if isinstance(offset, int) else 0)
