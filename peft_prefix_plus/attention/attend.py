"""Runs attention modules with a prefix, or listens to them, whichever way they compute attention."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..architectures import uses_attention_interface
from ..states import PrefixStates
from .arithmetic import attend_by_arithmetic, record_arithmetic
from .delivery import PrefixDelivery, StatesRecorder, deliver_prefix, listen
from .prefixed_cache import find_dynamic_layer, run_prefixed
from .routing import original_config, route_config


def attend_with_prefix(module: nn.Module, states: PrefixStates, *args: Any, **kwargs: Any) -> Any:
    """Run an attention module with a prefix.

    Args:
        module (`nn.Module`): an attention module; a routed one if it uses the attention interface.
        states ([`PrefixStates`]): its prefix.
        *args, **kwargs: what the module's forward takes.

    Returns:
        What the module returns.

    Raises:
        RuntimeError: if the module did not use the prefix.
    """
    if not uses_attention_interface(module):
        return deliver_prefix(PrefixDelivery(module, states), lambda: attend_by_arithmetic(module, *args, **kwargs))
    cache_layer = find_dynamic_layer(module, kwargs.get("past_key_values"))
    if cache_layer is None:
        return deliver_prefix(PrefixDelivery(module, states), lambda: module(*args, **kwargs))
    return run_prefixed(
        cache_layer,
        lambda layer: deliver_prefix(PrefixDelivery(module, states, layer), lambda: module(*args, **kwargs)),
    )


@contextmanager
def record_states(modules: Sequence[nn.Module]) -> Iterator[StatesRecorder]:
    """Record the keys and values that some modules attend to.

    Args:
        modules (`Sequence[nn.Module]`): attention modules; their forwards run inside the context.

    Yields:
        [`StatesRecorder`]: filled by the forwards.
    """
    recorder = StatesRecorder()
    routed = [module for module in modules if uses_attention_interface(module)]
    others = [module for module in modules if not uses_attention_interface(module)]
    original_configs = [module.config for module in routed]
    try:
        for module in routed:
            module.config = route_config(original_config(module))
        with listen(recorder), record_arithmetic(others):
            yield recorder
    finally:
        for module, config in zip(routed, original_configs, strict=True):
            module.config = config
