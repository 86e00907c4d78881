"""Pure functions that put a prefix in front of keys, values and masks."""

import torch
from torch import Tensor

from ..states import PrefixStates


def match_prefix(prefix: PrefixStates, key: Tensor, value: Tensor) -> PrefixStates:
    """Bring a prefix to the batch size, dtype and device of the tokens' keys and values.

    Args:
        prefix ([`PrefixStates`]): batch 1 or that of the tokens.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.

    Returns:
        [`PrefixStates`]: with the batch size of `key`; expanded, not copied.

    Raises:
        ValueError: if heads or dimensions differ.
    """
    batch, heads = key.shape[:2]
    expected = (heads, key.shape[-1], value.shape[-1])
    given = (prefix.keys.shape[1], prefix.keys.shape[-1], prefix.values.shape[-1])
    if given != expected:
        raise ValueError(
            f"The prefix has (kv_heads, key_dim, value_dim) = {given}, the attention module's own keys and values "
            f"have {expected}. The adapter belongs to another base model, or the architecture is not supported yet."
        )
    are_alike = _is_alike(prefix.keys, key) and _is_alike(prefix.values, value)
    if are_alike and prefix.keys.shape[0] == batch and prefix.mask is None:
        return prefix
    if prefix.matched is None:
        return _match(prefix, key, value)
    kind = (batch, key.dtype, value.dtype, key.device)
    if kind not in prefix.matched:
        prefix.matched[kind] = _match(prefix, key, value)
    return prefix.matched[kind]


def _match(prefix: PrefixStates, key: Tensor, value: Tensor) -> PrefixStates:
    batch, heads = key.shape[:2]
    num_tokens = prefix.num_virtual_tokens
    keys = prefix.keys.to(device=key.device, dtype=key.dtype).expand(batch, heads, num_tokens, -1)
    values = prefix.values.to(device=value.device, dtype=value.dtype).expand(batch, heads, num_tokens, -1)
    mask = None if prefix.mask is None else prefix.mask.to(key.device).expand(batch, num_tokens)
    return PrefixStates(keys, values, mask, prefix.bias)


def _is_alike(states: Tensor, others: Tensor) -> bool:
    return states.dtype == others.dtype and states.device == others.device


def prepend_prefix(key: Tensor, value: Tensor, prefix: PrefixStates) -> tuple[Tensor, Tensor]:
    """Put the prefix in front of the tokens' own keys and values.

    Args:
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.
        prefix ([`PrefixStates`]): with the same batch, heads, dimensions and dtype.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the same layouts with `P + tokens` on the token axis; not copied where
        they are joined already.
    """
    if prefix.joined is not None and prefix.joined[0].shape[-2] == prefix.num_virtual_tokens + key.shape[-2]:
        return prefix.joined
    return torch.cat([prefix.keys, key], dim=-2), torch.cat([prefix.values, value], dim=-2)


def extend_mask(mask: Tensor | None, prefix: PrefixStates, num_tokens: int, dtype: torch.dtype) -> Tensor | None:
    """Widen an attention mask by columns for the prefix.

    Args:
        mask (`torch.Tensor`, *optional*): `[batch or 1, heads or 1, queries or 1, tokens]`, bool (`True`: visible) or
            additive. `None`: everything is visible.
        prefix ([`PrefixStates`]): its own mask hides virtual tokens per row; without one, all queries see all.
        num_tokens (`int`): keys behind the prefix, for a mask of `None`.
        dtype (`torch.dtype`): of the mask made in place of `None`.

    Returns:
        `torch.Tensor`, *optional*: `[..., P + tokens]`; `None` if nothing is hidden.
    """
    if mask is None:
        if prefix.mask is None and prefix.bias is None:
            return None
        mask = torch.zeros(1, 1, 1, num_tokens, dtype=dtype, device=prefix.keys.device)
    if prefix.bias is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    visible, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    columns = mask.new_full((1, 1, 1, prefix.num_virtual_tokens), visible)
    if prefix.bias is not None:
        columns = columns + prefix.bias.to(mask.dtype)
    if prefix.mask is not None:
        columns = columns.masked_fill(~prefix.mask[:, None, None, :], hidden)
    batch, heads = max(mask.shape[0], columns.shape[0]), max(mask.shape[1], columns.shape[1])
    columns = columns.expand(batch, heads, mask.shape[2], -1)
    return torch.cat([columns, mask.expand(batch, heads, *mask.shape[2:])], dim=-1)
