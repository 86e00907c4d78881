"""Asks attention modules for their shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .devices import find_device
from .modules import uses_attention_interface

_NUM_HEADS_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_attn_heads")


_KEY_DIM_NAMES = (
    "qk_head_dim",
    "head_dim",
    "head_size",
    "attention_head_size",
    "dim_head",
    "key_dim",
    "qk_channels_per_head",
    "d_head",
    "d_kv",
    "key_value_proj_dim",
)


_HIDDEN_SIZE_NAMES = ("embed_dim", "hidden_size", "d_model", "n_embd", "split_size", "dim")


# What the attributes of some classes do not say. Heads of the keys that reach the attention function:
_KEY_VALUE_HEADS: dict[str, Callable[[Any], int]] = {
    "DeepseekV4Attention": lambda module: 1,
    # Grouped keys and values have been repeated by then.
    "FalconAttention": lambda module: module.num_heads if module.new_decoder_architecture else module.num_kv_heads,
    "JetMoeAttention": lambda module: module.num_key_value_heads * module.top_k,
}


# Size of one head's value:
_VALUE_DIMS: dict[str, Callable[[Any], int]] = {
    "LevitAttention": lambda module: module.attention_ratio * module.key_dim,
    "LevitAttentionSubsample": lambda module: module.attention_ratio * module.key_dim,
}


# Calls of the attention function in one forward, each with other values:
_ATTENTION_CALLS = {"DiffLlamaAttention": 2}


# The axis of the batch in the hidden states:
_BATCH_AXIS = {"XLNetRelativeAttention": 1}


@dataclass(frozen=True)
class AttentionGeometry:
    """Shapes of the keys and values that an attention module hands to its attention function.

    Attributes:
        num_key_value_heads (`int`): heads of keys and values, before they are repeated for grouped queries.
        key_dim (`int`): size of one head's key.
        value_dim (`int`): size of one head's value.
        device (`torch.device`): where the module computes.
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
    owners = (module, getattr(module, "config", None))
    num_heads = _first_attribute(owners, _NUM_HEADS_NAMES)
    key_dim = _first_attribute(owners, _KEY_DIM_NAMES)
    if key_dim is None and num_heads:
        hidden_size = _first_attribute(owners, _HIDDEN_SIZE_NAMES)
        key_dim = hidden_size // num_heads if hidden_size else None
    num_key_value_heads = _first_attribute((module,), ("num_key_value_heads", "num_kv_heads", "kv_heads"))
    key_projection: Any = getattr(module, "k_proj", None)
    if num_key_value_heads is None and key_dim and hasattr(key_projection, "out_features"):
        num_key_value_heads = key_projection.out_features // key_dim
    if num_key_value_heads is None and uses_attention_interface(module):
        num_key_value_heads = _first_attribute(owners[1:], ("num_key_value_heads",))
    num_key_value_heads = num_key_value_heads or num_heads
    if not num_key_value_heads or not key_dim:
        raise ValueError(
            f"Cannot find the number of key/value heads and their size for {type(module).__name__}: looked for "
            "`num_key_value_heads`, `num_attention_heads` and `head_dim` on the module and its config. Exclude the "
            "module with `exclude_modules`, or report the architecture."
        )
    value_dim = _first_attribute((module,), ("v_head_dim", "head_v_dim", "v_channels_per_head")) or key_dim
    name = type(module).__name__
    if name in _KEY_VALUE_HEADS:
        num_key_value_heads = _KEY_VALUE_HEADS[name](module)
    if name in _VALUE_DIMS:
        value_dim = _VALUE_DIMS[name](module)
    num_key_value_heads *= count_attention_calls(module)
    return AttentionGeometry(num_key_value_heads, key_dim, value_dim, find_device(module))


def _first_attribute(owners: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def count_attention_calls(module: nn.Module) -> int:
    """How often a module calls its attention function in one forward, each time with other keys or values."""
    return _ATTENTION_CALLS.get(type(module).__name__, 1)


def find_cache_index(module: nn.Module) -> int | None:
    """The place of an attention module's keys and values in the cache of its model, if it keeps any."""
    return getattr(module, "layer_idx", None)


def read_batch_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Read the batch size of a forward of an attention module from its arguments."""
    hidden_states: Tensor = args[0] if args else next(item for item in kwargs.values() if isinstance(item, Tensor))
    if hidden_states.dim() < 3:
        # The texts or images stand one behind the other.
        return 1
    return hidden_states.shape[_BATCH_AXIS.get(type(module).__name__, 0)]


def compute_key_bias(module: Any, values: Tensor) -> Tensor | None:
    """Compute what an attention module adds to the scores of a key because of its value, as Doge does.

    Args:
        module (`nn.Module`): an attention module.
        values (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.

    Returns:
        `torch.Tensor`, *optional*: `[batch, heads, 1, tokens]`; `None` for all other architectures.
    """
    # Takes half as long as `hasattr`, and every attention asks.
    if getattr(type(module), "prepare_dynamic_mask", None) is None:
        return None
    steps = module.dt_proj(values.transpose(1, 2).flatten(2))
    bias = torch.exp(module.A * nn.functional.softplus(steps)).transpose(-1, -2)
    return bias.repeat_interleave(module.num_key_value_groups, dim=1)[:, :, None, :]
