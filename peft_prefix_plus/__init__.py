"""Prefix-tuning for PEFT: trainable keys and values inside the attention of any layer.

Importing the package registers the method; from then on `get_peft_model` and `PeftModel.from_pretrained` know it.
"""

from .capture import capture_prefix_states
from .config import PrefixPlusConfig
from .hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from .layer import PrefixPlusLayer
from .model import PrefixPlusModel
from .registration import register
from .states import PrefixStates
from .supported import SupportedModel, supported_model_types

__version__ = "0.1.0"

__all__ = [
    "PrefixPlusConfig",
    "PrefixPlusLayer",
    "PrefixPlusModel",
    "PrefixStates",
    "SupportedModel",
    "capture_prefix_states",
    "hotswap_adapter",
    "prepare_model_for_compiled_hotswap",
    "supported_model_types",
]

register()
