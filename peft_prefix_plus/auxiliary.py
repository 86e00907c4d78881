"""What PEFT trains beside adapters, heads and rows of embeddings, where adapters of several methods share a model."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.utils import _get_submodules
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn

from .config import PrefixPlusConfig


def list_own_adapters(configs: Mapping[str, PeftConfig]) -> list[str]:
    """Names of the prefixes among the adapters of a model, whose tuners share their configurations."""
    return [name for name, config in configs.items() if isinstance(config, PrefixPlusConfig)]


def list_own_auxiliary(model: nn.Module) -> list[Any]:
    """List what no adapters but prefixes use, to be switched off with them.

    Args:
        model (`nn.Module`): the base model.

    Returns:
        `list`: modules with the attribute `disable_adapters`: wrappers, and the layers of rows of embeddings inside of
            their wrappers, which are asked by themselves.
    """
    own = list_own_adapters(vars(model).get("peft_config", {}))
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    wrappers = [wrapper for wrapper in wrappers if set(wrapper.active_adapters) <= set(own)]
    rows = [wrapper.token_adapter for wrapper in wrappers if isinstance(wrapper, TrainableTokensWrapper)]
    return [*wrappers, *rows]


@contextmanager
def keep_others_active(model: nn.Module, own: Collection[str]) -> Iterator[None]:
    """Leave the heads and rows of other methods active while adapters are activated or deleted.

    PEFT switches off whatever the activated adapter has not, as if there were one method only.

    Args:
        model (`nn.Module`): the base model.
        own (`Collection[str]`): names of the adapters that may replace each other.
    """
    before = []
    for wrapper in model.modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            others = [name for name in wrapper.active_adapters if name not in own]
            before += [(wrapper, name, _is_trained(wrapper, name)) for name in others]
    yield
    for wrapper, name, trained in before:
        if not wrapper.active_adapters:
            wrapper.set_adapter([name], inference_mode=not trained)


def remove_auxiliary(model: nn.Module, adapter_names: Collection[str], keep_values: bool = False) -> None:
    """Take adapters out of the wrappers of a model, and away the wrappers that are left without one.

    Args:
        model (`nn.Module`): the base model.
        adapter_names (`Collection[str]`): what to take out.
        keep_values (`bool`): leave what was trained in the place of the original, if a wrapper is taken away.
    """
    for name, wrapper in list(model.named_modules()):
        if not isinstance(wrapper, AuxiliaryTrainingWrapper):
            continue
        available = wrapper._get_available_adapters()
        own = available.intersection(adapter_names)
        others = sorted(available - own)
        if own and others:
            active = [other for other in wrapper.active_adapters if other in others] or others[:1]
            wrapper.set_adapter(active, inference_mode=not _is_trained(wrapper, active[0]))
            for adapter_name in own:
                wrapper.delete_adapter(adapter_name, new_active_adapters=active)
        elif own:
            parent, _, child_name = _get_submodules(model, name)
            bare = wrapper.original_module
            if keep_values:
                bare = wrapper.unload_and_optionally_merge_module(False, False, None)
            setattr(parent, child_name, bare)


def _is_trained(wrapper: AuxiliaryTrainingWrapper, adapter_name: str) -> bool:
    own = [parameter for name, parameter in wrapper.named_parameters() if adapter_name in name.split(".")]
    return any(parameter.requires_grad for parameter in own)
