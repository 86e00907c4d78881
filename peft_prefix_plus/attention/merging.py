"""Attention to the tokens and to the prefix, each by itself, merged by their log-sum-exps: nothing is copied.

Putting a prefix in front of keys and values copies them: in training for the backward pass, in generation for every
token. Here one kernel attends to the tokens as they are, another one to the prefix, which all rows share. With the
log-sum-exp of its scores, each part's share of the common softmax is known (https://arxiv.org/abs/1805.02867). The
gradient of each part needs nothing but the merged output and log-sum-exp.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..states import PrefixStates
from .prepending import extend_mask, prepend_prefix
from .routing import AttentionFunction

# The kernel that sdpa itself uses on a CPU; unlike sdpa it returns the log-sum-exp.
_attend_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_differentiate_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# With so many queries the backward kernel is faster in float32 than in half precision, with more of them slower.
_MAX_PRECISE_QUERIES = 256
# Arguments that change nothing here, whatever they hold.
_HARMLESS = frozenset(
    {
        *("scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position"),
        # Trainer hands it over, and models pass it on.
        "num_items_in_batch",
    }
)


def can_merge(
    attend: AttentionFunction,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix: PrefixStates,
    kwargs: dict[str, Any],
) -> bool:
    """Whether a call of `sdpa` should be computed by parts: on a CPU, with nothing unusual.

    Args:
        attend (`Callable`): the model's attention function.
        query, key, value, attention_mask (`torch.Tensor`): as it gets them.
        prefix ([`PrefixStates`]): its prefix.
        kwargs (`dict`): its other arguments.
    """
    return (
        attend is sdpa_attention_forward
        and not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and key.shape[-1] == value.shape[-1]
        # sdpa lets rows of queries share keys and the reverse.
        and query.shape[0] == key.shape[0] == value.shape[0] > 0
        and query.dtype == key.dtype == value.dtype
        and query.stride(-1) == 1
        and prefix.bias is None
        and torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        and not kwargs.get("dropout")
        and all(item is None or item is False or name in _HARMLESS for name, item in kwargs.items())
        # What a cache has joined is plain.
        and (prefix.joined is not None or _are_plain(query, key, value, attention_mask, prefix))
        and not _may_hide_everything(query, attention_mask, prefix)
    )


def _are_plain(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, prefix: PrefixStates) -> bool:
    """Whether tensors are such as the kernel takes and differentiates them."""
    keys, values = prefix.keys, prefix.values
    return (
        not torch._C._are_functorch_transforms_active()
        and not (attention_mask is not None and attention_mask.requires_grad)
        # The kernel divides by the number of queries and keys.
        and min(query.shape[-2], key.shape[-2]) > 0
        # What sdpa sees to before it calls the kernel.
        and key.dtype == keys.dtype == values.dtype
        and 1 == key.stride(-1) == value.stride(-1) == keys.stride(-1) == values.stride(-1)
    )


def _may_hide_everything(query: Tensor, mask: Tensor | None, prefix: PrefixStates) -> bool:
    """Whether a query, of padding in a row without a prefix, may see nothing: neither part then has a share."""
    if mask is None or prefix.mask is None or query.shape[-2] == 1:
        return False
    return not bool(prefix.mask.any(-1).all())


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
    keys, values = prefix.keys, prefix.values
    # What all rows share is one row again.
    if not keys.stride(0) and not values.stride(0):
        keys, values = keys[:1], values[:1]
    tokens = _Part(key, value, attention_mask, is_causal)
    in_front = _Part(keys, values, None if prefix.mask is None else prefix.mask[:, None, None, :])
    if torch.is_grad_enabled() and any(item.requires_grad for item in (query, key, value, keys, values)):
        apply: Callable[..., Tensor] = _AttentionByParts.apply
        output = apply(scaling, query, *tokens, *in_front)
    elif query.shape[-2] == 1:
        output = _attend_with_one_query(query, tokens, in_front, prefix, scaling)
    else:
        output, *_ = _attend_to_both(query, tokens, in_front, scaling)
    return output.transpose(1, 2).contiguous()


class _Merged(NamedTuple):
    """What the gradient of every part needs: of all parts together, the output, its gradient and the log-sum-exp."""

    gradient: Tensor
    query: Tensor
    output: Tensor
    weight: Tensor

    def to(self, dtype: torch.dtype) -> "_Merged":
        """In another dtype; the log-sum-exp has the kernel's own."""
        gradient, query, output = (_cast(item, dtype) for item in self[:3])
        return _Merged(gradient, query, output, self.weight)


