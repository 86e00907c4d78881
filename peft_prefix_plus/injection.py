"""Everything that is decided about an adapter before the first module of a model is replaced."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping

import torch
from peft import TaskType
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from .architectures import (
    AttentionGeometry,
    creates_empty_parameters,
    explain_missing_attention,
    find_attention_modules,
    find_missing_weights,
    find_owner,
    find_position_tables,
    find_trained_position_table,
    is_cross_attention,
    is_on_disk,
    read_geometry,
    read_position_limit,
    takes_argument,
    uses_attention_interface,
)
from .attention import find_mask_contract, original_config
from .config import PrefixPlusConfig
from .initialization import (
    InitialStates,
    build_initial_states,
    capture_states,
    resolve_init_token_ids,
    resolve_prefix_length,
)
from .layer import PrefixPlusLayer
from .states import PrefixStates
from .targets import choose_targets, name_targets, resolve_lengths
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
    _check_position_tables(config, model)
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
        targets = choose_targets(model, modules)
        _check_implementations(modules, targets)
        if not is_filled_later:
            captured = capture_states(config, model, targets, config.max_num_virtual_tokens, init_token_ids)
            targets = _leave_out_idle(targets, captured, model)
        config = dataclasses.replace(config, target_modules=name_targets(model, targets))
    lengths = resolve_lengths(config, model, modules)
    _check_implementations(modules, lengths)
    _check_lengths(config, model, lengths)
    if not config.prefix_is_initialized:
        _warn_of_idle_fields(config, lengths)
    geometries = _read_geometries(model, modules, lengths)
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
        for encoder in [encoder.extract() for encoder in encoders if encoder.initialized][:1]:
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


def _check_position_tables(config: PrefixPlusConfig, model: PreTrainedModel) -> None:
    """Refuse to move the input in a table of which every adapter has its own, trained one."""
    name = find_trained_position_table(model) if config.initializes_from_tokens else None
    if name is not None:
        raise ValueError(
            f"Another adapter of the model trains {name}, which numbers the input (`modules_to_save` or "
            "`trainable_token_indices`), so a prefix made from tokens cannot move it. Use `prefix_init='random'`, or "
            "a model without that adapter."
        )


def _leave_out_idle(targets: list[str], captured: Mapping[str, PrefixStates], model: PreTrainedModel) -> list[str]:
    """The modules that take part in a forward over text, unlike what reads images; all of a model without text."""
    if not takes_argument(model, "input_ids"):
        return targets
    return [name for name in targets if name in captured] or targets


def _read_geometries(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], names: Iterable[str]
) -> dict[str, AttentionGeometry]:
    geometries = {name: read_geometry(modules[name]) for name in names}
    if not is_on_disk(model):
        return geometries
    # PEFT takes the hooks off while it loads an adapter, and then nothing tells where a module computes.
    return {name: _leave_meta(geometry) for name, geometry in geometries.items()}


def _leave_meta(geometry: AttentionGeometry) -> AttentionGeometry:
    device = torch.device("cpu") if geometry.device.type == "meta" else geometry.device
    return dataclasses.replace(geometry, device=device)


def _check_implementations(modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    for name in names:
        if uses_attention_interface(modules[name]):
            find_mask_contract(original_config(modules[name])._attn_implementation)


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
