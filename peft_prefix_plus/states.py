"""The keys and values that travel from a layer to its attention function."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class PrefixStates(NamedTuple):
    """Keys and values of `P` virtual tokens for one attention module.

    Attributes:
        keys (`torch.Tensor`): `[batch, kv_heads, P, key_dim]`; `batch` is 1 when all rows share the prefix.
        values (`torch.Tensor`): `[batch, kv_heads, P, value_dim]`, the same `batch`.
        mask (`torch.Tensor`, *optional*): bool `[batch, P]`, `True` where the virtual token is visible; its `batch`
            may differ from that of the keys if one of them is 1. `None`: all are visible.
        bias (`torch.Tensor`, *optional*): added to the scores of the virtual tokens, `[batch or 1, heads, 1, P]`.
        joined (`tuple[torch.Tensor, torch.Tensor]`, *optional*): keys and values of the prefix and of the tokens
            behind it, `[batch, kv_heads, P + tokens, dim]`, where a cache has them in one piece.
        matched (`dict`, *optional*): the same prefix as it was matched to tokens before, where it serves many calls.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    joined: tuple[Tensor, Tensor] | None = None
    matched: dict[Any, "PrefixStates"] | None = None

    @property
    def num_virtual_tokens(self) -> int:
        return self.keys.shape[-2]


def concatenate_states(states: Sequence[PrefixStates]) -> PrefixStates:
    """Put several prefixes behind each other, in the order given.

    Args:
        states (`Sequence[PrefixStates]`): at least one; equal heads and dimensions, any lengths.

    Returns:
        `PrefixStates`: one prefix whose length is the sum of theirs.
    """
    if len(states) == 1:
        return states[0]
    keys = _concatenate([state.keys for state in states], dim=-2)
    values = _concatenate([state.values for state in states], dim=-2)
    if all(state.mask is None for state in states):
        return PrefixStates(keys, values)
    masks = [state.mask if state.mask is not None else _all_visible(state) for state in states]
    return PrefixStates(keys, values, _concatenate(masks, dim=-1))


class RowSelection(NamedTuple):
    """Which of several prefixes each row of a batch gets.

    Attributes:
        indices (`torch.Tensor`): int `[batch]`; -1 for a row without a prefix.
        is_complete (`bool`): whether every row has one.
    """

    indices: Tensor
    is_complete: bool


def select_rows(states: Sequence[PrefixStates], selection: RowSelection) -> PrefixStates:
    """Give every row of a batch a prefix of its own.

    Shorter prefixes are filled up with hidden virtual tokens in front, so that all of them end right before the text.

    Args:
        states (`Sequence[PrefixStates]`): at least one, of batch 1; equal heads and dimensions, any lengths.
        selection ([`RowSelection`]): which of them each row gets.

    Returns:
        `PrefixStates`: `[batch, kv_heads, longest P, dim]`; its mask hides what was filled up.
    """
    lengths = [state.num_virtual_tokens for state in states]
    longest, index = max(lengths), selection.indices.clamp(min=0)
    keys = torch.cat([_fill_up(state.keys, longest) for state in states]).index_select(0, index)
    values = torch.cat([_fill_up(state.values, longest) for state in states]).index_select(0, index)
    if selection.is_complete and min(lengths) == longest and all(state.mask is None for state in states):
        return PrefixStates(keys, values)
    masks = [state.mask if state.mask is not None else _all_visible(state) for state in states]
    filled = [nn.functional.pad(mask, (longest - mask.shape[-1], 0)) for mask in masks]
    mask = torch.cat(filled).index_select(0, index)
    return PrefixStates(keys, values, mask & (selection.indices >= 0)[:, None])


def _fill_up(tensor: Tensor, length: int) -> Tensor:
    return nn.functional.pad(tensor, (0, 0, length - tensor.shape[-2], 0))


def _concatenate(tensors: list[Tensor], dim: int) -> Tensor:
    """Concatenate along `dim` after bringing the batch axis of all tensors to the same size."""
    batch = max(tensor.shape[0] for tensor in tensors)
    return torch.cat([tensor.expand(batch, *tensor.shape[1:]) for tensor in tensors], dim=dim)


def _all_visible(state: PrefixStates) -> Tensor:
    return torch.ones(1, state.num_virtual_tokens, dtype=torch.bool, device=state.keys.device)
