"""`projection="linear"` and `"mlp"`: per layer, a projection of a small embedding per virtual token."""

from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import AttentionGeometry
from .base import PrefixEncoder

EMBEDDING_STEP = 4.0


def _add_missing_step(encoder: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Weights that were saved before embeddings had a step had that of the projection."""
    if f"{prefix}embedding" in state_dict:
        state_dict.setdefault(f"{prefix}embedding_step", torch.ones(()))


class LinearPrefix(PrefixEncoder):
    """The delta is `(W s e_p + b) / sqrt(projection_dim)` for a trained embedding `e_p` of every virtual token.

    `W` and `b` start at zero, so the delta does; `s e_p` starts at random and of size one, so gradients reach `W` at
    once. The division keeps a step of Adam about as large for every width, so a learning rate carries over. `s` makes
    the steps of what belongs to a single token larger than those of what all tokens share, as LoRA+ does with the two
    factors of LoRA (https://arxiv.org/abs/2402.12354).

    Args:
        geometry, num_virtual_tokens, num_frozen_tokens: see [`PrefixEncoder`].
        projection_dim (`int`): width of the embedding.
        embedding_step (`float`): `s`. It is saved with the weights, which mean nothing without it.
    """

    embedding_step: Tensor

    def __init__(
        self,
        geometry: AttentionGeometry,
        num_virtual_tokens: int,
        num_frozen_tokens: int = 0,
        projection_dim: int = 16,
        embedding_step: float = EMBEDDING_STEP,
    ) -> None:
        super().__init__(geometry, num_virtual_tokens, num_frozen_tokens)
        device = geometry.device
        self.register_buffer("embedding_step", torch.tensor(float(embedding_step), device=device))
        self.register_load_state_dict_pre_hook(_add_missing_step)  # type: ignore[no-untyped-call]
        out_features = geometry.num_key_value_heads * (geometry.key_dim + geometry.value_dim)
        features = torch.randn(self.num_trained_tokens, projection_dim, device=device)
        self.embedding = nn.Parameter(features / embedding_step)
        self.output_weight = nn.Parameter(torch.zeros(out_features, projection_dim, device=device))
        self.output_bias = nn.Parameter(torch.zeros(out_features, device=device))

    def compute_delta(self) -> tuple[Tensor, Tensor]:
        projected = nn.functional.linear(self.compute_features(), self.output_weight, self.output_bias)
        projected = projected / self.embedding.shape[-1] ** 0.5
        heads, key_dim, value_dim = (
            self.geometry.num_key_value_heads,
            self.geometry.key_dim,
            self.geometry.value_dim,
        )
        # [tokens, heads * (key_dim + value_dim)] -> [heads, tokens, key_dim + value_dim]
        per_head = projected.view(-1, heads, key_dim + value_dim).transpose(0, 1)
        keys, values = torch.split_with_sizes(per_head, [key_dim, value_dim], dim=-1)
        return keys, values

    def compute_features(self) -> Tensor:
        """What the last linear map reads, `[num_trained_tokens, projection_dim]`."""
        return self.embedding_step * self.embedding


class MLPPrefix(LinearPrefix):
    """The delta is `(W tanh(U s e_p + c) + b) / sqrt(projection_dim)`: the network of Li & Liang (2021), per layer.

    Args:
        geometry, num_virtual_tokens, num_frozen_tokens, projection_dim, embedding_step: see [`LinearPrefix`].
    """

    def __init__(
        self,
        geometry: AttentionGeometry,
        num_virtual_tokens: int,
        num_frozen_tokens: int = 0,
        projection_dim: int = 16,
        embedding_step: float = EMBEDDING_STEP,
    ) -> None:
        super().__init__(geometry, num_virtual_tokens, num_frozen_tokens, projection_dim, embedding_step)
        device = geometry.device
        bound = projection_dim**-0.5
        self.hidden_weight = nn.Parameter(torch.empty(projection_dim, projection_dim, device=device))
        self.hidden_bias = nn.Parameter(torch.zeros(projection_dim, device=device))
        nn.init.uniform_(self.hidden_weight, -bound, bound)

    def compute_features(self) -> Tensor:
        return torch.tanh(nn.functional.linear(super().compute_features(), self.hidden_weight, self.hidden_bias))
