"""Attention with a prefix on `flex_attention`, whose mask is a function of the indices, compiled into blocks."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ..states import PrefixStates
from .prepending import extend_mask, prepend_prefix
from .routing import AttentionFunction

# All layers of a forward share the mask that the model made for it, and most of them the length of their prefix.
_extended: WeakKeyDictionary[BlockMask, dict[int, BlockMask]] = WeakKeyDictionary()


def attend_flex(
    attend: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    prefix: PrefixStates,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend where the mask is a `BlockMask`, or one of four axes that is added to the scores.

    Args:
        attend (`Callable`): the model's own attention function.
        module (`nn.Module`): the attention module.
        query (`torch.Tensor`): `[batch, heads, queries, key_dim]`.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.
        attention_mask (`BlockMask` or `torch.Tensor`, *optional*): for the tokens; `None` hides nothing.
        prefix ([`PrefixStates`]): with the batch, dtype and device of the keys.
        *args, **kwargs: of the attention function; a `position_bias` gets columns for the prefix.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: what the attention function returns.
    """
    batch, _, num_queries, _ = query.shape
    num_tokens = key.shape[-2]
    bias = _extend_bias(kwargs.pop("position_bias", None), prefix, query, num_tokens)
    if bias is not None:
        kwargs["position_bias"] = bias
    if isinstance(attention_mask, BlockMask):
        attention_mask = _extend_block_mask(attention_mask, prefix)
    elif attention_mask is not None:
        # The tensor is read at every row, and at its first head.
        extended = extend_mask(attention_mask[..., :num_tokens], prefix._replace(bias=None), num_tokens, query.dtype)
        attention_mask = extended.expand(batch, -1, num_queries, -1)  # type: ignore[union-attr]
    elif prefix.mask is not None:
        attention_mask = _build_block_mask(None, prefix, (batch, 1, num_queries, num_tokens))
    return attend(module, query, *prepend_prefix(key, value, prefix), attention_mask, *args, **kwargs)


def _extend_bias(bias: Tensor | None, prefix: PrefixStates, query: Tensor, num_tokens: int) -> Tensor | None:
    """Join a bias of the tokens' scores and one of the prefix's, `[batch, heads, queries, P + tokens]`."""
    if bias is not None:
        bias = nn.functional.pad(bias, (prefix.num_virtual_tokens, 0))
    if prefix.bias is not None:
        columns = nn.functional.pad(prefix.bias, (0, num_tokens))
        bias = columns if bias is None else bias + columns
    return None if bias is None else bias.to(query.dtype).expand(*query.shape[:3], -1)


def _extend_block_mask(mask: BlockMask, prefix: PrefixStates) -> BlockMask:
    """Widen a block mask by columns for the prefix; the result is kept as long as the mask is."""
    if torch.compiler.is_compiling() or prefix.mask is not None:
        return _build_block_mask(mask, prefix, mask.shape)
    known = _extended.setdefault(mask, {})
    length = prefix.num_virtual_tokens
    if length not in known:
        known[length] = _build_block_mask(mask, prefix, mask.shape)
    return known[length]


def _build_block_mask(mask: BlockMask | None, prefix: PrefixStates, shape: tuple[int, ...]) -> BlockMask:
    """Build a mask of the prefix and the tokens; `shape` is `(batch, heads, queries, tokens)`, without the prefix."""
    length, prefix_mask = prefix.num_virtual_tokens, prefix.mask
    mask_mod = None if mask is None else mask.mask_mod
    batch, heads, num_queries, num_tokens = shape

    def see_prefix_and_tokens(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_prefix = key < length
        visible = is_prefix
        if prefix_mask is not None:
            visible = visible & prefix_mask[row, key.clamp(max=length - 1)]
        if mask_mod is None:
            return visible | ~is_prefix
        # Both sides are evaluated at every key, so each needs an index that it has.
        return visible | (~is_prefix & mask_mod(row, head, query, (key - length).clamp(min=0)))

    return create_block_mask(
        see_prefix_and_tokens,
        B=batch if prefix_mask is None else len(prefix_mask),
        H=heads,
        Q_LEN=num_queries,
        KV_LEN=length + num_tokens,
        device=prefix.keys.device,
        BLOCK_SIZE=128 if mask is None else mask.BLOCK_SIZE,
        _compile=True,
    )
