"""The tuner: finds the attention modules of a model and gives them their prefix."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import _get_submodules
from torch import Tensor, nn

from .architectures import fetch_offloaded
from .auxiliary import keep_others_active, list_own_adapters, remove_auxiliary
from .checkpoints import (
    check_saved_weights,
    describe_misfit,
    discard_uninitialized_adapter,
    find_checkpoint_problem,
    match_dtypes,
    refuse_pickled_weights,
)
from .combination import add_weighted_adapter
from .config import PrefixPlusConfig
from .dropout import PrefixDropout
from .injection import InjectionPlan, check_adapter_name, check_task_type, plan_injection
from .layer import PrefixPlusLayer, PrefixPlusLayerBase, list_layers
from .mixing import RowAdapters, check_adapter_names, name_rows
from .offloading import check_loader, follow_offloading
from .positions import ShiftedPositionEmbedding, align_positions, find_shifted_stacks, forget_adapter
from .removal import unwrap_layers
from .weights import halve_exactly


class PrefixPlusModel(BaseTuner):
    """
    Gives every attention layer trainable keys and values in front of its own (prefix-tuning, Li & Liang 2021,
    https://arxiv.org/abs/2101.00190), produced by a per-layer projection and started from real tokens.

    Args:
        model (`torch.nn.Module`): a transformers model.
        peft_config ([`PrefixPlusConfig`]): the configuration.
        adapter_name (`str`): name of the adapter.
        low_cpu_mem_usage (`bool`): create the parameters on the meta device; only for loading.

    Example:

    ```py
    >>> import peft_prefix_plus
    >>> from peft import get_peft_model
    >>> model = get_peft_model(base_model, PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_text="Summarize:"))
    ```
    """

    prefix: str = "prefix_plus_"
    tuner_layer_cls = PrefixPlusLayerBase
    # Only while an adapter is being injected.
    _plan: InjectionPlan | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_name_is_free(model, adapter_name)
        if isinstance(peft_config, dict):
            # From a `PeftModel`, which belongs to a task.
            config = peft_config[adapter_name]
            check_task_type(config, model)
        else:
            config = peft_config
            refuse_pickled_weights(config)
        check_loader(model, config.prefix_is_initialized)
        has_configs = hasattr(model, "peft_config")
        # Of calls that run: their thread, and the adapters of their rows.
        self._calls: list[tuple[int, RowAdapters | None]] = []
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            # Models of transformers keep their own list of adapters, and PEFT enters a refused one as well.
            if has_configs:
                model.peft_config.pop(adapter_name, None)  # type: ignore[union-attr, operator]
            elif vars(model).get("_hf_peft_config_loaded"):
                model._hf_peft_config_loaded = False  # type: ignore[assignment]
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Give a model an adapter; see `BaseTuner.inject_adapter`.

        Whatever can go wrong does so while the plan is made, before the model is touched.
        """
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        plan = plan_injection(config, model)
        check_saved_weights(config, adapter_name, plan, model)
        config.remember_resolved(plan.config)
        self._plan = plan
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._plan = None
        for name, shift in plan.position_shifts.items():
            self._shift_positions(model, name, adapter_name, shift)
        align_positions(model, adapter_name, max(plan.lengths.values()) if plan.config.initializes_from_tokens else 0)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        if self._plan is None:
            return key in self.targeted_module_names
        found = check_target_module_exists(self._plan.config, key)
        # A module that PEFT calls excluded is false as well, but tells that `exclude_modules` had an effect.
        return found and key in self._plan.lengths

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
        plan = self._plan
        if plan is None or current_key not in plan.lengths:
            raise ValueError(f"The configuration of {adapter_name!r} leaves {current_key!r} without a prefix.")
        encoder = peft_config.build_encoder(plan.geometries[current_key], plan.lengths[current_key])
        if current_key in plan.initial_states:
            encoder.initialize(*plan.initial_states[current_key])
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
        if isinstance(new_module, PrefixPlusLayerBase):
            layers = list_layers(self.model, PrefixPlusLayerBase)
            new_module._disable_adapters = any(layer.disable_adapters for layer in layers)
        setattr(parent, child_name, new_module)

    def fold_prefix(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Replace the projection of some adapters by its result, in place; outputs stay the same.

        The adapter becomes `projection="none"`: nothing but the finished keys and values is kept.

        Args:
            adapter_names (`str` or `Sequence[str]`, *optional*): which ones; `None`: all.

        Raises:
            ValueError: if there is no prefix of that name.
        """
        own = list_own_adapters(self.peft_config)
        if adapter_names is None:
            adapter_names = own
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name not in own:
                raise ValueError(f"There is no prefix {name!r}; the model has {', '.join(own)}.")
        for name in names:
            for layer in list_layers(self.model, PrefixPlusLayer):
                if name in layer.list_adapters():
                    layer.fold(name)
            self.peft_config[name] = copy.copy(self.peft_config[name])
            self.peft_config[name].projection = "none"
            self.peft_config[name].remember_injected()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; see `BaseTuner.set_adapter`. Heads of other methods in the model stay active."""
        with keep_others_active(self.model, list_own_adapters(self.peft_config)):
            super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the layers that are left without one.

        If it was active, the other active adapters stay so; without one, the first of the others becomes active.

        Args:
            adapter_name (`str`): its name.

        Raises:
            ValueError: if there is no adapter of that name.
        """
        was_active = adapter_name in self.active_adapters
        remaining = [name for name in self.active_adapters if name != adapter_name]
        with keep_others_active(self.model, list_own_adapters(self.peft_config)):
            super().delete_adapter(adapter_name)
        forget_adapter(self.model, adapter_name)
        unwrap_layers(self.model, only_empty=True)
        # Layers choose by themselves, and not all have the same adapters.
        if was_active and self.peft_config:
            self.set_adapter(remaining or next(iter(self.peft_config)))

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        own = list_own_adapters(self.peft_config)
        unwrap_layers(self.model)
        remove_auxiliary(self.model, own, keep_values=True)
        if len(own) < len(self.peft_config):
            # Other methods are left, whose tuners have the same dict.
            for name in own:
                del self.peft_config[name]
        elif "peft_config" in vars(self.model):
            del self.model.peft_config
        bare: nn.Module = self.model
        return bare

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A prefix cannot be merged into the weights: it adds keys and values, not a weight update. Use `unload()` "
            "to get the base model back, or `fold_prefix()` to replace the projection by its result."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names, rows = kwargs.get("adapter_names"), None
        if adapter_names is not None:
            own = list_own_adapters(self.peft_config)
            check_adapter_names(adapter_names, own, self.training)
            rows = RowAdapters(adapter_names, own)
            rows.check_inputs(args, kwargs, self.model.main_input_name)
        layers = list_layers(self.model, PrefixPlusLayerBase)
        with self._enter_call(rows):
            for layer in layers:
                layer.begin_call(rows)
            try:
                with nullcontext() if rows is None else name_rows(self.model, find_shifted_stacks(self.model), rows):
                    yield
            finally:
                for layer in layers:
                    layer.end_call()

    @contextmanager
    def _enter_call(self, rows: RowAdapters | None) -> Iterator[None]:
        """Keep mixed batches to one thread: the layers know one assignment of rows at a time."""
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        if any(other != thread and (rows or other_rows) for other, other_rows in self._calls):
            raise RuntimeError(
                "Two threads run this model, one of them a batch with `adapter_names`. Let them wait for each other, "
                "or give each thread a model of its own, which may share the weights."
            )
        call = (thread, rows)
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model; see its own forward."""
        rows = self._calls[-1][1] if self._calls else None
        if rows is not None:
            # Rows are repeated by `generate` only, which does not come here.
            rows.check_inputs(args, kwargs, self.model.main_input_name)
        return super().forward(*args, **kwargs)

    def unmerge_adapter(self) -> None:
        """Refused, as merging is."""
        self._check_merge_allowed()

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Select what is saved, layer by layer; an adapter that never got its values is refused.

        PEFT has taken out what could belong to other adapters by their names, which may be parts of any key, such as
        the number of a layer.
        """
        selected: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, PrefixPlusLayer) and adapter_name in module.list_adapters():
                encoder = module.get_encoder(adapter_name)
                encoder.check_initialized()
                start = f"{name}.prefix_plus_encoder.{adapter_name}.".replace("_fsdp_wrapped_module.", "")
                selected |= {
                    start + key: state_dict.get(start + key, own) for key, own in encoder.state_dict().items()
                }
        fetched = fetch_offloaded(model, selected)
        return {
            key: halve_exactly(tensor) if key.rpartition(".")[2].startswith("anchor_") else tensor
            for key, tensor in fetched.items()
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a checkpoint before anything of it is loaded; on a mismatch the adapter is taken out again."""
        follow_offloading(model)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        problem = find_checkpoint_problem(model, adapter_name, remapped)
        if problem is not None:
            discard_uninitialized_adapter(model, adapter_name)
            raise ValueError(describe_misfit(config, adapter_name, problem))
        return match_dtypes(model, adapter_name, remapped)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None,
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter that combines some of the model's adapters; it can be trained and saved like any other.

        `"linear"` adds up what training has changed in adapters with the same start: `anchor + scale * (w_1 delta_1 +
        w_2 delta_2 + ...)`. Adapters with different starts can only be averaged, `w_1 [K_1 ; V_1] + ...`, with weights
        that sum to 1. `"cat"` puts the prefixes one behind the other, which gives the outputs of several active
        adapters. The new adapter has `projection="none"`. As after `add_adapter`, it is not active yet.

        Args:
            adapters (`Sequence[str]`): the adapters to combine, in this order.
            weights (`Sequence[float]`, *optional*): one for each; negative ones lead away. `None` for `"cat"`.
            adapter_name (`str`): of the new adapter.
            combination_type (`str`): `"linear"` or `"cat"`.

        Raises:
            ValueError: if the adapters cannot be combined in this way; the model is left as it is.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that an adapter of another method has in the model: PEFT saves and loads adapters by their names.

    Raises:
        ValueError: if there is one.
    """
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, PrefixPlusLayerBase):
            continue
        if adapter_name in module._all_available_adapter_names():
            raise ValueError(
                f"The model has another adapter of the name {adapter_name!r}, in a {type(module).__name__} layer. "
                "Give the prefix a name of its own: `get_peft_model(model, config, adapter_name='prefix')`."
            )
