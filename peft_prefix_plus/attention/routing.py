"""Sends attention modules of transformers through another attention function, and finds their own.

An attention module asks `ALL_ATTENTION_FUNCTIONS` for the function that its config names. A routed module has its own
copy of the config, which names `ROUTE_NAME`; the model's config keeps the real name, so masks are still made for the
real implementation.
"""

import copy
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..architectures import find_attention_call, find_upcast_attention

ROUTE_NAME = "prefix_plus"

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class MaskContract(Enum):
    """In which form an attention implementation is told what a query may see."""

    #: A mask of four axes, or `None` where nothing is hidden.
    EAGER = "eager"
    #: The same, or `None` where the `is_causal` flag says it all.
    SDPA = "sdpa"
    #: A `BlockMask`.
    FLEX = "flex_attention"
    #: A padding mask of two axes, or none; causality and windows are arguments.
    FLASH = "flash_attention_2"


_CONTRACTS = {contract.value: contract for contract in MaskContract}


def route_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a shallow copy of a config that sends an attention module to [`prefix_attention_forward`].

    Only the attention module may get the copy: masks are made from the model's own config.

    Args:
        config (`PreTrainedConfig`): the config that the module shares with its model, or a copy that this made of it.

    Returns:
        `PreTrainedConfig`: its attribute `prefix_plus_original` is the config of the model.
    """
    config = _find_original(config)
    routed = copy.copy(config)
    # Not through the property, whose setter would write into the sub-configs, and those are shared with the model.
    routed._attn_implementation_internal = ROUTE_NAME
    routed.prefix_plus_original = config
    return routed


def original_config(module: nn.Module) -> PreTrainedConfig:
    """Return the config that an attention module shares with its model, routed or not."""
    return _find_original(module.config)


def _find_original(config: PreTrainedConfig) -> PreTrainedConfig:
    original: PreTrainedConfig | None = _get_own(config, "prefix_plus_original")
    return config if original is None else original


def read_implementation(module: nn.Module) -> str:
    """Return the name of the attention implementation that a model has for one of its modules, without `paged|`."""
    # What the property `_attn_implementation` returns.
    name: str | None = _get_own(original_config(module), "_attn_implementation_internal")
    return (name or "eager").removeprefix("paged|")


def _get_own(config: PreTrainedConfig, name: str) -> Any:
    """An attribute of a config, or `None`."""
    if torch.compiler.is_compiling():
        return config.__dict__.get(name)
    # Every attention asks, and configs take long to look an attribute up themselves.
    return object.__getattribute__(config, "__dict__").get(name)


def find_mask_contract(implementation: str | None) -> MaskContract:
    """Return how an attention implementation takes its mask: by the mask maker registered under its name.

    Args:
        implementation (`str`, *optional*): e.g. `"sdpa"`, or the name of a kernel or of a function of the user's.

    Raises:
        ValueError: if the name has no mask maker, or one of an unknown kind.
    """
    if implementation is None:
        return MaskContract.EAGER
    if implementation in _CONTRACTS:
        return _CONTRACTS[implementation]
    makers = ALL_MASK_ATTENTION_FUNCTIONS
    for known, contract in _CONTRACTS.items():
        if implementation in makers and makers[implementation] is makers[known]:
            return contract
    raise ValueError(
        f"PrefixPlus cannot tell how the attention implementation {implementation!r} takes its mask. Use "
        "`model.set_attn_implementation('sdpa')`; or register for your own function, under the same name, the mask "
        "maker of an implementation that takes the same masks: "
        f"`AttentionMaskInterface.register({implementation!r}, ALL_MASK_ATTENTION_FUNCTIONS['sdpa'])`."
    )


def resolve_attention_function(module: nn.Module, implementation: str) -> AttentionFunction:
    """Look up the function that `implementation` stands for in the modeling file of an attention module.

    Args:
        module (`nn.Module`): an attention module for which [`find_attention_call`] finds its call.
        implementation (`str`): a name such as `"sdpa"`.

    Returns:
        `AttentionFunction`: `"eager"` stands for the file's own `eager_attention_forward`.
    """
    call = find_attention_call(type(module))
    if call is None:
        raise TypeError(f"{type(module).__name__} does not use the attention interface of transformers.")
    upcast = find_upcast_attention(module) if implementation == "eager" else None
    if upcast is not None:
        return lambda module, query, key, value, mask, *args, **kwargs: upcast(query, key, value, mask)
    namespace = call.__globals__
    eager = namespace.get("eager_attention_forward")
    function: AttentionFunction = namespace["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, eager)
    if function is None:
        raise ValueError(
            f"The file of {type(module).__name__} has no `eager_attention_forward`; use "
            "`model.set_attn_implementation('sdpa')`."
        )
    return function


class UnroutedModule:
    """A routed attention module as it is without its route; for attention functions that read its config again.

    Args:
        module (`nn.Module`): a routed attention module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.config = original_config(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def refuse_mask(*args: Any, **kwargs: Any) -> NoReturn:
    """The mask maker registered for `ROUTE_NAME`: without one, transformers would leave out the mask in silence."""
    raise RuntimeError(
        f"{ROUTE_NAME!r} is not an attention implementation for models: it routes attention modules that carry a "
        "prefix. Load the model with `attn_implementation='sdpa'` and give it a prefix with `get_peft_model`."
    )