class _Part(NamedTuple):
    """Keys and values that a query attends to beside others, `[batch, kv_heads, tokens, dim]`, or 1 for every row.

    `mask` is `[batch or 1, heads or 1, queries or 1, tokens]`.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    is_causal: bool = False

    def attend(self, query: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
        """Output `[batch, heads, queries, dim]`, and the log-sum-exp of the scores `[batch, heads, queries]`."""
        if not self._is_shared_by_rows_of(query):
            return self._call_kernel(query, scaling)
        output, weight = self._call_kernel(_join_rows(query), scaling)
        return _part_rows(output, query.shape[0]), _part_rows(weight, query.shape[0])

    def differentiate(self, merged: _Merged, scaling: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values from this part."""
        if not self._is_shared_by_rows_of(merged.query):
            return self._call_backward_kernel(merged, scaling)
        joined = _Merged(*(_join_rows(item) for item in merged))
        of_query, of_keys, of_values = self._call_backward_kernel(joined, scaling)
        return _part_rows(of_query, merged.query.shape[0]), of_keys, of_values

    def to(self, dtype: torch.dtype) -> "_Part":
        """In another dtype; the mask follows the queries."""
        return _Part(_cast(self.keys, dtype), _cast(self.values, dtype), self.mask, self.is_causal)

    def _is_shared_by_rows_of(self, query: Tensor) -> bool:
        """Whether all rows see the same keys, as if their queries were those of a single row."""
        return self.keys.shape[0] < query.shape[0] and self.mask is None

    def _call_kernel(self, query: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
        keys, values, mask = self._fit(query)
        output, weight = _attend_on_cpu(query, keys, values, 0.0, self.is_causal, attn_mask=mask, scale=scaling)
        return output, weight

    def _call_backward_kernel(self, merged: _Merged, scaling: float | None) -> tuple[Tensor, Tensor, Tensor]:
        gradient, query, output, weight = merged
        keys, values, mask = self._fit(query)
        of_query, *of_states = _differentiate_on_cpu(
            gradient, query, keys, values, output, weight, 0.0, self.is_causal, attn_mask=mask, scale=scaling
        )
        if self.keys.shape[0] < query.shape[0]:
            of_states = [item.sum(0, keepdim=True) for item in of_states]
        of_keys, of_values = of_states
        return of_query, of_keys, of_values

    def _fit(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values for every row, not copied for it; and an additive mask in the dtype of the queries.

        The mask has the smallest number for what is hidden: where all is, the other part takes everything.
        """
        batch, (keys, values, mask, _) = query.shape[0], self
        if keys.shape[0] < batch:
            keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
        if mask is None:
            return keys, values, None
        smallest = torch.finfo(query.dtype).min
        if mask.dtype == torch.bool:
            return keys, values, torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, smallest)
        return keys, values, mask.to(query.dtype).clamp(min=smallest)


class _AttentionByParts(torch.autograd.Function):
    """What is kept for the backward pass grows with the tokens as without a prefix; keys and values once per group."""

    @staticmethod
    def forward(ctx: Any, scaling: float | None, query: Tensor, *parts: Any) -> Tensor:
        tokens, prefix = _Part(*parts[:4]), _Part(*parts[4:])
        output, *weights = _attend_to_both(query, tokens, prefix, scaling)
        weight = torch.logaddexp(*weights)
        ctx.save_for_backward(query, *tokens[:2], *prefix[:2], tokens.mask, prefix.mask, output, weight)
        ctx.settings = tokens.is_causal, scaling
        return output

    # Not `once_differentiable`, behind which second derivatives may be left out in silence: the kernel refuses them.
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask, prefix_mask, output, weight = ctx.saved_tensors
        is_causal, scaling = ctx.settings
        query, key, value, keys, values = inputs
        precise = torch.promote_types(query.dtype, torch.float32)
        merged = _Merged(gradient, query, output, weight)
        precisely_merged = merged.to(precise)
        prefix = _Part(keys, values, prefix_mask).to(precise)
        of_query, *of_prefix = prefix.differentiate(precisely_merged, scaling)
        of_tokens: tuple[Tensor | None, ...] = (None, None, None)
        # The first layer of a frozen model has nothing behind it that trains.
        if any(ctx.needs_input_grad[1:4]):
            if query.shape[-2] <= _MAX_PRECISE_QUERIES:
                merged = precisely_merged
            tokens = _Part(key, value, mask, is_causal).to(merged.query.dtype)
            of_token_query, *of_states = tokens.differentiate(merged, scaling)
            of_tokens = (of_query.add_(of_token_query), *of_states)
        given = zip((*of_tokens, *of_prefix), inputs, strict=True)
        of_inputs = [None if item is None else _cast(item, own.dtype) for item, own in given]
        return None, *of_inputs[:3], None, None, *of_inputs[3:], None, None


def _attend_to_both(
    query: Tensor, tokens: _Part, prefix: _Part, scaling: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[batch, heads, queries, dim]`, and the log-sum-exp of each part's scores `[batch, heads, queries]`."""
    own, others = tokens.attend(query, scaling), prefix.attend(query, scaling)
    return _merge(*own, *others), own[1], others[1]


def _attend_with_one_query(
    query: Tensor, tokens: _Part, in_front: _Part, prefix: PrefixStates, scaling: float | None
) -> Tensor:
    """The same for one query, in one piece where the cache has the prefix in front of the tokens."""
    key, value, mask, _ = tokens
    grouped = query
    # The kernel takes three times as long in half precision if heads share keys. As queries of one head they may.
    if query.dtype != torch.float32:
        batch, kv_heads, _, dim = key.shape
        grouped = query.reshape(batch, kv_heads, -1, dim)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], kv_heads, grouped.shape[2], -1)
    if prefix.joined is not None:
        mask = extend_mask(mask, prefix, key.shape[-2], query.dtype)
        output, _ = _Part(*prepend_prefix(key, value, prefix), mask).attend(grouped, scaling)
    else:
        output, *_ = _attend_to_both(grouped, _Part(key, value, mask), in_front, scaling)
    return output.reshape(query.shape)


def _join_rows(states: Tensor) -> Tensor:
    """`[batch, heads, queries, ...]` to `[1, heads, batch * queries, ...]`: rows that share a prefix are one row."""
    batch, heads, queries, *rest = states.shape
    return states.transpose(0, 1).reshape(1, heads, batch * queries, *rest)


def _part_rows(states: Tensor, batch: int) -> Tensor:
    """The inverse of [`_join_rows`]."""
    rows = states.reshape(states.shape[1], batch, -1, *states.shape[3:])
    return rows.transpose(0, 1)


def _merge(output: Tensor, weight: Tensor, prefix_output: Tensor, prefix_weight: Tensor) -> Tensor:
    share = torch.sigmoid(weight - prefix_weight)[..., None]
    merged = torch.lerp(_cast(prefix_output, share.dtype), _cast(output, share.dtype), share)
    return _cast(merged, output.dtype)


def _cast(states: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype; `Tensor.to` takes six times as long to find out that there is nothing to do."""
    return states if states.dtype == dtype else states.to(dtype)
