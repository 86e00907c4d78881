"""The models whose speed is compared: a base model, alone and with an adapter of each method, sharing all weights."""

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig

BARE = "base model"
NUM_VIRTUAL_TOKENS = 20
# Both train 230,400 parameters of SmolLM2-135M, and so does PREFIX_TUNING.
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, but none of its tensors."""
    memo = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    return copy.deepcopy(model, memo)


def build_prefix(projection: str, num_virtual_tokens: int = NUM_VIRTUAL_TOKENS) -> PrefixPlusConfig:
    """A prefix from sampled tokens."""
    return PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, projection=projection)


RIVALS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    BARE: lambda model: model.requires_grad_(False),
    "PrefixPlus flat": lambda model: get_peft_model(model, build_prefix("none")),
    "PrefixPlus mlp": lambda model: get_peft_model(model, build_prefix("mlp")),
    "LoRA r=4": lambda model: get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)),
    "PREFIX_TUNING": lambda model: get_peft_model(
        model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL_TOKENS)
    ),
}


def build_rivals(model: PreTrainedModel) -> dict[str, nn.Module]:
    """One model for each rival; adapters are moved away from zero, as training would."""
    models = {name: build(share_weights(model)) for name, build in RIVALS.items()}
    generator = torch.Generator().manual_seed(0)
    for rival in models.values():
        for parameter in rival.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return models
