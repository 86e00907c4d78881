"""The methods that are compared, each with a small configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

from peft import CartridgeConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.utils import hotswap
from torch import nn
from transformers import PreTrainedModel

import peft_prefix_plus
from peft_prefix_plus import PrefixPlusConfig


def _prepare(model: nn.Module, size: int) -> None:
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=size)


def _prepare_prefix_plus(model: nn.Module, size: int) -> None:
    peft_prefix_plus.prepare_model_for_compiled_hotswap(model, num_virtual_tokens=size)


class Method(NamedTuple):
    """A PEFT method.

    Attributes:
        name (`str`): as the table calls it.
        build_config (`Callable`): makes a configuration; takes `PeftConfig` fields and `size`.
        hotswap_adapter (`Callable`): that of PEFT, or of the method if it brings its own under the same name.
        prepare_for_hotswap (`Callable`): likewise `prepare_model_for_compiled_hotswap`; takes a model and the largest
            size, for which each has a keyword of its own.
    """

    name: str
    build_config: Callable[..., PeftConfig]
    hotswap_adapter: Callable[..., None] = hotswap.hotswap_adapter
    prepare_for_hotswap: Callable[[nn.Module, int], None] = _prepare

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
        Method("PrefixPlus", _prefix_plus, peft_prefix_plus.hotswap_adapter, _prepare_prefix_plus),
        Method("PREFIX_TUNING", _prefix_tuning),
        Method("CARTRIDGE", _cartridge),
        Method("LoRA", _lora),
    )
}
