"""Where the prefix meets the tokens: in front of the keys and values, inside the attention function.

An attention module of transformers asks `ALL_ATTENTION_FUNCTIONS` for the function that its config names. A routed
module has its own copy of the config, which names `ROUTE_NAME`; the model's config keeps the real name, so masks are
still made for the real implementation. [`prefix_attention_forward`] prepends the prefix, widens the mask and calls the
function that the real name stands for, looked up at every call.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .geometry import find_attention_call
from .states import PrefixStates

ROUTE_NAME = "prefix_plus"
SUPPORTED_ATTENTION = ("eager", "sdpa")

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class PrefixDelivery:
    """One prefix on its way to one attention module, with the proof that it arrived.

    Args:
        module (`nn.Module`): the attention module that the prefix is for.
        states ([`PrefixStates`]): the prefix.
    """

    def __init__(self, module: nn.Module, states: PrefixStates) -> None:
        self.module = module
        self.states = states
        self.consumed = False


class _Channel(threading.local):
    """What the attention function finds in the current thread; layers fill it around the module's forward."""

    delivery: PrefixDelivery | None = None
    recording: dict[nn.Module, PrefixStates] | None = None


_channel = _Channel()


def attend_with_prefix(module: nn.Module, states: PrefixStates, *args: Any, **kwargs: Any) -> Any:
    """Run a routed attention module with a prefix.

    Args:
        module (`nn.Module`): a routed attention module.
        states ([`PrefixStates`]): its prefix.
        *args, **kwargs: what the module's forward takes.

    Returns:
        What the module returns.

    Raises:
        RuntimeError: if the module did not use the prefix.
    """
    previous = _channel.delivery
    delivery = PrefixDelivery(module, states)
    _channel.delivery = delivery
    try:
        output = module(*args, **kwargs)
    finally:
        _channel.delivery = previous
    if not delivery.consumed:
        raise RuntimeError(
            f"{type(module).__name__} computed its output without the prefix: it did not call the attention function "
            "of its configuration. Exclude the module with `exclude_modules`, or report the architecture."
        )
    return output


@contextmanager
def record_states(modules: list[nn.Module]) -> Iterator[dict[nn.Module, PrefixStates]]:
    """Record the keys and values that reach the attention functions of some modules.

    Args:
        modules (`list[nn.Module]`): attention modules, routed for as long as the context lasts.

    Yields:
        `dict[nn.Module, PrefixStates]`: filled by every forward that runs inside the context.
    """
    original_configs = [module.config for module in modules]
    previous = _channel.recording
    recording: dict[nn.Module, PrefixStates] = {}
    try:
        for module in modules:
            module.config = route_config(original_config(module))
        _channel.recording = recording
        yield recording
    finally:
        _channel.recording = previous
        for module, config in zip(modules, original_configs, strict=True):
            module.config = config


def route_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a shallow copy of a config that sends an attention module to [`prefix_attention_forward`].

    Only the attention module may get the copy: masks are made from the model's own config.

    Args:
        config (`PreTrainedConfig`): the config that the module shares with its model.

    Returns:
        `PreTrainedConfig`: its attribute `prefix_plus_original` is the config itself.
    """
    routed = copy.copy(config)
    # Not through the property, whose setter would write into the sub-configs, and those are shared with the model.
    routed._attn_implementation_internal = ROUTE_NAME
    routed.prefix_plus_original = config
    return routed


def original_config(module: nn.Module) -> PreTrainedConfig:
    """Return the config that an attention module shares with its model, routed or not."""
    config: PreTrainedConfig = module.config
    while hasattr(config, "prefix_plus_original"):
        config = config.prefix_plus_original
    return config


def check_attention_implementation(name: str | None) -> str:
    """Return the name of an attention implementation if prefixes work with it.

    Raises:
        ValueError: otherwise, with the names that do.
    """
    if name not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"The attention implementation {name!r} is not supported by PrefixPlus yet; supported are: "
            f"{', '.join(SUPPORTED_ATTENTION)}. Use `model.set_attn_implementation('sdpa')`, or load the model with "
            "`attn_implementation='sdpa'`."
        )
    return name


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of routed modules: prepend the prefix, then attend as the model would.

    Args:
        module (`nn.Module`): the routed attention module.
        query (`torch.Tensor`): `[batch, heads, queries, key_dim]`.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.
        attention_mask (`torch.Tensor`, *optional*): what the real implementation gets.
        *args, **kwargs: passed on.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: output `[batch, queries, heads, value_dim]`, and the weights, whose
        first columns are the prefix's, if the real implementation returns them.
    """
    config = original_config(module)
    implementation = check_attention_implementation(config._attn_implementation)
    attend = resolve_attention_function(module, implementation)
    recording, delivery = _channel.recording, _channel.delivery
    if recording is not None:
        if module in recording:
            raise ValueError(
                f"{type(module).__name__} attends more than once in one forward of the model, which PrefixPlus does "
                "not support yet."
            )
        recording[module] = PrefixStates(key.detach(), value.detach())
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    if delivery is None or delivery.module is not module:
        raise RuntimeError(
            f"{type(module).__name__} was called past its PrefixPlus layer, so its prefix would be ignored. Call the "
            "layer that replaced it, or remove the adapter with `model.unload()`."
        )
    if kwargs.get("cache") is not None:
        raise ValueError(
            "Continuous batching (`generate_batch`, a paged cache) is not supported by PrefixPlus yet; use `generate`."
        )
    delivery.consumed = True
    prefix = match_prefix(delivery.states, key, value)
    if implementation == "sdpa" and attention_mask is None and _is_causal(module, query, kwargs):
        return _attend_causal(attend, module, query, key, value, prefix, *args, **kwargs)
    key, value = prepend_prefix(key, value, prefix)
    attention_mask = extend_mask(attention_mask, prefix, key.shape[-2] - prefix.num_virtual_tokens, query.dtype)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (prefix.num_virtual_tokens, 0))
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


