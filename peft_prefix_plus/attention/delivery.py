"""How a prefix reaches the place where one attention module computes its attention, and the proof that it did."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..architectures import count_attention_calls
from ..states import PrefixStates
from .prefixed_cache import PrefixedLayer
from .prepending import match_prefix

T = TypeVar("T")


class PrefixDelivery:
    """One prefix on its way to one attention module, with the proof that it arrived.

    Args:
        module (`nn.Module`): the attention module that the prefix is for.
        states ([`PrefixStates`]): the prefix; that of a module which attends several times in one forward has the
            heads of all its calls, one call behind the other.
        cache_layer ([`PrefixedLayer`], *optional*): where it may be put in front of the tokens.
    """

    def __init__(self, module: nn.Module, states: PrefixStates, cache_layer: PrefixedLayer | None = None) -> None:
        self.module = module
        self.cache_layer = cache_layer
        self._calls = split_calls(states, count_attention_calls(module))
        self._num_taken = 0

    def take(self) -> PrefixStates:
        """Return the prefix for the next call of the attention function."""
        states = self._calls[self._num_taken % len(self._calls)]
        self._num_taken += 1
        return states

    def peek(self) -> PrefixStates:
        """Return what [`take`] will return, without counting it as used."""
        return self._calls[self._num_taken % len(self._calls)]

    def prove_consumption(self) -> None:
        """Raise a `RuntimeError` if the prefix was not taken, or not by every call it is for."""
        if self._num_taken == 0 or self._num_taken % len(self._calls):
            raise RuntimeError(
                f"{type(self.module).__name__} computed its output without the prefix: it did not compute attention "
                "in a way that PrefixPlus knows. Exclude the module with `exclude_modules`, or report the "
                "architecture."
            )


class StatesRecorder:
    """Collects the keys and values that attention modules compute."""

    def __init__(self) -> None:
        self._calls: dict[nn.Module, list[PrefixStates]] = {}

    def record(self, module: nn.Module, states: PrefixStates) -> None:
        """Keep what one call of the attention function got."""
        detached = PrefixStates(states.keys.detach(), states.values.detach())
        self._calls.setdefault(module, []).append(detached)

    def get_states(self) -> dict[nn.Module, PrefixStates]:
        """Return what the first forward of every module left."""
        return {module: join_calls(calls[: count_attention_calls(module)]) for module, calls in self._calls.items()}


def split_calls(states: PrefixStates, num_calls: int) -> list[PrefixStates]:
    """Split a prefix of several calls of the attention function along the heads."""
    if num_calls == 1:
        return [states]
    keys, values = states.keys.chunk(num_calls, dim=1), states.values.chunk(num_calls, dim=1)
    return [PrefixStates(key, value, states.mask) for key, value in zip(keys, values, strict=True)]


def join_calls(calls: list[PrefixStates]) -> PrefixStates:
    """The inverse of [`split_calls`]."""
    if len(calls) == 1:
        return calls[0]
    return PrefixStates(torch.cat([call.keys for call in calls], dim=1), torch.cat([c.values for c in calls], dim=1))


class _Channel(threading.local):
    """What attention functions find in the current thread; layers fill it around the module's forward."""

    delivery: PrefixDelivery | None
    recorder: StatesRecorder | None

    def __init__(self) -> None:
        # In every thread: a compiled forward would be compiled again once attributes of the class become its own.
        self.delivery = None
        self.recorder = None


_channel = _Channel()


def current_recorder() -> StatesRecorder | None:
    """The recorder of the current thread, if one is listening."""
    return _channel.recorder


def take_prefix(module: nn.Module) -> PrefixStates:
    """Take the prefix that is on its way to a module, for one call of its attention function.

    Raises:
        RuntimeError: if there is none, because the module was called past its layer.
    """
    return _find_delivery(module).take()


def take_matching_prefix(module: nn.Module, key: Tensor, value: Tensor) -> PrefixStates:
    """Take it, matched to the keys and values of the tokens, and joined with them where the cache has room.

    Args:
        module (`nn.Module`): a routed attention module.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.

    Returns:
        [`PrefixStates`]: with the batch size, dtype and device of the tokens.

    Raises:
        RuntimeError: like [`take_prefix`].
        ValueError: like [`match_prefix`].
    """
    delivery = _find_delivery(module)
    states = delivery.take()
    joined = None if delivery.cache_layer is None else delivery.cache_layer.join(states, key, value)
    return match_prefix(states, key, value) if joined is None else joined


def peek_prefix(module: nn.Module) -> PrefixStates:
    """Look at the prefix that is on its way to a module, which does not count as its use."""
    return _find_delivery(module).peek()


def _find_delivery(module: nn.Module) -> PrefixDelivery:
    delivery = _channel.delivery
    if delivery is None or delivery.module is not module:
        raise RuntimeError(
            f"{type(module).__name__} was called past its PrefixPlus layer, so its prefix would be ignored. Call the "
            "layer that replaced it, or remove the adapter with `model.unload()`."
        )
    return delivery


def deliver_prefix(delivery: PrefixDelivery, run: Callable[[], T]) -> T:
    """Have a prefix ready for a module's attention function while it runs, and prove afterwards that it was used.

    Args:
        delivery ([`PrefixDelivery`]): the prefix of an attention module.
        run (`Callable`): runs the module.

    Returns:
        What `run` returns.

    Raises:
        RuntimeError: if the module did not use the prefix.
    """
    previous = _channel.delivery
    _channel.delivery = delivery
    try:
        output = run()
    finally:
        _channel.delivery = previous
    delivery.prove_consumption()
    return output


@contextmanager
def listen(recorder: StatesRecorder) -> Iterator[None]:
    """Let attention functions hand what they get to a recorder, in the current thread."""
    previous = _channel.recorder
    _channel.recorder = recorder
    try:
        yield
    finally:
        _channel.recorder = previous
