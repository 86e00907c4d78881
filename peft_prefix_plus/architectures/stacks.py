"""Tells the models inside of a model apart: which one a module belongs to, and what it reads."""

import inspect
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .modules import find_attention_modules, iterate_base_modules


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model names an argument."""
    return name in inspect.signature(type(model).forward).parameters


def takes_tokens(model: nn.Module) -> bool:
    """Whether a model of transformers reads token ids, rather than images or sound."""
    return takes_argument(model, "input_ids") or takes_argument(model, "decoder_input_ids")


def find_stacks(model: nn.Module, name: str) -> list[str]:
    """Return the names of the models of transformers around a module, the outermost one, `""`, first."""
    bare = dict(iterate_base_modules(model))
    parts = name.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts))]
    return [stack for stack in names if isinstance(bare.get(stack), PreTrainedModel)]


def find_owner(model: nn.Module, name: str) -> str:
    """Return the name of the innermost model of transformers around a module."""
    return find_stacks(model, name)[-1]


def belongs_to_text(model: nn.Module, name: str) -> bool:
    """Whether a module of a model works on text, and not in a tower for images or sound."""
    owner = model.get_submodule(find_owner(model, name))
    return takes_argument(owner, "input_ids") and re.search("audio|vision|visual|image|speech", name) is None


def find_numbered_stack(model: PreTrainedModel) -> PreTrainedModel | None:
    """Find the outermost model around the text's attention that can be told the positions of its input.

    Args:
        model (`PreTrainedModel`): a model of transformers.

    Returns:
        `PreTrainedModel`, *optional*: the model itself or one inside of it; `None` if none takes `position_ids`.
    """
    attention = next((name for name in find_attention_modules(model) if belongs_to_text(model, name)), "")
    stacks: Any = (model.get_submodule(name) for name in find_stacks(model, attention))
    return next((stack for stack in stacks if takes_argument(stack, "position_ids")), None)
