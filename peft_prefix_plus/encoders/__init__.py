"""How a prefix is parameterized: one strategy a file, all of them a [`PrefixEncoder`]."""

from ..architectures import AttentionGeometry
from .base import PrefixEncoder
from .direct import DirectPrefix, fold_encoder
from .projected import EMBEDDING_STEP, LinearPrefix, MLPPrefix
from .slot import PrefixSlot

PROJECTIONS = ("none", "linear", "mlp")


def build_encoder(
    projection: str,
    geometry: AttentionGeometry,
    num_virtual_tokens: int,
    num_frozen_tokens: int = 0,
    projection_dim: int = 16,
    embedding_step: float = EMBEDDING_STEP,
) -> PrefixEncoder:
    """Build the encoder that `projection` names.

    Args:
        projection (`str`): one of `PROJECTIONS`.
        geometry ([`AttentionGeometry`]): of the attention module.
        num_virtual_tokens (`int`): prefix length of this module.
        num_frozen_tokens (`int`): leading tokens that stay at their initial value.
        projection_dim (`int`): width of the projection; unused by `"none"`.
        embedding_step (`float`): how far a step moves embeddings; unused by `"none"`.

    Returns:
        [`PrefixEncoder`]: not yet initialized, in float32, on the module's device.
    """
    if projection == "none":
        return DirectPrefix(geometry, num_virtual_tokens, num_frozen_tokens)
    encoder_class = {"linear": LinearPrefix, "mlp": MLPPrefix}[projection]
    return encoder_class(geometry, num_virtual_tokens, num_frozen_tokens, projection_dim, embedding_step)


__all__ = [
    "EMBEDDING_STEP",
    "PROJECTIONS",
    "DirectPrefix",
    "LinearPrefix",
    "MLPPrefix",
    "PrefixEncoder",
    "PrefixSlot",
    "build_encoder",
    "fold_encoder",
]
