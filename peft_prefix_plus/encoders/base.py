"""What every parameterization of a prefix has in common: an anchor, a scale, and a trained difference."""

import torch
from torch import Tensor, nn

from ..architectures import AttentionGeometry
from ..states import PrefixStates


class PrefixEncoder(nn.Module):
    """Produces the keys and values of one adapter for one attention module.

        [K ; V] = anchor + scale * delta

    The anchor (frozen) holds where training starts, usually the keys and values of real tokens. The delta (trained) is
    zero at the start, so step 0 is the anchor exactly, and weight decay pulls back to the anchor, not to zero. The
    scale (frozen) follows the magnitude of the model's own keys and values per head, so that one learning rate fits
    all layers. Subclasses say how the delta is parameterized, in [`compute_delta`].

    Args:
        geometry ([`AttentionGeometry`]): heads, dimensions and device of the attention module.
        num_virtual_tokens (`int`): prefix length `P`.
        num_frozen_tokens (`int`): leading tokens that stay at the anchor; at most `P - 1`.
    """

    anchor_keys: Tensor
    anchor_values: Tensor
    scale_keys: Tensor
    scale_values: Tensor

    def __init__(self, geometry: AttentionGeometry, num_virtual_tokens: int, num_frozen_tokens: int = 0) -> None:
        super().__init__()
        self.geometry = geometry
        self.num_virtual_tokens = num_virtual_tokens
        self.num_trained_tokens = num_virtual_tokens - num_frozen_tokens
        self._was_initialized = False
        heads, device = geometry.num_key_value_heads, geometry.device
        # Until `initialize` or a checkpoint fills them the buffers are NaN: forgotten, they cannot pass for a prefix.
        for name, dim in (("keys", geometry.key_dim), ("values", geometry.value_dim)):
            anchor = torch.full((heads, num_virtual_tokens, dim), float("nan"), device=device)
            self.register_buffer(f"anchor_{name}", anchor)
            self.register_buffer(f"scale_{name}", torch.full((heads, 1, 1), float("nan"), device=device))

    def initialize(self, anchor: PrefixStates, scale: PrefixStates) -> None:
        """Fill the frozen part.

        Args:
            anchor (`PrefixStates`): `[1, kv_heads, at least P, dim]`; the first `P` tokens are taken.
            scale (`PrefixStates`): `[1, kv_heads, 1, 1]`.
        """
        with torch.no_grad():
            self.anchor_keys.copy_(anchor.keys[0, :, : self.num_virtual_tokens])
            self.anchor_values.copy_(anchor.values[0, :, : self.num_virtual_tokens])
            self.scale_keys.copy_(scale.keys[0])
            self.scale_values.copy_(scale.values[0])
        self._was_initialized = True

    @property
    def initialized(self) -> bool:
        """Whether the frozen part has been filled, by [`initialize`] or from a checkpoint; not on the meta device."""
        return not self.anchor_keys.is_meta and not bool(torch.isnan(self.anchor_keys).any())

    def check_initialized(self) -> None:
        """Raise a `RuntimeError` if the frozen part has not been filled; looked up until it has, and never again."""
        if self._was_initialized or torch.compiler.is_compiling() or self.anchor_keys.is_meta:
            return
        if not self.initialized:
            raise RuntimeError(
                "This prefix has no values yet: its configuration was loaded from a saved adapter "
                "(`prefix_is_initialized=True`), but no weights followed. Load the adapter with "
                "`PeftModel.from_pretrained(model, adapter_dir)`, or, to train a new prefix by the same recipe, use "
                "`dataclasses.replace(config, prefix_is_initialized=False)`."
            )
        self._was_initialized = True

    def get_start(self) -> dict[str, Tensor]:
        """Return the frozen part by the names of its tensors; encoders that have the same one started together."""
        names = ("anchor_keys", "anchor_values", "scale_keys", "scale_values")
        return {name: self.get_buffer(name) for name in names}

    def extract(self) -> "PrefixEncoder":
        """Return an encoder of the same keys and values that has none but visible tokens: most have no others."""
        return self

    def compute_delta(self) -> tuple[Tensor, Tensor]:
        """Return the trained differences `[kv_heads, num_trained_tokens, key_dim]` and `[..., value_dim]`."""
        raise NotImplementedError

    def forward(self) -> PrefixStates:
        self.check_initialized()
        delta_keys, delta_values = self.compute_delta()
        keys = self._add_scaled(self.anchor_keys, self.scale_keys, delta_keys)
        values = self._add_scaled(self.anchor_values, self.scale_values, delta_values)
        return PrefixStates(keys.unsqueeze(0), values.unsqueeze(0))

    def _add_scaled(self, anchor: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        num_frozen = self.num_virtual_tokens - self.num_trained_tokens
        if num_frozen:
            delta = nn.functional.pad(delta, (0, 0, num_frozen, 0))
        return anchor + scale * delta

    def extra_repr(self) -> str:
        geometry = self.geometry
        return (
            f"num_virtual_tokens={self.num_virtual_tokens}, num_trained_tokens={self.num_trained_tokens}, "
            f"kv_heads={geometry.num_key_value_heads}, key_dim={geometry.key_dim}, value_dim={geometry.value_dim}"
        )
