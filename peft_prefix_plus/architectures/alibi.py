"""Linear position biases (ALiBi), continued from the tokens to the prefix in front of them."""

import sys
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


@dataclass(frozen=True)
class AlibiSlopes:
    """How an attention module penalizes distance.

    Attributes:
        slopes (`torch.Tensor`): per head, `[heads]`: what one position further to the right adds to a score.
        counts_from_end (`bool`): whether the last key of a batch has the bias 0; otherwise, the first token of a text.
        mask_scale (`float`, *optional*): the factor under which the model has merged the biases into the mask.
    """

    slopes: Tensor
    counts_from_end: bool = False
    mask_scale: float | None = None

    def continue_bias(self, bias: Tensor, num_virtual_tokens: int) -> Tensor:
        """Return the biases of a prefix whose last token stands right before the first key.

        Args:
            bias (`torch.Tensor`): of the keys, `[batch * heads or heads, 1, tokens]` or `[batch, heads, 1, tokens]`.
            num_virtual_tokens (`int`): the prefix length `P`.

        Returns:
            `torch.Tensor`: `[heads, 1, P]`, repeated along the first axis as in `bias`.
        """
        columns = self.spread(num_virtual_tokens, bias.device, bias.dtype)
        if bias.dim() == 3:
            columns = columns.repeat(bias.shape[0] // columns.shape[0], 1, 1)
        return columns + bias[..., :1] if self.counts_from_end else columns

    def spread(self, num_virtual_tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Biases of the positions `-P, ..., -1`, `[heads, 1, P]`."""
        positions = torch.arange(-num_virtual_tokens, 0, device=device)
        return (self.slopes.to(device)[:, None, None] * positions).to(dtype)

    def skip_padding(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """How far the first token of every row lies behind the first key, in biases.

        Args:
            hidden (`torch.Tensor`): `True` where a token is hidden, `[batch, 1, queries, tokens]`.
            dtype (`torch.dtype`): of the scores.

        Returns:
            `torch.Tensor`: `[batch, heads, 1, 1]`.
        """
        num_padded = hidden[:, :, -1, :].long().cumprod(dim=-1).sum(dim=-1)[..., None, None]
        return (self.slopes.to(hidden.device)[:, None, None] * num_padded).to(dtype)


# Building them takes longer than an attention of few tokens, and every forward asks.
_known: WeakKeyDictionary[Any, AlibiSlopes | None] = WeakKeyDictionary()


def read_alibi_slopes(module: Any) -> AlibiSlopes | None:
    """Read the slopes of a module that adds linear position biases, with the functions of its modeling file, once.

    Args:
        module (`nn.Module`): an attention module.

    Returns:
        [`AlibiSlopes`], *optional*: `None` if it adds none.
    """
    if module not in _known:
        _known[module] = _build_alibi_slopes(module)
    return _known[module]


def _build_alibi_slopes(module: Any) -> AlibiSlopes | None:
    file = vars(sys.modules[type(module).__module__])
    if "build_mpt_alibi_tensor" in file:
        bias = file["build_mpt_alibi_tensor"](module.n_heads, 2)
        return AlibiSlopes(bias[:, 0, 1] - bias[:, 0, 0], counts_from_end=True)
    if "build_alibi_tensor" not in file:
        return None
    # Falcon may also use rotary positions; if not, it hands the biases over in the mask.
    settings = vars(module.config) if "config" in vars(module) else {}
    if not settings.get("alibi", True):
        return None
    bias = file["build_alibi_tensor"](torch.ones(1, 2, dtype=torch.long), module.num_heads, torch.float32)
    return AlibiSlopes(
        bias[:, 0, 1] - bias[:, 0, 0], mask_scale=module.head_dim**-0.5 if "alibi" in settings else None
    )
