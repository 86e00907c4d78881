"""Which attention modules of a model get a prefix, and how long it is."""

import re
import warnings
from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel

from .architectures import belongs_to_text, is_cross_attention, runs_without_gradients, takes_argument
from .config import PrefixPlusConfig, match_module_pattern


def choose_targets(model: PreTrainedModel, modules: dict[str, nn.Module]) -> list[str]:
    """The modules that get a prefix when the user names none."""
    reads_text = takes_argument(model, "input_ids")
    has_encoder = model.config.is_encoder_decoder
    chosen = [
        name
        for name in modules
        if (belongs_to_text(model, name) or not reads_text)
        and (has_encoder or not is_cross_attention(name))
        and not runs_without_gradients(name)
    ]
    return chosen or list(modules)


def name_targets(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """Name all attention modules by their last names if those match nothing else, otherwise in full."""
    endings = {name.rpartition(".")[2] for name in modules}
    matched = {name for name in _list_module_names(model) if name.rpartition(".")[2] in endings}
    return sorted(endings) if matched == set(modules) else sorted(modules)


def _list_module_names(model: nn.Module) -> list[str]:
    """Names of all modules but those inside of tuner layers, where adapters may be named as any module."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [name for name, _ in model.named_modules() if name and not name.startswith(inside)]


def resolve_lengths(config: PrefixPlusConfig, model: PreTrainedModel, modules: dict[str, nn.Module]) -> dict[str, int]:
    """Prefix length of every targeted module that gets a prefix."""
    targeted = [name for name in _list_module_names(model) if check_target_module_exists(config, name)]
    others = [name for name in targeted if name not in modules]
    if others:
        raise ValueError(
            f"`target_modules` {config.target_modules!r} matches {others[:3]}, which cannot carry a prefix. Prefixes "
            f"go on attention modules, here: {_abbreviate(modules)}."
        )
    _check_layer_indices(config, modules)
    unused = [pattern for pattern in config.num_virtual_tokens_pattern if not _matches_any(pattern, targeted)]
    if unused:
        warnings.warn(
            f"`num_virtual_tokens_pattern` has {unused}, which match none of the targeted modules "
            f"{_abbreviate(dict.fromkeys(targeted))} and have no effect.",
            stacklevel=2,
        )
    lengths = {name: config.resolve_num_virtual_tokens(name) for name in targeted}
    lengths = {name: length for name, length in lengths.items() if length}
    if not lengths:
        raise NoMatchingPeftModuleError(
            f"No attention module gets a prefix: `target_modules` {config.target_modules!r}, `exclude_modules` "
            f"{config.exclude_modules!r}, `layers_to_transform` {config.layers_to_transform!r} and "
            f"`num_virtual_tokens_pattern` {config.num_virtual_tokens_pattern!r} leave none of {_abbreviate(modules)}."
        )
    return lengths


def _check_layer_indices(config: PrefixPlusConfig, modules: dict[str, nn.Module]) -> None:
    indices = config.layers_to_transform
    if indices is None:
        return
    layers = {int(match.group(1)) for match in (re.search(r"\.(\d+)\.", name) for name in modules) if match}
    missing = sorted(set(indices if isinstance(indices, list) else [indices]) - layers)
    if missing:
        raise ValueError(
            f"`layers_to_transform` names the layers {missing}, but the layers that can carry a prefix are "
            f"{sorted(layers)}."
        )


def _matches_any(pattern: str, names: list[str]) -> bool:
    return any(match_module_pattern(pattern, name) for name in names)


def _abbreviate(modules: Mapping[str, object]) -> str:
    names = list(modules)
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ..., {names[-1]}"
