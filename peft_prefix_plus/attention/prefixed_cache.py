"""Cache layers with room in front of the tokens, so that a prefix and the tokens lie in one piece.

For every token, the dynamic cache of transformers copies all keys and values that it has; putting a prefix in front of
them would copy them once more. Here the prefix is copied together with the tokens, while they are few; many tokens get
spare rows behind them, where the next ones are written.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..architectures import find_cache_index
from ..states import PrefixStates
from .prepending import match_prefix

# Copying fewer bytes of keys takes less time than writing behind them.
_MIN_BYTES_TO_GROW = 2**18
# On a CPU, attending to a prefix that rows share takes less time than attending to more copies of it.
_MAX_COPIED_ROWS = 512
# A full storage gets a quarter of its rows as spare ones.
_SPARE_SHARE = 4


class _Storage:
    """Keys and values behind a prefix. What was written is never written again: whoever holds a view may keep it.

    Args:
        keys (`torch.Tensor`): `[batch, kv_heads, P + tokens, key_dim]`.
        values (`torch.Tensor`): `[batch, kv_heads, P + tokens, value_dim]`.
        states ([`PrefixStates`]): the prefix in them, before it was matched.
        prefix ([`PrefixStates`]): matched to the tokens.

    Attributes:
        joined (`tuple[torch.Tensor, torch.Tensor]`): the rows in use of both.
        tokens (`tuple[torch.Tensor, torch.Tensor]`): the same without the prefix.
    """

    def __init__(self, keys: Tensor, values: Tensor, states: PrefixStates, prefix: PrefixStates) -> None:
        self.states: PrefixStates | None = states
        self.prefix = prefix
        self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self._spacious: tuple[Tensor, Tensor] | None = None
        self._show(keys, values)

    def _show(self, keys: Tensor, values: Tensor) -> None:
        self.joined = keys, values
        length = self.prefix.num_virtual_tokens
        num_tokens = keys.shape[2] - length
        self.tokens = keys.narrow(2, length, num_tokens), values.narrow(2, length, num_tokens)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Put rows behind the last ones."""
        held, new = self.joined, (keys, values)
        if held[0].nbytes < _MIN_BYTES_TO_GROW:
            self._hold(torch.cat((held[0], keys), 2), torch.cat((held[1], values), 2))
            return
        start, num_new = held[0].shape[2], keys.shape[2]
        if not self._has_room(start + num_new):
            num_rows = start + num_new + start // _SPARE_SHARE
            self._spacious = _copy_to_storage(held[0], num_rows), _copy_to_storage(held[1], num_rows)
        assert self._spacious is not None
        for storage, rows in zip(self._spacious, new, strict=True):
            storage.narrow(2, start, num_new).copy_(rows)
        self._show(*(storage.narrow(2, 0, start + num_new) for storage in self._spacious))

    def put_in_front(self, states: PrefixStates, prefix: PrefixStates) -> bool:
        """Put another prefix in the place of the one in front; returns whether it fits there."""
        keys, values = self.joined
        if prefix.keys.shape != self.prefix.keys.shape or not _may_write(keys):
            return False
        keys.narrow(2, 0, prefix.num_virtual_tokens).copy_(prefix.keys)
        values.narrow(2, 0, prefix.num_virtual_tokens).copy_(prefix.values)
        self.states, self.prefix = states, prefix
        return True

    def reorder(self, indices: Tensor) -> None:
        """Put rows of the batch in another order."""
        keys, values = (rows.index_select(0, indices.to(rows.device)) for rows in self.joined)
        # Which row of the prefix belongs to which is asked again.
        self.states = None
        self._hold(keys, values)

    def crop(self, num_tokens: int) -> None:
        """Keep the first tokens."""
        length = self.prefix.num_virtual_tokens + num_tokens
        keys, values = self.joined
        self._hold(keys.narrow(2, 0, length), values.narrow(2, 0, length))

    def _has_room(self, num_rows: int) -> bool:
        if self._spacious is None or self._spacious[0].shape[2] < num_rows:
            return False
        return _may_write(self._spacious[0])


