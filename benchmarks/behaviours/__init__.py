"""What people do with adapters of PEFT, written once for every method, for the tests and for docs/comparison.md."""

from . import (
    adapters,
    combining,
    generation,
    hub,
    mixed_batches,
    placement,
    saving,
    trainers,
    training_loop,
    transformers_native,
    trl_trainers,
)
from .behaviour import BEHAVIOURS, Behaviour
from .methods import METHODS, Method

__all__ = [
    "BEHAVIOURS",
    "METHODS",
    "Behaviour",
    "Method",
    "adapters",
    "combining",
    "generation",
    "hub",
    "mixed_batches",
    "placement",
    "saving",
    "trainers",
    "training_loop",
    "transformers_native",
    "trl_trainers",
]
