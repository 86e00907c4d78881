"""Everything that is decided about an adapter before the first module of a model is replaced."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from .architectures import (
    AttentionGeometry,
    belongs_to_text,
    creates_empty_parameters,
    explain_missing_attention,
    find_attention_modules,
    find_missing_weights,
    find_owner,
    find_position_tables,
    is_cross_attention,
    is_on_disk,
    read_geometry,
    read_position_limit,
    runs_without_gradients,
    takes_argument,
    uses_attention_interface,
)
from .attention import find_mask_contract, original_config
from .config import PrefixPlusConfig, match_module_pattern
from .initialization import (
    InitialStates,
    build_initial_states,
    capture_states,
    resolve_init_token_ids,
    resolve_prefix_length,
)
from .layer import PrefixPlusLayer
from .states import PrefixStates
from .token_rows import find_token_rows


@dataclasses.dataclass
class InjectionPlan:
    """What an injection will do.

    Attributes:
        config ([`PrefixPlusConfig`]): a copy of the user's, with `target_modules` and `num_virtual_tokens` resolved.
        lengths (`dict[str, int]`): prefix length of every targeted module, by its name in the base model.
        geometries (`dict[str, AttentionGeometry]`): of the same modules.
        initial_states (`dict[str, InitialStates]`): of the same modules; empty if a checkpoint will bring them.
        position_shifts (`dict[str, int]`): how far the input moves in the tables of absolute positions.
    """

    config: PrefixPlusConfig
    lengths: dict[str, int]
    geometries: dict[str, AttentionGeometry]
    initial_states: dict[str, InitialStates]
    position_shifts: dict[str, int]


def plan_injection(config: PrefixPlusConfig, model: PreTrainedModel) -> InjectionPlan:
    """Resolve a configuration against a model, and compute the initial prefix.

    Args:
        config ([`PrefixPlusConfig`]): the user's; left as it is.
        model (`PreTrainedModel`): the base model, with or without other adapters; left as it is.

    Returns:
        [`InjectionPlan`]

    Raises:
        ValueError: if anything does not fit.
    """
    _check_architecture(model)
    modules = find_attention_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} {explain_missing_attention(model)}")
    _check_loading()
    find_token_rows(config, model)
    given = config
    is_filled_later = config.prefix_is_initialized or (
        creates_empty_parameters() and bool(find_missing_weights(model))
    )
    # Fields may have been set since the configuration was made; a copy checks them again, and how they fit together.
    config = dataclasses.replace(config)
    init_token_ids = None if config.prefix_is_initialized else resolve_init_token_ids(config, model)
    config = dataclasses.replace(config, num_virtual_tokens=resolve_prefix_length(config, init_token_ids))
    captured: dict[str, PrefixStates] = {}
    if config.target_modules is None:
        chosen = _choose_targets(model, modules)
        _check_implementations(modules, chosen)
        if not is_filled_later:
            captured = capture_states(config, model, chosen, config.max_num_virtual_tokens, init_token_ids)
            if takes_argument(model, "input_ids"):
                # Others take no part in a forward over text, such as what reads images.
                chosen = [name for name in chosen if name in captured] or chosen
        config = dataclasses.replace(config, target_modules=name_targets(model, chosen))
    lengths = _resolve_lengths(config, model, modules)
    _check_implementations(modules, lengths)
    _check_lengths(config, model, lengths)
    if not config.prefix_is_initialized:
        _warn_of_idle_fields(config, lengths)
    geometries = {name: read_geometry(modules[name]) for name in lengths}
    if is_on_disk(model):
        # PEFT takes the hooks off while it loads an adapter, and then nothing tells where a module computes.
        geometries = {name: _leave_meta(geometry) for name, geometry in geometries.items()}
    initial_states: dict[str, InitialStates] = {}
    if not is_filled_later:
        if not captured:
            captured = capture_states(config, model, list(lengths), max(lengths.values()), init_token_ids)
        initial_states = build_initial_states(config, lengths, geometries, captured)
        _check_geometries(geometries, initial_states)
    initial_states |= _copy_initial_states(model, given, lengths)
    shifts = _find_position_shifts(model, lengths) if config.initializes_from_tokens else {}
    return InjectionPlan(config, lengths, geometries, initial_states, shifts)


def _copy_initial_states(
    model: PreTrainedModel, config: PrefixPlusConfig, names: Iterable[str]
) -> dict[str, InitialStates]:
    """Where another adapter with the very same configuration object started; empty if there is none.

    TRL makes its reference so: it adds an adapter with the configuration of the one that is to be trained, which may
    come from a file or be folded, and copies the trained parameters, but not the frozen part.
    """
    if not config.is_as_injected:
        return {}
    twins = [name for name, other in vars(model).get("peft_config", {}).items() if other is config]
    states = {}
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, PrefixPlusLayer):
            continue
        encoders = [layer.get_encoder(twin) for twin in twins if twin in layer.list_adapters()]
        for encoder in [encoder for encoder in encoders if encoder.initialized][:1]:
            states[name] = InitialStates(
                PrefixStates(encoder.anchor_keys[None], encoder.anchor_values[None]),
                PrefixStates(encoder.scale_keys[None], encoder.scale_values[None]),
            )
    return states


def check_adapter_name(adapter_name: str) -> None:
    """Raise a `ValueError` if torch would refuse a name, which becomes that of a module inside of every layer."""
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict, adapter_name) or adapter_name == "training":
        raise ValueError(
            f"{adapter_name!r} cannot name an adapter: names must not be empty, contain a dot, or be those of "
            "attributes of a torch module, such as `keys` or `half`."
        )


def check_task_type(config: PrefixPlusConfig, model: PreTrainedModel) -> None:
    """Refuse a task that PEFT's class for it could not wrap the model for; PEFT finds out after the injection.

    Raises:
        ValueError: if the task is to generate, and the model does not.
    """
    if config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM) and not hasattr(
        model, "prepare_inputs_for_generation"
    ):
        raise ValueError(
            f"`task_type` is {str(config.task_type)!r}, but {type(model).__name__} does not generate. Use "
            "'FEATURE_EXTRACTION', the task of its head, or leave `task_type` out."
        )


def _check_architecture(model: PreTrainedModel) -> None:
    model_config = getattr(model, "config", None)
    if model_config is None or not hasattr(model_config, "_attn_implementation"):
        raise ValueError(
            f"PrefixPlus needs a model of transformers, got {type(model).__name__} without a transformers config."
        )


def _check_loading() -> None:
    if is_fsdp_enabled():
        raise ValueError(
            "FSDP was told to load the weights in the first process only (`fsdp_cpu_ram_efficient_loading`). The "
            "others cannot compute a prefix, and accelerate cannot send them the frozen part of one. "
            "Set `fsdp_cpu_ram_efficient_loading: false` (`cpu_ram_efficient_loading` in `fsdp_config`)."
        )


def _leave_meta(geometry: AttentionGeometry) -> AttentionGeometry:
    device = torch.device("cpu") if geometry.device.type == "meta" else geometry.device
    return dataclasses.replace(geometry, device=device)


def _check_implementations(modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    for name in names:
        if uses_attention_interface(modules[name]):
            find_mask_contract(original_config(modules[name])._attn_implementation)


def _choose_targets(model: PreTrainedModel, modules: dict[str, nn.Module]) -> list[str]:
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


def _find_position_shifts(model: PreTrainedModel, lengths: dict[str, int]) -> dict[str, int]:
    """The input of a stack moves behind the longest prefix that the stack's own tokens attend to."""
    shifts = {}
    for table in find_position_tables(model):
        owner = find_owner(model, table)
        prefixes = [
            length
            for name, length in lengths.items()
            if find_owner(model, name) == owner and not is_cross_attention(name)
        ]
        if prefixes:
            shifts[table] = max(prefixes)
    return shifts


