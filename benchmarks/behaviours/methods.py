"""The methods that are compared, each with a small configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

from peft import CartridgeConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig


class Method(NamedTuple):
    """A PEFT method.

    Attributes:
        name (`str`): as the table calls it.
        build_config (`Callable`): makes a configuration; takes `PeftConfig` fields and `size`.
    """

    name: str
    build_config: Callable[..., PeftConfig]

    def apply(
        self, model: PreTrainedModel, size: int = 4, task_type: str | None = "CAUSAL_LM", **fields: Any
    ) -> PeftModel:
        """Wrap a model, as `get_peft_model` does; `size` is the prefix length, or the rank."""
        return get_peft_model(model, self.build_config(size=size, task_type=task_type, **fields))


def _prefix_plus(size: int = 4, **fields: Any) -> PeftConfig:
    return PrefixPlusConfig(num_virtual_tokens=size, **fields)


def _prefix_tuning(size: int = 4, **fields: Any) -> PeftConfig:
    return PrefixTuningConfig(num_virtual_tokens=size, **fields)


def _cartridge(size: int = 4, **fields: Any) -> PeftConfig:
    return CartridgeConfig(num_virtual_tokens=size, num_frozen_tokens=0, **fields)


def _lora(size: int = 4, **fields: Any) -> PeftConfig:
    return LoraConfig(r=size, init_lora_weights=False, **fields)


METHODS = {
    method.name: method
    for method in (
        Method("PrefixPlus", _prefix_plus),
        Method("PREFIX_TUNING", _prefix_tuning),
        Method("CARTRIDGE", _cartridge),
        Method("LoRA", _lora),
    )
}
