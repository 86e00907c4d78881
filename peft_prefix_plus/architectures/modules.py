"""Finds the modules of a model that compute softmax attention."""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# What an attention module calls if it computes attention by itself.
_ATTENTION_FUNCTIONS = frozenset({"softmax", "Softmax", "scaled_dot_product_attention"})


# Modules that compute softmax attention, but not between all queries and all keys that they may see: in overlapping
# chunks, or through landmarks. A prefix cannot be put in front of those.
_SPARSE_ATTENTION = frozenset(
    {
        "BigBirdBlockSparseAttention",
        "BigBirdPegasusBlockSparseAttention",
        "HieraMaskUnitAttention",
        "LEDEncoderSelfAttention",
        "LongformerSelfAttention",
        "MobileViTV2LinearSelfAttention",
        "NystromformerSelfAttention",
        "PegasusXGlobalLocalAttention",
        "SwiftFormerEfficientAdditiveAttention",
    }
)


# Models inside of models that run without gradients.
_GRADIENT_FREE_NAMES = frozenset({"patcher"})


def find_attention_call(module_class: type[nn.Module]) -> FunctionType | None:
    """Find the method of an attention class that looks its attention function up in `ALL_ATTENTION_FUNCTIONS`.

    Its `__globals__` hold what the lookup uses: the interface and the eager function of that modeling file.

    Args:
        module_class (`type[nn.Module]`): any module class.

    Returns:
        `FunctionType`, *optional*: `None` if the class never asks the interface.
    """
    # Not `functools.cache`, about which `torch.compile` would warn.
    if module_class not in _attention_calls:
        _attention_calls[module_class] = _search_attention_call(module_class)
    return _attention_calls[module_class]


_attention_calls: dict[type[nn.Module], FunctionType | None] = {}


def _search_attention_call(module_class: type[nn.Module]) -> FunctionType | None:
    for owner in module_class.__mro__:
        for attribute in vars(owner).values():
            function = inspect.unwrap(attribute) if inspect.isfunction(attribute) else None
            if isinstance(function, FunctionType) and "ALL_ATTENTION_FUNCTIONS" in function.__code__.co_names:
                return function
    return None


@cache
def computes_attention(module_class: type[nn.Module]) -> bool:
    """Whether a class that does not ask the attention interface is one that takes a softmax over attention scores."""
    name = module_class.__name__
    if name in _SPARSE_ATTENTION or re.search("(attention|attn)$", name, re.IGNORECASE) is None:
        return False
    return any(
        inspect.isfunction(function)
        and not _ATTENTION_FUNCTIONS.isdisjoint(inspect.unwrap(function).__code__.co_names)
        for owner in module_class.__mro__
        if owner is not nn.Module
        for function in vars(owner).values()
    )


def uses_attention_interface(module: nn.Module) -> bool:
    """Whether `module` is an attention module that asks the attention interface of transformers."""
    # A `PreTrainedModel` also names the interface, to check implementations, but never calls it.
    return (
        not isinstance(module, PreTrainedModel)
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
        and find_attention_call(type(module)) is not None
    )


def is_attention_module(module: nn.Module) -> bool:
    """Whether `module` computes softmax attention in a way that can carry a prefix."""
    return uses_attention_interface(module) or (
        not isinstance(module, PreTrainedModel) and computes_attention(type(module))  # type: ignore[arg-type]
    )


def find_base_module(module: nn.Module) -> nn.Module:
    """Return what the tuner layers around a module wrap, or the module itself."""
    while isinstance(module, BaseTunerLayer):
        module = module.base_layer
    return module


def iterate_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of the model by the name it has without adapters.

    Args:
        model (`nn.Module`): a model, with or without tuner layers in it.

    Yields:
        `tuple[str, nn.Module]`: the name as in the bare model, and the bare module.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        bare = find_base_module(module)
        if id(bare) not in seen:
            seen.add(id(bare))
            yield name.replace(".base_layer", ""), bare


def find_attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find every attention module that can carry a prefix, in the order of the model.

    Args:
        model (`nn.Module`): a transformers model.

    Returns:
        `dict[str, nn.Module]`: bare attention modules by name.
    """
    return {name: module for name, module in iterate_base_modules(model) if is_attention_module(module)}


def is_cross_attention(name: str) -> bool:
    """Whether an attention module, by its name in the model, attends to the output of an encoder."""
    ending = ".".join(name.lower().split(".")[-2:])
    return re.search("cross|encoder_attn|encdec|encoder_decoder_attention", ending) is not None


def runs_without_gradients(name: str) -> bool:
    """Whether a module, by its name, lies in a part of the model that is never trained through."""
    return not _GRADIENT_FREE_NAMES.isdisjoint(name.split("."))


def find_upcast_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Find what GPT-2 computes in float32 in the place of its eager attention, if its configuration asks for that.

    The module itself looks for the name "eager" in its config, which a route replaces.
    """
    if not getattr(module, "reorder_and_upcast_attn", False):
        return None
    function: Callable[..., Any] = module._upcast_and_reordered_attn  # type: ignore[assignment]
    return function


def explain_missing_attention(model: nn.Module) -> str:
    """Say why a model without a module from [`find_attention_modules`] cannot carry a prefix, and what to do."""
    classes = {type(module).__name__ for module in model.modules()}
    sparse = sorted(classes & _SPARSE_ATTENTION)
    fixed = sorted(name for name in classes if name.endswith("FlashAttention2"))
    if fixed:
        return (
            f"has attention modules that call flash kernels by themselves ({fixed[0]}). Load it with "
            "`attn_implementation='sdpa'` or `'eager'`."
        )
    if not sparse:
        return (
            "has no softmax attention that a prefix could be put in front of: convolutions, state-space layers and "
            "linear attention have no keys and values of single tokens. Use another method, such as LoRA."
        )
    remedy = "Load the model with `attention_type='original_full'`" if "BigBird" in sparse[0] else "Use another method"
    return (
        f"computes attention in overlapping chunks or through landmarks ({', '.join(sparse)}), in front of which no "
        f"prefix can be put. {remedy}."
    )
