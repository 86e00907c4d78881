"""Attention with a prefix where masks are tensors of four axes: eager, sdpa, and their paged forms."""

from typing import Any

import torch
from torch import Tensor, nn

from ..states import PrefixStates
from .merging import attend_by_parts, can_merge
from .prepending import extend_mask, prepend_prefix
from .routing import AttentionFunction


def attend_eager(
    attend: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix: PrefixStates,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend where a mask of `None` hides nothing.

    Args:
        attend (`Callable`): the model's own attention function.
        module (`nn.Module`): the attention module.
        query (`torch.Tensor`): `[batch, heads, queries, key_dim]`.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.
        attention_mask (`torch.Tensor`, *optional*): `[batch or 1, heads or 1, queries or 1, tokens]`.
        prefix ([`PrefixStates`]): with the batch and dtype of the tokens.
        *args, **kwargs: for `attend`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: what `attend` returns.
    """
    num_virtual_tokens = prefix.num_virtual_tokens
    cache = kwargs.pop("cache", None)
    if cache is not None:
        # Continuous batching: the requests stand one behind the other in a single row, and each sees the prefix.
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    num_tokens = key.shape[-2]
    key, value = prepend_prefix(key, value, prefix)
    attention_mask = extend_mask(attention_mask, prefix, num_tokens, query.dtype)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (num_virtual_tokens, 0))
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


def cast_for_sdpa(*states: Tensor) -> tuple[Tensor, ...]:
    """Cast queries, keys and values as autocast will do it for sdpa, so that the prefix is matched to the result."""
    # Every attention asks, and that of one kind of device takes ten times as long.
    if not torch._C._is_any_autocast_enabled():
        return states
    kind = states[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return states
    dtype = torch.get_autocast_dtype(kind)
    return tuple(item if item.dtype == torch.float64 else item.to(dtype) for item in states)


def attend_sdpa(
    attend: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix: PrefixStates,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend where a mask of `None` may mean causal attention; see [`attend_eager`]."""
    is_causal = attention_mask is None and _is_causal(module, query, kwargs)
    # What lies in one piece needs the kernel for parts with masks and in half precision only.
    if prefix.joined is not None and not is_causal and attention_mask is None and query.dtype == torch.float32:
        return attend_eager(attend, module, query, key, value, None, prefix, *args, **kwargs)
    if is_causal and key.shape[-2] > query.shape[-2]:
        # An empty static cache hands over more keys than queries; sdpa drops the surplus, and so do we.
        key, value = key[:, :, : query.shape[-2]], value[:, :, : query.shape[-2]]
    if not args and can_merge(attend, query, key, value, attention_mask, prefix, kwargs):
        scaling = kwargs.get("scaling")
        return attend_by_parts(query, key, value, attention_mask, prefix, is_causal, scaling), None
    if not is_causal:
        return attend_eager(attend, module, query, key, value, attention_mask, prefix, *args, **kwargs)
    # The flag aligns queries and keys at the top left.
    num_queries, num_virtual_tokens = query.shape[-2], prefix.num_virtual_tokens
    if kwargs.get("position_bias") is not None or prefix.mask is not None:
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"][..., :num_queries]
        causal = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device).tril()[None, None]
        return attend_eager(attend, module, query, key, value, causal, prefix, *args, **kwargs)
    # As many unused query rows as virtual tokens keep queries and keys aligned: the flag stays right, no mask is
    # needed, and the fastest kernels remain eligible.
    padded_query = nn.functional.pad(query, (0, 0, num_virtual_tokens, 0))
    output, weights = attend(module, padded_query, *prepend_prefix(key, value, prefix), None, *args, **kwargs)
    return output[:, num_virtual_tokens:], weights


def _is_causal(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether sdpa would attend causally when it gets no mask; the rule of `sdpa_attention_forward`."""
    if query.shape[-2] == 1:
        return False
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return bool(is_causal)
