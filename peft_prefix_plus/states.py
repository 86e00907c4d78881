"""The keys and values that travel from a layer to its attention function."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PrefixStates(NamedTuple):
    """Keys and values of `P` virtual tokens for one attention module.

    Attributes:
        keys (`torch.Tensor`): `[batch, kv_heads, P, key_dim]`; `batch` is 1 when all rows share the prefix.
        values (`torch.Tensor`): `[batch, kv_heads, P, value_dim]`, the same `batch`.
        mask (`torch.Tensor`, *optional*): bool `[batch, P]`, `True` where the virtual token is visible; its `batch`
            may differ from that of the keys if one of them is 1. `None`: all are visible.
        bias (`torch.Tensor`, *optional*): added to the scores of the virtual tokens, `[batch or 1, heads, 1, P]`.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None

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


def _concatenate(tensors: list[Tensor], dim: int) -> Tensor:
    """Concatenate along `dim` after bringing the batch axis of all tensors to the same size."""
    batch = max(tensor.shape[0] for tensor in tensors)
    return torch.cat([tensor.expand(batch, *tensor.shape[1:]) for tensor in tensors], dim=dim)


def _all_visible(state: PrefixStates) -> Tensor:
    return torch.ones(1, state.num_virtual_tokens, dtype=torch.bool, device=state.keys.device)
