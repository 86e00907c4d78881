"""The tuner: finds the attention modules of a model and gives them their prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import ModulesToSaveWrapper, _get_submodules
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import check_attention_implementation, original_config
from .config import PrefixPlusConfig
from .dropout import PrefixDropout
from .encoders import build_encoder
from .geometry import AttentionGeometry, find_attention_modules, find_position_tables, read_geometry
from .initialization import InitialStates, build_initial_states, resolve_init_token_ids, resolve_prefix_length
from .layer import PrefixPlusLayer, PrefixPlusLayerBase
from .positions import ShiftedPositionEmbedding, align_positions, stop_aligning_positions


@dataclasses.dataclass
class InjectionPlan:
    """Everything that is known about an adapter before the first module is replaced.

    Attributes:
        lengths (`dict[str, int]`): prefix length of every targeted module, by its name in the base model.
        geometries (`dict[str, AttentionGeometry]`): of the same modules.
        initial_states (`dict[str, InitialStates]`): of the same modules; empty if a checkpoint will bring them.
        position_tables (`list[str]`): tables of learned positions behind which the input moves.
    """

    lengths: dict[str, int]
    geometries: dict[str, AttentionGeometry]
    initial_states: dict[str, InitialStates]
    position_tables: list[str]


class PrefixPlusModel(BaseTuner):
    """
    Gives every attention layer trainable keys and values in front of its own (prefix-tuning, Li & Liang 2021,
    https://arxiv.org/abs/2101.00190), produced by a per-layer projection and started from real tokens.

    Args:
        model (`torch.nn.Module`): a transformers model.
        config ([`PrefixPlusConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`): create the parameters on the meta device; only for loading.

    Example:

    ```py
    >>> import peft_prefix_plus
    >>> from peft import get_peft_model
    >>> model = get_peft_model(base_model, PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_text="Summarise:"))
    ```
    """

    prefix: str = "prefix_plus_"
    tuner_layer_cls = PrefixPlusLayerBase
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Give a model an adapter; see `BaseTuner.inject_adapter`.

        Whatever can go wrong does so while the plan is made, before the model is touched.
        """
        config = self.peft_config[adapter_name]
        resolved, plan = plan_injection(config, model)
        # In the object itself, as every PEFT method does: PEFT's task classes go on working with it.
        config.target_modules, config.num_virtual_tokens = resolved.target_modules, resolved.num_virtual_tokens
        self._plan = plan
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        del self._plan
        for name in plan.position_tables:
            self._shift_positions(model, name, adapter_name, max(plan.lengths.values()))
        align_positions(model)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PrefixPlusConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        name = current_key.replace(".base_layer", "")
        length = self._plan.lengths.get(name, 0)
        if not length:
            return
        encoder = build_encoder(
            peft_config.projection,
            self._plan.geometries[name],
            length,
            peft_config.num_frozen_tokens,
            peft_config.projection_dim,
        )
        if name in self._plan.initial_states:
            encoder.initialize(*self._plan.initial_states[name])
        dropout = PrefixDropout(peft_config.prefix_dropout, peft_config.prefix_dropout_mode)
        encoder.train(target.training)
        dropout.train(target.training)
        if isinstance(target, PrefixPlusLayer):
            target.update_layer(adapter_name, encoder, dropout)
            return
        layer = PrefixPlusLayer(target)
        layer.update_layer(adapter_name, encoder, dropout)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)

    def _shift_positions(self, model: nn.Module, name: str, adapter_name: str, num_virtual_tokens: int) -> None:
        parent, table, table_name = _get_submodules(model, name)
        if not isinstance(table, ShiftedPositionEmbedding):
            table = ShiftedPositionEmbedding(table)
            self._replace_module(parent, table_name, table, table.base_layer)
        table.update_layer(adapter_name, num_virtual_tokens)
        table.set_adapter(self.active_adapters)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would also copy the weight and bias that its own targets, linear maps, have.
        setattr(parent, child_name, new_module)

    def fold_prefix(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Replace the projection of some adapters by its result, in place; outputs stay the same.

        The adapter becomes `projection="none"`: nothing but the finished keys and values is kept.

        Args:
            adapter_names (`str` or `Sequence[str]`, *optional*): which ones; `None`: all.

        Raises:
            ValueError: if there is no adapter of that name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or self.peft_config)
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"There is no adapter {name!r}; the model has {', '.join(self.peft_config)}.")
        for name in names:
            for module in self.model.modules():
                if isinstance(module, PrefixPlusLayer) and name in module.prefix_plus_encoder:
                    module.fold(name)
            self.peft_config[name] = dataclasses.replace(self.peft_config[name], projection="none")

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        stop_aligning_positions(model)
        return model

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A prefix cannot be merged into the weights: it adds keys and values, not a weight update. Use `unload()` "
            "to get the base model back, or `fold_prefix()` to replace the projection by its result."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` in a forward (one adapter per row) is not supported by PrefixPlus yet. Use "
                "`model.set_adapter(name)` and one forward per adapter."
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a checkpoint before anything of it is loaded; on a mismatch the adapter is taken out again."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        problem = _find_checkpoint_problem(model, adapter_name, remapped)
        if problem is not None:
            _discard_uninitialized_adapter(model, adapter_name)
            raise ValueError(
                f"The weights do not fit adapter {adapter_name!r} of this model: {problem} Load the adapter onto the "
                f"base model that it was trained on ({config.base_model_name_or_path or 'its name was not saved'})."
            )
        return remapped


def plan_injection(config: PrefixPlusConfig, model: PreTrainedModel) -> tuple[PrefixPlusConfig, InjectionPlan]:
    """Resolve a configuration against a model, and compute the initial prefix.

    Args:
        config ([`PrefixPlusConfig`]): the user's; left as it is.
        model (`PreTrainedModel`): the base model, with or without other adapters; left as it is.

    Returns:
        `tuple[PrefixPlusConfig, InjectionPlan]`: a copy of the configuration in which `target_modules` and
        `num_virtual_tokens` are resolved, and the plan.

    Raises:
        ValueError: if anything does not fit.
    """
    _check_architecture(model)
    modules = find_attention_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no attention module that PrefixPlus supports: none calls the attention "
            "interface of transformers. Supported are models whose self-attention goes through "
            "`ALL_ATTENTION_FUNCTIONS`, such as Llama, Qwen, Mistral, Gemma, Phi, GPT-NeoX, GPT-2 and OPT."
        )
    if config.target_modules is None:
        config = dataclasses.replace(config, target_modules=_name_targets(model, modules))
    init_token_ids = None if config.prefix_is_initialized else resolve_init_token_ids(config, model)
    config = dataclasses.replace(config, num_virtual_tokens=resolve_prefix_length(config, init_token_ids))
    lengths = _resolve_lengths(config, model, modules)
    for name in lengths:
        check_attention_implementation(original_config(modules[name])._attn_implementation)
        config.check_frozen_tokens(lengths[name])
    geometries = {name: read_geometry(modules[name]) for name in lengths}
    initial_states: dict[str, InitialStates] = {}
    if not config.prefix_is_initialized:
        initial_states = build_initial_states(config, model, lengths, init_token_ids)
        _check_geometries(geometries, initial_states)
    tables = list(find_position_tables(model)) if config.initializes_from_tokens else []
    return config, InjectionPlan(lengths, geometries, initial_states, tables)


def _check_architecture(model: PreTrainedModel) -> None:
    model_config = getattr(model, "config", None)
    if model_config is None or not hasattr(model_config, "_attn_implementation"):
        raise ValueError(
            f"PrefixPlus needs a model of transformers, got {type(model).__name__} without a transformers config."
        )
    if model_config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, which PrefixPlus does not support yet; supported "
            "are decoders and encoders on their own."
        )


def _name_targets(model: PreTrainedModel, modules: dict[str, nn.Module]) -> list[str]:
    """Name all attention modules by their last names if those match nothing else, otherwise in full."""
    endings = {name.rpartition(".")[2] for name in modules}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return (
        sorted(endings) if {name.replace(".base_layer", "") for name in matched} == set(modules) else sorted(modules)
    )


def _resolve_lengths(
    config: PrefixPlusConfig, model: PreTrainedModel, modules: dict[str, nn.Module]
) -> dict[str, int]:
    """Prefix length of every targeted module that gets a prefix."""
    targeted = [name for name, _ in model.named_modules() if ".base_layer" not in name]
    targeted = [name for name in targeted if name and check_target_module_exists(config, name)]
    others = [name for name in targeted if name not in modules]
    if others:
        raise ValueError(
            f"`target_modules` {config.target_modules!r} matches {others[:3]}, which cannot carry a prefix. Prefixes "
            f"go on attention modules, here: {_abbreviate(modules)}."
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


def _abbreviate(modules: dict[str, nn.Module]) -> str:
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


def _find_checkpoint_problem(model: PreTrainedModel, adapter_name: str, state_dict: dict[str, Tensor]) -> str | None:
    """Say what is missing, foreign or misshapen in an adapter's weights; `None` if all is well."""
    own = {key: tensor for key, tensor in model.state_dict().items() if f".prefix_plus_encoder.{adapter_name}." in key}
    prefix = "" if any(key in state_dict for key in own) else "base_model.model."
    missing = [key for key in own if prefix + key not in state_dict]
    if missing:
        return f"{len(missing)} of {len(own)} tensors are missing, for instance {missing[0]!r}."
    foreign = [key for key in state_dict if ".prefix_plus_" in key and key.removeprefix(prefix) not in own]
    if foreign:
        return f"{len(foreign)} tensors have no place in it, for instance {foreign[0]!r}."
    for key, tensor in own.items():
        given = state_dict[prefix + key]
        if given.shape != tensor.shape:
            return f"{key!r} has shape {tuple(given.shape)}, but the model needs {tuple(tensor.shape)}."
        if not given.is_floating_point() or not bool(torch.isfinite(given).all()):
            return f"{key!r} holds values that are not finite numbers."
    return None


def _discard_uninitialized_adapter(model: PreTrainedModel, adapter_name: str) -> None:
    """Take an adapter that never got its weights out of a model, and the wrappers that are left without one."""
    layers = [module for module in model.modules() if isinstance(module, PrefixPlusLayer)]
    encoders = [layer.prefix_plus_encoder[adapter_name] for layer in layers if adapter_name in layer.list_adapters()]
    if any(encoder.initialized for encoder in encoders):
        return
    for name, module in list(model.named_modules()):
        bare: nn.Module | None = None
        if isinstance(module, PrefixPlusLayerBase) and adapter_name in module.list_adapters():
            module.delete_adapter(adapter_name)
            bare = None if module.list_adapters() else module.unload_and_optionally_merge_module(merge=False)
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            module.delete_adapter(adapter_name, new_active_adapters=None)
            bare = None if len(module.modules_to_save) else module.original_module
        if bare is not None:
            parent, _, child_name = _get_submodules(model, name)
            setattr(parent, child_name, bare)
    model.peft_config.pop(adapter_name, None)
    if not model.peft_config:
        stop_aligning_positions(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module).pop("peft_config", None)
