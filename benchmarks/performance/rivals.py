"""The models whose speed is compared: a base model, alone and with an adapter of each method, sharing all weights."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig

BARE = "base model"
PACKAGE = "PrefixPlus"
PREFIX = f"{PACKAGE} flat"
# Of SmolLM2-135M these three train 230,400 parameters each.
LORA = "LoRA r=4"
NATIVE = "PREFIX_TUNING"
NUM_VIRTUAL_TOKENS = 20


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, but none of its tensors."""
    memo = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    return copy.deepcopy(model, memo)


def build_prefix(projection: str, num_virtual_tokens: int = NUM_VIRTUAL_TOKENS) -> PrefixPlusConfig:
    """A prefix from sampled tokens."""
    return PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, projection=projection)


def build_lora(num_virtual_tokens: int) -> LoraConfig:
    """LoRA, whatever the length of its rivals."""
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def build_native(num_virtual_tokens: int) -> PrefixTuningConfig:
    """PEFT's own prefix-tuning."""
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)


CONFIGS: dict[str, Callable[[int], PeftConfig]] = {
    PREFIX: partial(build_prefix, "none"),
    PACKAGE: partial(build_prefix, "linear"),
    LORA: build_lora,
    NATIVE: build_native,
}


def build_rivals(
    base: PreTrainedModel,
    names: Sequence[str] = (BARE, *CONFIGS),
    num_virtual_tokens: int = NUM_VIRTUAL_TOKENS,
) -> dict[str, nn.Module]:
    """One model for each rival; adapters are moved away from zero, as training would.

    Args:
        base (`PreTrainedModel`): the model whose weights they share.
        names (`Sequence[str]`): `BARE`, or keys of `CONFIGS`.
        num_virtual_tokens (`int`): length of the prefixes.
    """
    models: dict[str, nn.Module] = {}
    generator = torch.Generator().manual_seed(0)
    for name in names:
        model = share_weights(base).requires_grad_(False)
        models[name] = model if name == BARE else get_peft_model(model, CONFIGS[name](num_virtual_tokens))
        for parameter in models[name].parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return models
