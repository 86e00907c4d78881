"""A prefix in front of the tokens in a cache, in one piece with them.

For every token, the dynamic cache of transformers copies all keys and values that it has; putting a prefix in front of
them would copy them once more. Here the prefix is copied together with the tokens, while they are few; many tokens get
spare rows behind them, where the next ones are written. The layers of the cache stay what they are for everybody else.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..architectures import find_cache_index
from ..states import PrefixStates
from .prepending import match_prefix

T = TypeVar("T")

# Copying fewer bytes of keys takes less time than writing behind them.
_MIN_BYTES_TO_GROW = 2**18
# On a CPU, attending to a prefix that rows share takes less time than attending to more copies of it.
_MAX_COPIED_ROWS = 512
# A full storage gets a quarter of its rows as spare ones.
_SPARE_SHARE = 4


class _Storage:
    """Keys and values behind a prefix. Tokens that were written are never written again: views of them may be kept.

    Args:
        states ([`PrefixStates`]): the prefix, before it was matched.
        prefix ([`PrefixStates`]): the same, matched to the tokens.
        key, value (`torch.Tensor`): those of the tokens.

    Attributes:
        joined (`tuple[torch.Tensor, torch.Tensor]`): prefix and tokens, `[batch, kv_heads, P + tokens, dim]`.
        tokens (`tuple[torch.Tensor, torch.Tensor]`): views of the tokens alone.
    """

    def __init__(self, states: PrefixStates, prefix: PrefixStates, key: Tensor, value: Tensor) -> None:
        self.states, self.prefix = states, prefix
        self._spacious: tuple[Tensor, Tensor] | None = None
        self._show(torch.cat((prefix.keys, key), 2), torch.cat((prefix.values, value), 2))

    def is_shown_by(self, layer: DynamicLayer) -> bool:
        """Whether a cache layer holds these tokens, and nobody has put others in their place."""
        keys, values = self.tokens
        return (
            layer.keys is keys
            and layer.values is values
            # Of the same tensor, the memory may have been exchanged.
            and (keys.data_ptr(), values.data_ptr()) == self._places
        )

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Put rows behind the last ones."""
        held = self.joined
        if held[0].nbytes < _MIN_BYTES_TO_GROW:
            self._show(torch.cat((held[0], keys), 2), torch.cat((held[1], values), 2))
            return
        start, num_new = held[0].shape[2], keys.shape[2]
        spacious = self._spacious
        if spacious is None or spacious[0].shape[2] < start + num_new or not _may_write(spacious[0]):
            num_rows = start + num_new + start // _SPARE_SHARE
            self._spacious = spacious = _copy_to_storage(held[0], num_rows), _copy_to_storage(held[1], num_rows)
        for storage, rows in zip(spacious, (keys, values), strict=True):
            _write(storage, start, rows)
        # `narrow` takes twice as long as a slice.
        self._show(*(storage[:, :, : start + num_new] for storage in spacious))

    def put_in_front(self, states: PrefixStates, prefix: PrefixStates) -> bool:
        """Put another prefix in the place of the one in front; returns whether it fits there."""
        keys, values = self.joined
        if prefix.keys.shape != self.prefix.keys.shape or not _may_write(keys):
            return False
        _write(keys, 0, prefix.keys)
        _write(values, 0, prefix.values)
        self.states, self.prefix = states, prefix
        return True

    def _show(self, keys: Tensor, values: Tensor) -> None:
        self.joined = keys, values
        length = self.prefix.num_virtual_tokens
        self.tokens = keys[:, :, length:], values[:, :, length:]
        self._places = self.tokens[0].data_ptr(), self.tokens[1].data_ptr()


def _may_write(rows: Tensor) -> bool:
    """What inference mode made cannot be written to outside of it."""
    return torch.is_inference_mode_enabled() or not rows.is_inference()


def _write(storage: Tensor, start: int, rows: Tensor) -> None:
    """Write where nobody reads yet; past autograd, for which views of other rows would count as changed."""
    storage.data[:, :, start : start + rows.shape[2]] = rows


