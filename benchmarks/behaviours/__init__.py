"""What people do with PEFT adapters, written once for every method: run by the tests, and for the table of the docs."""

from . import adapters, hub, placement, trainers, transformers_native, trl_trainers
from .behaviour import BEHAVIOURS, Behaviour
from .methods import METHODS, Method

__all__ = [
    "BEHAVIOURS",
    "METHODS",
    "Behaviour",
    "Method",
    "adapters",
    "hub",
    "placement",
    "trainers",
    "transformers_native",
    "trl_trainers",
]