def resolve_attention_function(module: nn.Module, implementation: str) -> AttentionFunction:
    """Look up the function that `implementation` stands for in the modeling file of an attention module.

    Args:
        module (`nn.Module`): an attention module for which [`find_attention_call`] finds its call.
        implementation (`str`): a name such as `"sdpa"`.

    Returns:
        `AttentionFunction`: `"eager"` stands for the file's own `eager_attention_forward`.
    """
    call = find_attention_call(type(module))  # type: ignore[arg-type]
    if call is None:
        raise TypeError(f"{type(module).__name__} does not use the attention interface of transformers.")
    namespace = call.__globals__
    eager = namespace.get("eager_attention_forward")
    function: AttentionFunction = namespace["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, eager)
    if function is None:
        raise ValueError(
            f"The file of {type(module).__name__} has no `eager_attention_forward`; use "
            "`model.set_attn_implementation('sdpa')`."
        )
    return function


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
    num_tokens = prefix.num_virtual_tokens
    keys = prefix.keys.to(device=key.device, dtype=key.dtype).expand(batch, heads, num_tokens, -1)
    values = prefix.values.to(device=value.device, dtype=value.dtype).expand(batch, heads, num_tokens, -1)
    mask = None if prefix.mask is None else prefix.mask.to(key.device).expand(batch, num_tokens)
    return PrefixStates(keys, values, mask)


def prepend_prefix(key: Tensor, value: Tensor, prefix: PrefixStates) -> tuple[Tensor, Tensor]:
    """Put the prefix in front of the tokens' own keys and values.

    Args:
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.
        prefix ([`PrefixStates`]): with the same batch, heads, dimensions and dtype.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the same layouts with `P + tokens` on the token axis.
    """
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
        if prefix.mask is None:
            return None
        mask = torch.zeros(1, 1, 1, num_tokens, dtype=dtype, device=prefix.keys.device)
    visible, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    batch = mask.shape[0] if prefix.mask is None else max(mask.shape[0], prefix.mask.shape[0])
    columns = mask.new_full((batch, *mask.shape[1:-1], prefix.num_virtual_tokens), visible)
    if prefix.mask is not None:
        columns = columns.masked_fill(~prefix.mask[:, None, None, :], hidden)
    return torch.cat([columns, mask.expand(batch, *mask.shape[1:])], dim=-1)


def _is_causal(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether sdpa would attend causally when it gets no mask; the rule of `sdpa_attention_forward`."""
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return bool(is_causal) and query.shape[-2] > 1


def _attend_causal(
    attend: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: PrefixStates,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend causally where sdpa got no mask: its `is_causal` flag aligns queries and keys at the top left."""
    num_queries, num_virtual_tokens = query.shape[-2], prefix.num_virtual_tokens
    # An empty static cache hands over more keys than queries; sdpa drops the surplus, and so do we.
    key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    position_bias = kwargs.get("position_bias")
    if position_bias is not None or prefix.mask is not None:
        if position_bias is not None:
            kwargs["position_bias"] = nn.functional.pad(position_bias[..., :num_queries], (num_virtual_tokens, 0))
        ones = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device)
        mask = extend_mask(ones.tril()[None, None], prefix, num_queries, query.dtype)
        return attend(module, query, *prepend_prefix(key, value, prefix), mask, *args, **kwargs)
    # As many unused query rows as virtual tokens keep queries and keys aligned: the flag stays right, no mask is
    # needed, and the fastest kernels remain eligible.
    padded_query = nn.functional.pad(query, (0, 0, num_virtual_tokens, 0))
    output, weights = attend(module, padded_query, *prepend_prefix(key, value, prefix), None, *args, **kwargs)
    return output[:, num_virtual_tokens:], weights


def refuse_mask(*args: Any, **kwargs: Any) -> NoReturn:
    """The mask maker registered for `ROUTE_NAME`: without one, transformers would leave out the mask in silence."""
    raise RuntimeError(
        f"{ROUTE_NAME!r} is not an attention implementation for models: it routes attention modules that carry a "
        "prefix. Load the model with `attn_implementation='sdpa'` and give it a prefix with `get_peft_model`."
    )
