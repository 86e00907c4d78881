"""`projection="none"`: every element of the keys and values is trained."""

import torch
from torch import Tensor, nn

from ..architectures import AttentionGeometry
from ..states import PrefixStates
from .base import PrefixEncoder


class DirectPrefix(PrefixEncoder):
    """The delta is a free tensor, `2 * kv_heads * P * head_dim` parameters.

    Args:
        geometry, num_virtual_tokens, num_frozen_tokens: see [`PrefixEncoder`].
    """

    def __init__(self, geometry: AttentionGeometry, num_virtual_tokens: int, num_frozen_tokens: int = 0) -> None:
        super().__init__(geometry, num_virtual_tokens, num_frozen_tokens)
        shape = (geometry.num_key_value_heads, self.num_trained_tokens)
        self.delta_keys = nn.Parameter(torch.zeros(*shape, geometry.key_dim, device=geometry.device))
        self.delta_values = nn.Parameter(torch.zeros(*shape, geometry.value_dim, device=geometry.device))

    def compute_delta(self) -> tuple[Tensor, Tensor]:
        return self.delta_keys, self.delta_values


@torch.no_grad()
def fold_encoder(encoder: PrefixEncoder) -> PrefixEncoder:
    """Return a direct encoder with the same keys and values, bit for bit.

    Args:
        encoder ([`PrefixEncoder`]): any initialized encoder; left as it is.

    Returns:
        [`PrefixEncoder`]: a [`DirectPrefix`] whose anchor is the result and whose delta is zero; it trains if the
            encoder does. A slot, which holds a result already, is returned itself.
    """
    states = encoder()
    if states.mask is not None:
        return encoder
    num_frozen_tokens = encoder.num_virtual_tokens - encoder.num_trained_tokens
    folded = DirectPrefix(encoder.geometry, encoder.num_virtual_tokens, num_frozen_tokens).to(states.keys.device)
    folded.initialize(states, PrefixStates(encoder.scale_keys[None], encoder.scale_values[None]))
    folded.requires_grad_(any(parameter.requires_grad for parameter in encoder.parameters()))
    return folded.train(encoder.training)
