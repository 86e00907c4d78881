"""Tiny models of any type that transformers knows, from the zoo of `benchmarks/matrix`."""

import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "matrix"))

from zoo import GENERATION, MAPPINGS, build_inputs, build_tiny_config, build_tiny_model

__all__ = ["build_inputs", "build_zoo_model", "draw_text"]


def build_zoo_model(
    group: str, model_type: str, implementation: str | None = None, **settings: object
) -> PreTrainedModel:
    """Build a model in evaluation mode; equal arguments give equal weights.

    It is frozen, as under an adapter: kernels are chosen by it, so outputs can be compared bit by bit.

    Args:
        group: of the zoo.
        model_type: of transformers.
        implementation: of its attention.
        settings: fields of its configuration.
    """
    # Also for the adapter that the model gets.
    torch.manual_seed(0)
    if implementation is None and not settings:
        return build_tiny_model(group, model_type).requires_grad_(False)
    config = build_tiny_config(model_type, is_decoder=group == "causal")
    for name, value in settings.items():
        setattr(config, name, value)
    auto_class = getattr(transformers, MAPPINGS[group][0][1])
    model: PreTrainedModel = auto_class.from_config(config, attn_implementation=implementation)
    if model.can_generate():
        model.generation_config.update(**GENERATION)
    return model.eval().requires_grad_(False)


def draw_text(batch_size: int = 2, length: int = 7) -> Tensor:
    """Ids without padding and special tokens."""
    return torch.randint(2, 80, (batch_size, length), generator=torch.Generator().manual_seed(1))
