"""Makes PrefixPlus known to PEFT and to the attention interface of transformers."""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method
from transformers import AttentionInterface, AttentionMaskInterface

from .attention import ROUTE_NAME, prefix_attention_forward, refuse_mask
from .config import PrefixPlusConfig
from .model import PrefixPlusModel
from .peft_type import METHOD_NAME, PREFIX_PLUS


def register() -> None:
    """Register the method and its attention function; importing the package does so. Repeating it changes nothing."""
    for mapping in (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    ):
        mapping.pop(PREFIX_PLUS, None)
    register_peft_method(name=METHOD_NAME, config_cls=PrefixPlusConfig, model_cls=PrefixPlusModel)
    AttentionInterface.register(ROUTE_NAME, prefix_attention_forward)
    AttentionMaskInterface.register(ROUTE_NAME, refuse_mask)
