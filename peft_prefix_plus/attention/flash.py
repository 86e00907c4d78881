"""Attention with a prefix on flash kernels, which take padding masks of two axes and offsets of packed sequences."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.flash_attention import get_target_dtype
from transformers.modeling_flash_attention_utils import (
    _is_packed_sequence,
    flash_attn_supports_top_left_mask,
    prepare_fa_kwargs_from_position_ids,
)

from ..states import PrefixStates
from .prepending import extend_mask, prepend_prefix
from .routing import AttentionFunction, UnroutedModule

# What the flash functions of transformers call their arguments behind the mask.
_ARGUMENTS = ("dropout", "scaling", "sliding_window", "softcap", "is_causal", "s_aux", "cache")


class Packing(NamedTuple):
    """Where sequences lie that stand one behind the other in a single row.

    Attributes:
        query_offsets (`torch.Tensor`): int32 `[sequences + 1]`, the first query of each, and the end.
        key_offsets (`torch.Tensor`): the same for the keys.
        max_queries (`int`): of any sequence; a tensor without axes where transformers made it.
        max_keys (`int`): likewise.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    max_queries: Any
    max_keys: Any

    def as_kwargs(self) -> dict[str, Any]:
        """The arguments under which flash functions take them."""
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return dict(zip(names, self, strict=True))


