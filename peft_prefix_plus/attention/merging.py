"""Attention to the tokens and to the prefix, each by itself, merged by their log-sum-exps: nothing is copied.

Putting a prefix in front of cached keys and values copies them for every token that is generated. Here one kernel
attends to the cache as it is, another one to the prefix, for all rows at once if they share it. With the log-sum-exp
of its scores, each part's share of the common softmax is known (https://arxiv.org/abs/1805.02867).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from ..states import PrefixStates
from .routing import AttentionFunction

# The kernel that sdpa itself uses on a CPU; unlike sdpa it returns the log-sum-exp, which has no gradient.
_attend_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Arguments that change nothing here, whatever they hold.
_HARMLESS = frozenset(
    {"scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position"}
)


def can_merge(
    attend: AttentionFunction, query: Tensor, key: Tensor, value: Tensor, prefix: PrefixStates, kwargs: dict[str, Any]
) -> bool:
    """Whether a call of `sdpa` should be computed by parts: with cached tokens, on a CPU, with nothing unusual.

    Args:
        attend (`Callable`): the model's attention function.
        query, key, value (`torch.Tensor`): as it gets them.
        prefix ([`PrefixStates`]): its prefix.
        kwargs (`dict`): its other arguments.
    """
    inputs = (query, key, value, prefix.keys, prefix.values)
    return (
        attend is sdpa_attention_forward
        and key.shape[-2] > query.shape[-2]
        and query.device.type == "cpu"
        and key.shape[-1] == value.shape[-1]
        and prefix.bias is None
        # What sdpa sees to before it calls the kernel.
        and len({item.dtype for item in inputs}) == 1
        and all(item.stride(-1) == 1 for item in inputs)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(item.requires_grad for item in inputs))
        and not kwargs.get("dropout")
        and all(item is None or item is False or name in _HARMLESS for name, item in kwargs.items())
    )


def attend_by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix: PrefixStates,
    is_causal: bool,
    scaling: float | None,
) -> Tensor:
    """Attend to the prefix and to the tokens.

    Args:
        query (`torch.Tensor`): `[batch, heads, queries, dim]`.
        key, value (`torch.Tensor`): `[batch, kv_heads, tokens, dim]`.
        attention_mask (`torch.Tensor`, *optional*): `[batch or 1, heads or 1, queries, tokens]`.
        prefix ([`PrefixStates`]): with the batch and dtype of the tokens.
        is_causal (`bool`): whether a mask of `None` hides later tokens.
        scaling (`float`, *optional*): of the scores.

    Returns:
        `torch.Tensor`: `[batch, queries, heads, dim]`.
    """
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    # Queries of one group share their keys and stand together, so that these need not be repeated.
    grouped = query.reshape(batch, kv_heads, groups * queries, dim)
    if queries == 1:
        mask = attention_mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], kv_heads, groups, -1)
        output, weight = _attend(grouped, key, value, mask, False, scaling)
    else:
        parts = query, repeat_kv(key, groups), repeat_kv(value, groups)
        output, weight = _attend(*parts, attention_mask, is_causal, scaling)
    output, weight = output.reshape(grouped.shape), weight.reshape(grouped.shape[:-1])
    prefix_output, prefix_weight = _attend_to_prefix(grouped, prefix, scaling)
    share = torch.sigmoid(weight - prefix_weight)[..., None]
    merged = torch.lerp(prefix_output.to(share.dtype), output.to(share.dtype), share).to(query.dtype)
    return merged.reshape(batch, heads, queries, dim).transpose(1, 2).contiguous()


def _attend_to_prefix(grouped: Tensor, prefix: PrefixStates, scaling: float | None) -> tuple[Tensor, Tensor]:
    if prefix.mask is not None:
        return _attend(grouped, prefix.keys, prefix.values, prefix.mask[:, None, None, :], False, scaling)
    if prefix.keys.stride(0):
        return _attend(grouped, prefix.keys, prefix.values, None, False, scaling)
    # All rows share the prefix: they are queries of one row.
    batch, kv_heads, queries, dim = grouped.shape
    rows = grouped.transpose(0, 1).reshape(1, kv_heads, batch * queries, dim)
    output, weight = _attend(rows, prefix.keys[:1], prefix.values[:1], None, False, scaling)
    output = output.view(kv_heads, batch, queries, dim).transpose(0, 1)
    return output, weight.view(kv_heads, batch, queries).transpose(0, 1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Output `[batch, heads, queries, dim]`, and the log-sum-exp of the scores `[batch, heads, queries]`."""
    # The smallest number instead of minus infinity: where all is hidden, the other part takes everything.
    smallest = torch.finfo(query.dtype).min
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, smallest)
    elif mask is not None:
        mask = mask.to(query.dtype).clamp(min=smallest)
    output, weight = _attend_on_cpu(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scaling)
    return output, weight
