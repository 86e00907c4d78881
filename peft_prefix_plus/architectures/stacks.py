"""Tells the models inside of a model apart: which one a module belongs to, and what it reads."""

import inspect
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .modules import find_attention_modules, find_base_module, is_cross_attention


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model names an argument."""
    return name in inspect.signature(type(model).forward).parameters


def takes_tokens(model: nn.Module) -> bool:
    """Whether a model of transformers reads token ids, rather than images or sound."""
    return takes_argument(model, "input_ids") or takes_argument(model, "decoder_input_ids")


def find_stacks(model: nn.Module, name: str) -> list[str]:
    """Return the names of the models of transformers around a module, the outermost one, `""`, first."""
    stacks, module = [], model
    parts = name.split(".")
    for length, part in enumerate(parts):
        if isinstance(module, PreTrainedModel):
            stacks.append(".".join(parts[:length]))
        module = find_base_module(getattr(module, part))
    return stacks


def find_owner(model: nn.Module, name: str) -> str:
    """Return the name of the innermost model of transformers around a module."""
    return find_stacks(model, name)[-1]


def belongs_to_text(model: nn.Module, name: str) -> bool:
    """Whether a module of a model works on text, and not in a tower for images or sound."""
    owner = model.get_submodule(find_owner(model, name))
    return takes_argument(owner, "input_ids") and re.search("audio|vision|visual|image|speech", name) is None


def find_numbered_stacks(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Find the models around the text's attention that can be told the positions of their input.

    Args:
        model (`PreTrainedModel`): a model of transformers.

    Returns:
        `list[PreTrainedModel]`: the outermost one first, often the model itself, and last, if the model is a pair, its
            decoder, whose input has numbers of its own; empty if none takes `position_ids`.
    """
    attention = [name for name in find_attention_modules(model) if belongs_to_text(model, name)]
    names = find_stacks(model, attention[0]) if attention else [""]
    if attention and model.config.is_encoder_decoder:
        names += [find_owner(model, name) for name in attention if not is_cross_attention(name)]
    stacks: Any = (model.get_submodule(name) for name in dict.fromkeys(names))
    return [stack for stack in stacks if takes_argument(stack, "position_ids")]