def attend_flash(
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
    """Attend on a flash kernel, whose causal queries and keys are aligned at their ends.

    A kernel measures its sliding window as a distance, which the prefix would leave. Where the window hides tokens,
    this call is computed without the kernel.

    Args:
        attend (`Callable`): the model's own attention function.
        module (`nn.Module`): the attention module.
        query (`torch.Tensor`): `[batch, heads, queries, key_dim]`.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.
        attention_mask (`torch.Tensor`, *optional*): `[batch, tokens]`, nonzero where a token is no padding.
        prefix ([`PrefixStates`]): with the batch, dtype and device of the keys; each packed sequence sees it once.
        *args, **kwargs: of the attention function.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: what the attention function returns.

    Raises:
        ValueError: if the kernel cannot do what the prefix needs.
    """
    kwargs.update(zip(_ARGUMENTS, args, strict=False))
    is_causal = kwargs.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    _check_possible(prefix, kwargs, is_causal and query.shape[-2] > 1)
    cache = kwargs.pop("cache", None)
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    packing = _find_packing(query, kwargs) if attention_mask is None else None
    if attention_mask is not None:
        # A static cache hands over more keys than there are tokens.
        key, value = key[:, :, : attention_mask.shape[-1]], value[:, :, : attention_mask.shape[-1]]
    window = kwargs.pop("sliding_window", None)
    if window is not None and int(key.shape[-2] if packing is None else packing.max_keys) > window:
        visible = _find_visible(query.shape[-2], key, attention_mask, packing, window, is_causal)
        return _attend_without_kernel(module, query, key, value, visible, prefix, kwargs), None
    if packing is not None:
        key, value, packing = _interleave_prefix(key, value, prefix, packing)
    else:
        attention_mask = _extend_padding_mask(attention_mask, prefix, key.shape[-2])
        key, value = prepend_prefix(key, value, prefix)
        if attention_mask is not None and not is_causal:
            key, value, packing = _remove_padding(query, key, value, attention_mask)
            attention_mask = None
    if packing is not None:
        kwargs.update(packing.as_kwargs())
    return attend(UnroutedModule(module), query, key, value, attention_mask, sliding_window=None, **kwargs)


def _check_possible(prefix: PrefixStates, kwargs: dict[str, Any], aligns_queries: bool) -> None:
    remedy = "use `model.set_attn_implementation('sdpa')`."
    if prefix.bias is not None:
        raise ValueError(
            "Flash kernels take no bias for single keys, which the prefix of this model needs (ALiBi, for instance); "
            + remedy
        )
    if aligns_queries and flash_attn_supports_top_left_mask():
        raise ValueError(
            "This flash kernel aligns queries and keys at their beginnings, which hides tokens behind a prefix. Set "
            "the environment variable NPU_FA2_SPARSE_MODE=3, or " + remedy
        )
    if kwargs.get("cache") is not None and kwargs.get("block_table") is not None:
        raise ValueError(
            "With block tables the flash kernel reads the keys from the paged cache by itself, which has no place "
            "for a prefix. Switch them off with `ContinuousBatchingConfig(max_blocks_per_request=0)`, or " + remedy
        )


def _find_packing(query: Tensor, kwargs: dict[str, Any]) -> Packing | None:
    """Decide as `_flash_attention_forward` does whether a call without a mask has packed sequences."""
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    given: list[Any] = [kwargs.get(name) for name in names]
    position_ids = kwargs.pop("position_ids", None)
    if all(part is not None for part in given):
        if query.shape[0] > 1:
            raise ValueError(
                f"Packed sequences need a single row for PrefixPlus, not {query.shape[0]}. Flatten the batch, as "
                "`DataCollatorWithFlattening` does."
            )
        return Packing(*given)
    if not _is_packed_sequence(position_ids, query.shape[0]):
        return None
    offsets, lengths = prepare_fa_kwargs_from_position_ids(position_ids)
    return Packing(*offsets, *lengths)


def _interleave_prefix(
    key: Tensor, value: Tensor, prefix: PrefixStates, packing: Packing
) -> tuple[Tensor, Tensor, Packing]:
    """Put the prefix in front of each of several packed sequences."""
    if prefix.mask is not None:
        visible = prefix.mask[0].nonzero()[:, 0]
        prefix = PrefixStates(prefix.keys[:, :, visible], prefix.values[:, :, visible])
    length, offsets = prefix.num_virtual_tokens, packing.key_offsets
    num_sequences, tokens = len(offsets) - 1, torch.arange(key.shape[-2], device=key.device)
    sequences = torch.arange(num_sequences + 1, device=key.device)
    shifts = (_find_sequences(offsets, key.shape[-2]) + 1) * length
    # Of the prefix and the tokens behind it, which one comes where.
    source = torch.arange(length, device=key.device).repeat(num_sequences)
    order = torch.empty(len(tokens) + len(source), dtype=torch.long, device=key.device)
    starts = (offsets + sequences * length)[:-1, None] + torch.arange(length, device=key.device)
    order[starts.flatten().long()] = source
    order[tokens + shifts] = tokens + length
    key, value = (states.index_select(-2, order) for states in prepend_prefix(key, value, prefix))
    offsets = (offsets + sequences * length).to(offsets.dtype)
    return key, value, packing._replace(key_offsets=offsets, max_keys=packing.max_keys + length)


def _find_sequences(offsets: Tensor, num_tokens: int) -> Tensor:
    """The sequence of each token; tokens behind the last one count as its own."""
    tokens = torch.arange(num_tokens, device=offsets.device)
    return torch.searchsorted(offsets[1:].long(), tokens, right=True).clamp(max=len(offsets) - 2)


def _extend_padding_mask(mask: Tensor | None, prefix: PrefixStates, num_tokens: int) -> Tensor | None:
    """Widen a padding mask, `[batch, tokens]`, by columns for the prefix; `None` if nothing is hidden."""
    batch, _, length, _ = prefix.keys.shape
    if mask is None:
        if prefix.mask is None:
            return None
        mask = prefix.mask.new_ones(batch, num_tokens)
    columns = mask.new_ones(batch, length) if prefix.mask is None else prefix.mask.to(mask.dtype)
    return torch.cat([columns, mask], dim=-1)


def _remove_padding(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Packing]:
    """Pack the keys and values that are no padding, and leave the queries.

    transformers would take the end of the mask for that of the queries, which holds where queries are tokens like the
    keys, and not in cross-attention.
    """
    batch, _, num_queries, _ = query.shape
    kept = mask.bool()
    key, value = (states.transpose(1, 2)[kept].transpose(0, 1)[None] for states in (key, value))
    counts = nn.functional.pad(kept.sum(dim=-1), (1, 0))
    query_offsets = torch.arange(batch + 1, device=query.device, dtype=torch.int32) * num_queries
    return key, value, Packing(query_offsets, counts.cumsum(0).to(torch.int32), num_queries, mask.shape[-1])


def _find_visible(
    num_queries: int, key: Tensor, mask: Tensor | None, packing: Packing | None, window: int, is_causal: bool
) -> Tensor:
    """Say in a dense mask which tokens a kernel with a sliding window would let each query see.

    Returns:
        `torch.Tensor`: bool `[batch or 1, 1, queries, tokens]`.
    """
    num_keys = key.shape[-2]
    key_ranks = torch.arange(num_keys, device=key.device)[None]
    query_ranks = key_ranks[:, -1:] - torch.arange(num_queries - 1, -1, -1, device=key.device)
    if mask is not None:
        key_ranks = mask.long().cumsum(dim=-1)
        query_ranks = key_ranks[:, -num_queries:]
    if packing is not None:
        key_sequences = _find_sequences(packing.key_offsets, num_keys)
        query_sequences = _find_sequences(packing.query_offsets, num_queries)
        # Counted from the ends, at which queries and keys are aligned.
        query_ranks = torch.arange(num_queries, device=key.device) - packing.query_offsets[1:][query_sequences]
        query_ranks, key_ranks = query_ranks[None], key_ranks - packing.key_offsets[1:][key_sequences]
    distance = query_ranks[:, :, None] - key_ranks[:, None, :]
    visible = distance.abs() < window
    if is_causal:
        visible = visible & (distance >= 0)
    if mask is not None:
        visible = visible & mask.bool()[:, None, :]
    if packing is not None:
        visible = visible & (query_sequences[:, None] == key_sequences)
    return visible[:, None]


def _attend_without_kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    prefix: PrefixStates,
    kwargs: dict[str, Any],
) -> Tensor:
    """Compute `[batch, queries, heads, value_dim]` under a dense mask, with what a kernel does to the scores."""
    visible = extend_mask(visible, prefix, key.shape[-2], query.dtype)  # type: ignore[assignment]
    dtype = get_target_dtype(query, module) or query.dtype
    groups = query.shape[1] // key.shape[1]
    query = query.to(dtype)
    key, value = (states.to(dtype).repeat_interleave(groups, dim=1) for states in prepend_prefix(key, value, prefix))
    dropout, softcap, sinks = kwargs.get("dropout", 0.0), kwargs.get("softcap"), kwargs.get("s_aux")
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    if not softcap and sinks is None:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, visible, dropout_p=dropout, scale=scaling
        )
        return output.transpose(1, 2).contiguous()
    scores = query.float() @ key.float().transpose(-1, -2) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[-2]].to(dtype)
    output = nn.functional.dropout(weights, p=dropout) @ value
    return output.transpose(1, 2).contiguous()
