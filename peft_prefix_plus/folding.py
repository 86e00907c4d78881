"""Replaces a projection by its result."""

import torch

from .encoders import DirectPrefix, PrefixEncoder
from .states import PrefixStates


@torch.no_grad()
def fold_encoder(encoder: PrefixEncoder) -> DirectPrefix:
    """Return a direct encoder with the same keys and values, bit for bit.

    Args:
        encoder ([`PrefixEncoder`]): any initialised encoder; left as it is.

    Returns:
        [`DirectPrefix`]: its anchor is the result, its delta zero; it trains if the encoder does.
    """
    states = encoder()
    num_frozen_tokens = encoder.num_virtual_tokens - encoder.num_trained_tokens
    folded = DirectPrefix(encoder.geometry, encoder.num_virtual_tokens, num_frozen_tokens).to(states.keys.device)
    folded.initialize(states, PrefixStates(encoder.scale_keys[None], encoder.scale_values[None]))
    folded.requires_grad_(any(parameter.requires_grad for parameter in encoder.parameters()))
    return folded.train(encoder.training)