def name_targets(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """Name all attention modules by their last names if those match nothing else, otherwise in full."""
    endings = {name.rpartition(".")[2] for name in modules}
    matched = {name for name in _list_module_names(model) if name.rpartition(".")[2] in endings}
    return sorted(endings) if matched == set(modules) else sorted(modules)


def _list_module_names(model: nn.Module) -> list[str]:
    """Names of all modules but those inside of tuner layers, where adapters may be named as any module."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [name for name, _ in model.named_modules() if name and not name.startswith(inside)]


def _resolve_lengths(
    config: PrefixPlusConfig, model: PreTrainedModel, modules: dict[str, nn.Module]
) -> dict[str, int]:
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


def _check_lengths(config: PrefixPlusConfig, model: PreTrainedModel, lengths: dict[str, int]) -> None:
    for length in lengths.values():
        config.check_frozen_tokens(length)
    if config.initializes_from_tokens and not config.prefix_is_initialized:
        _check_positions(model, max(lengths.values()))


def _warn_of_idle_fields(config: PrefixPlusConfig, lengths: dict[str, int]) -> None:
    """Warn of what was set and has no effect; when an adapter is made, not whenever it is loaded."""
    if config.prefix_dropout and config.prefix_dropout_mode == "token" and max(lengths.values()) == 1:
        warnings.warn(
            f"`prefix_dropout={config.prefix_dropout}` has no effect: it hides whole virtual tokens, but never all of "
            "them, and the prefix has a single one. Use `prefix_dropout_mode='element'`, or a longer prefix.",
            stacklevel=2,
        )
    for name in ("tokenizer_name_or_path", "tokenizer_kwargs"):
        if config.prefix_init != "text" and getattr(config, name):
            warnings.warn(
                f"`{name}` has no effect: it is for `prefix_init_text`, but `prefix_init` is {config.prefix_init!r}.",
                stacklevel=2,
            )


def _check_positions(model: PreTrainedModel, length: int) -> None:
    """Warn of a prefix whose tokens stand further apart than any that the model was made for."""
    limit = read_position_limit(model)
    if limit is not None and length > limit:
        warnings.warn(
            f"The prefix has {length} virtual tokens, but {type(model).__name__} was made for {limit} positions "
            "(`max_position_embeddings`), prefix and input together. Set `num_virtual_tokens`, or shorten what the "
            "prefix starts from.",
            stacklevel=2,
        )


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


def _check_geometries(geometries: dict[str, AttentionGeometry], states: dict[str, InitialStates]) -> None:
    for name, geometry in geometries.items():
        keys, values = states[name].anchor.keys, states[name].anchor.values
        found = (keys.shape[1], keys.shape[-1], values.shape[-1])
        expected = (geometry.num_key_value_heads, geometry.key_dim, geometry.value_dim)
        if found != expected:
            raise ValueError(
                f"{name} was expected to use (kv_heads, key_dim, value_dim) = {expected}, but uses {found}. Its "
                "architecture is not supported yet; exclude it with `exclude_modules`."
            )
