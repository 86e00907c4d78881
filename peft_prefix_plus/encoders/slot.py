"""A place for finished prefixes of different lengths, filled in place, so that a compiled model stays compiled."""

from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import AttentionGeometry
from ..states import PrefixStates
from .base import PrefixEncoder
from .direct import DirectPrefix


class PrefixSlot(PrefixEncoder):
    """Holds the finished keys and values of one adapter at a time; shorter ones stand behind hidden virtual tokens.

        [hidden, ..., hidden | K_1, ..., K_P]

    The hidden ones are in front, so that the others keep their distance to the text. Nothing in a slot is trained. Its
    state dict is that of a [`DirectPrefix`] without the hidden tokens, so that what is saved is an ordinary adapter.

    Args:
        geometry ([`AttentionGeometry`]): heads, dimensions and device of the attention module.
        num_virtual_tokens (`int`): length of the longest prefix that fits.
    """

    visible: Tensor

    def __init__(self, geometry: AttentionGeometry, num_virtual_tokens: int) -> None:
        super().__init__(geometry, num_virtual_tokens)
        visible = torch.zeros(1, num_virtual_tokens, dtype=torch.bool, device=geometry.device)
        self.register_buffer("visible", visible, persistent=False)
        self._num_filled = 0
        self._num_frozen = 0

    @torch.no_grad()
    def fill(self, encoder: PrefixEncoder) -> None:
        """Take over the keys and values of another encoder, in place.

        Args:
            encoder ([`PrefixEncoder`]): initialized, of the same geometry, and no longer than the slot.
        """
        source = encoder.extract()
        states = source()
        num_hidden = self.num_virtual_tokens - source.num_virtual_tokens
        for buffer, given in ((self.anchor_keys, states.keys[0]), (self.anchor_values, states.values[0])):
            # Not only hidden: a value that is no number would spoil the sum in which its weight is zero.
            buffer[:, :num_hidden].zero_()
            buffer[:, num_hidden:].copy_(given)
        self.scale_keys.copy_(source.scale_keys)
        self.scale_values.copy_(source.scale_values)
        self.visible.copy_(torch.arange(self.num_virtual_tokens, device=self.visible.device) >= num_hidden)
        self._num_filled = source.num_virtual_tokens
        self._num_frozen = source.num_virtual_tokens - source.num_trained_tokens
        self._was_initialized = True

    def extract(self) -> DirectPrefix:
        """Return a direct encoder with the keys and values that the slot holds, bit for bit."""
        encoder = DirectPrefix(self.geometry, self._num_filled, self._num_frozen).to(self.anchor_keys.device)
        encoder.load_state_dict(self.state_dict())
        return encoder.train(self.training)

    def forward(self) -> PrefixStates:
        self.check_initialized()
        return PrefixStates(self.anchor_keys.unsqueeze(0), self.anchor_values.unsqueeze(0), self.visible)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        first = self.num_virtual_tokens - self._num_filled
        for name in ("keys", "values"):
            anchor = self.get_buffer(f"anchor_{name}")[:, first:].clone()
            destination[f"{prefix}anchor_{name}"] = anchor
            destination[f"{prefix}scale_{name}"] = self.get_buffer(f"scale_{name}").clone()
            destination[f"{prefix}delta_{name}"] = torch.zeros_like(anchor[:, self._num_frozen :])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        tensors = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
        missing = [f"{prefix}{name}" for name in self.state_dict() if name not in tensors]
        missing_keys.extend(missing)
        if missing:
            return
        num_tokens = tensors["anchor_keys"].shape[1]
        if num_tokens > self.num_virtual_tokens:
            error_msgs.append(f"{prefix} has room for {self.num_virtual_tokens} virtual tokens, not for {num_tokens}.")
            return
        num_frozen = num_tokens - tensors["delta_keys"].shape[1]
        encoder = DirectPrefix(self.geometry, num_tokens, num_frozen).to(self.anchor_keys.device)
        nn.Module.load_state_dict(encoder, tensors)
        self.fill(encoder)
