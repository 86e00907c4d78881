"""Prefix dropout: training sees a random part of the prefix."""

import torch
from torch import Tensor, nn

from .states import PrefixStates


class PrefixDropout(nn.Module):
    """Drops parts of a prefix while training; the identity in evaluation.

    `"token"` hides whole virtual tokens by mask, drawn for every sample, and leaves at least one visible, so no weight
    of the softmax falls on nothing. `"element"` is `nn.Dropout` on keys and values, drawn for every sample, as in
    Li & Liang (2021, https://arxiv.org/abs/2101.00190).

    Args:
        probability (`float`): chance that a token (or an element) is dropped, in `[0, 1)`.
        mode (`str`): `"token"` or `"element"`.
    """

    def __init__(self, probability: float, mode: str) -> None:
        super().__init__()
        self.probability = probability
        self.mode = mode

    def forward(self, states: PrefixStates, batch_size: int) -> PrefixStates:
        if not self.training or self.probability == 0.0:
            return states
        if self.mode == "token":
            visible = draw_visible_tokens(batch_size, states.num_virtual_tokens, self.probability, states.keys.device)
            return states._replace(mask=visible if states.mask is None else visible & states.mask)
        keys = states.keys.expand(batch_size, *states.keys.shape[1:])
        values = states.values.expand(batch_size, *states.values.shape[1:])
        return states._replace(
            keys=nn.functional.dropout(keys, self.probability), values=nn.functional.dropout(values, self.probability)
        )

    def extra_repr(self) -> str:
        return f"p={self.probability}, mode={self.mode!r}"


def draw_visible_tokens(batch_size: int, num_tokens: int, probability: float, device: torch.device) -> Tensor:
    """Draw which virtual tokens each sample sees.

    Args:
        batch_size (`int`): number of samples.
        num_tokens (`int`): prefix length.
        probability (`float`): chance that a token is hidden.
        device (`torch.device`): where the mask lives.

    Returns:
        `torch.Tensor`: bool `[batch_size, num_tokens]`; every row has at least one `True`.
    """
    draws = torch.rand(batch_size, num_tokens, device=device)
    # The token with the largest draw stays: it is the last that a growing probability would hide.
    survivor = draws == draws.max(dim=-1, keepdim=True).values
    return (draws >= probability) | survivor