def _may_write(rows: Tensor) -> bool:
    """What inference mode made cannot be written to outside of it."""
    return torch.is_inference_mode_enabled() or not rows.is_inference()


def _copy_to_storage(rows: Tensor, num_rows: int) -> Tensor:
    batch, heads, num_held, dim = rows.shape
    storage = rows.new_empty(batch, heads, num_rows, dim)
    storage.narrow(2, 0, num_held).copy_(rows)
    return storage


class PrefixedLayer(DynamicLayer):
    """A dynamic cache layer that may have a prefix in front of its tokens; `keys` and `values` are the tokens alone.

    Args:
        layer (`DynamicLayer`): the layer whose place it takes, with what that holds.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.__dict__ |= layer.__dict__
        self._storage: _Storage | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        storage = self._storage
        if storage is not None and self._holds(storage) and _can_follow(storage, key_states, value_states):
            storage.append(key_states, value_states)
            self.keys, self.values = storage.tokens
            return storage.tokens
        self._storage = None
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return updated

    def join(self, states: PrefixStates, key: Tensor, value: Tensor) -> PrefixStates | None:
        """Put a prefix in front of the tokens, unless it stands there already.

        Args:
            states ([`PrefixStates`]): the prefix.
            key, value (`torch.Tensor`): what an attention function got.

        Returns:
            [`PrefixStates`], *optional*: the prefix, matched to the tokens and joined with them; `None` if these are
            not the keys and values of this layer, or on a CPU, if the rows of a batch had too many copies of it.
        """
        if key is not self.keys or value is not self.values or not _are_plain(key, value):
            return None
        storage = self._storage if self._storage is not None and self._holds(self._storage) else None
        if storage is None or storage.states is not states:
            prefix = match_prefix(states, key, value)
            if key.device.type == "cpu" and key.shape[0] * prefix.num_virtual_tokens > _MAX_COPIED_ROWS:
                return None
            if storage is None or not storage.put_in_front(states, prefix):
                keys, values = torch.cat((prefix.keys, key), 2), torch.cat((prefix.values, value), 2)
                self._storage = storage = _Storage(keys, values, states, prefix)
                self.keys, self.values = storage.tokens
        return storage.prefix._replace(joined=storage.joined)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        storage = self._storage
        if storage is None or not self._holds(storage):
            super().reorder_cache(beam_idx)
            return
        storage.reorder(beam_idx)
        self.keys, self.values = storage.tokens

    def crop(self, *args: Any, **kwargs: Any) -> None:
        storage = self._storage if self._storage is not None and self._holds(self._storage) else None
        super().crop(*args, **kwargs)
        if storage is not None:
            storage.crop(self.keys.shape[2])
            self.keys, self.values = storage.tokens

    def _holds(self, storage: _Storage) -> bool:
        """Whether nobody has put other tensors in the place of the tokens: to reorder rows, or to remove tokens."""
        keys, values = storage.tokens
        return self.keys is keys and self.values is values


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
    """Whether nobody needs tensors as they are now: no gradient, no compiled code, no transform."""
    return (
        type(keys) is type(values) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def find_prefixed_layer(module: nn.Module, cache: Any) -> PrefixedLayer | None:
    """Find the cache layer of an attention module, and have it take a prefix.

    Args:
        module (`nn.Module`): an attention module.
        cache (`Cache`, *optional*): what it is called with.

    Returns:
        [`PrefixedLayer`], *optional*: `None` where gradients or compiled code need the tensors as they are, and for
        other caches than a `DynamicCache` that stays on its device.
    """
    if type(cache) is not DynamicCache or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    index = find_cache_index(module)
    if index is None or index >= len(cache.layers) or cache.offloading:
        return None
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        layer = cache.layers[index] = PrefixedLayer(layer)
    return layer if type(layer) is PrefixedLayer else None
