"""Makes PrefixPlus known to PEFT and to the attention interface of transformers."""

import functools
from typing import Any

from peft.config import PeftConfigMixin
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
    _remember_sources()


def _remember_sources() -> None:
    """Let every `from_pretrained` of a configuration tell a PrefixPlus configuration where it was read.

    PEFT and transformers read the configuration of an adapter, put the adapter into the model, and look at the weights
    then. Weights that do not fit would be found too late to leave the model as it was, and after memory was allocated
    for whatever size the configuration asks for.
    """
    original = PeftConfigMixin.__dict__["from_pretrained"].__func__
    original = vars(original).get("__wrapped__", original)

    @functools.wraps(original)
    def from_pretrained(
        cls: type, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, PrefixPlusConfig):
            download_kwargs, _, _ = config._split_kwargs(kwargs)
            config.remember_source(pretrained_model_name_or_path, subfolder, download_kwargs)
        return config

    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)  # type: ignore[arg-type]