def _copy_to_storage(rows: Tensor, num_rows: int) -> Tensor:
    batch, heads, _, dim = rows.shape
    storage = rows.new_empty(batch, heads, num_rows, dim)
    _write(storage, 0, rows)
    return storage


_storages: WeakKeyDictionary[DynamicLayer, _Storage] = WeakKeyDictionary()
# Layers whose tokens others replace, to reorder rows or to remove tokens. They are likely to do it again.
_restless: WeakSet[DynamicLayer] = WeakSet()


class PrefixedLayer(DynamicLayer):
    """What a dynamic cache layer is while an attention module with a prefix runs."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        storage = _storages.get(self)
        if storage is not None and storage.is_shown_by(self) and _can_follow(storage, key_states, value_states):
            storage.append(key_states, value_states)
            self.keys, self.values = storage.tokens
            return storage.tokens
        if storage is not None:
            del _storages[self]
            # Not after `reset`, from where the cache begins anew.
            if self.is_initialized:
                _restless.add(self)
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return updated

    def join(self, states: PrefixStates, key: Tensor, value: Tensor) -> PrefixStates | None:
        """Put a prefix in front of the tokens, unless it stands there already.

        Args:
            states ([`PrefixStates`]): the prefix.
            key, value (`torch.Tensor`): what an attention function got.

        Returns:
            [`PrefixStates`], *optional*: the prefix, matched to the tokens and joined with them; `None` if these are
            not the keys and values of this layer, or if copies would take longer than they save.
        """
        if key is not self.keys or value is not self.values or self in _restless or not _are_plain(key, value):
            return None
        storage = _storages.get(self)
        if storage is not None and not storage.is_shown_by(self):
            storage = None
        if storage is None or storage.states is not states:
            if key.device.type == "cpu" and key.shape[0] * states.num_virtual_tokens > _MAX_COPIED_ROWS:
                return None
            prefix = match_prefix(states, key, value)
            if storage is None or not storage.put_in_front(states, prefix):
                _storages[self] = storage = _Storage(states, prefix, key, value)
                self.keys, self.values = storage.tokens
        return PrefixStates(*storage.prefix[:4], storage.joined)


def _can_follow(storage: _Storage, keys: Tensor, values: Tensor) -> bool:
    """Whether rows may be put behind those of a storage; what does not fit is left to transformers."""
    held, _ = storage.joined
    return (
        _are_plain(keys, values)
        and keys.dtype == values.dtype == held.dtype
        and keys.device == held.device
        and keys.shape[:2] == held.shape[:2]
        and keys.shape[:3] == values.shape[:3]
    )


def _are_plain(keys: Tensor, values: Tensor) -> bool:
    return type(keys) is type(values) is Tensor


def find_dynamic_layer(module: nn.Module, cache: Any) -> DynamicLayer | None:
    """Find the layer of a cache that an attention module writes to, if a prefix may stand in front of its tokens.

    Args:
        module (`nn.Module`): an attention module.
        cache (`Cache`, *optional*): what it is called with.

    Returns:
        `DynamicLayer`, *optional*: `None` where gradients, compiled code or transforms need the tensors as they are,
        and for other caches than a `DynamicCache` that stays on its device.
    """
    if type(cache) is not DynamicCache or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    index = find_cache_index(module)
    if index is None or index >= len(cache.layers) or cache.offloading:
        return None
    layer = cache.layers[index]
    return layer if type(layer) is DynamicLayer else None


def run_prefixed(layer: DynamicLayer, run: Callable[[PrefixedLayer], T]) -> T:
    """Have a cache layer take a prefix while something runs.

    Args:
        layer (`DynamicLayer`): keeps its identity, and is of its own class again afterwards.
        run (`Callable`): what runs.

    Returns:
        What `run` returns.
    """
    layer.__class__ = PrefixedLayer
    try:
        return run(cast(PrefixedLayer, layer))
    finally:
        layer.__class__ = DynamicLayer
