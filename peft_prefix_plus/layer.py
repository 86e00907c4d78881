"""The layers that PrefixPlus puts in place of a model's own modules."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig

from .architectures import find_device, read_batch_size, uses_attention_interface
from .attention import attend_with_prefix, original_config, route_config
from .dropout import PrefixDropout
from .encoders import PrefixEncoder, fold_encoder
from .mixing import RowAdapters
from .states import PrefixStates, concatenate_states, select_rows


class _Call(NamedTuple):
    """A call of the whole model that runs.

    Attributes:
        rows ([`RowAdapters`], *optional*): the adapter of each row, in a mixed batch.
        states (`dict`): prefixes that were computed; while nothing trains, they stay the same.
    """

    rows: RowAdapters | None
    states: dict[Any, PrefixStates]


class PrefixPlusLayerBase(nn.Module, BaseTunerLayer):
    """What the layers share: they wrap one module, know their adapters, and can be taken out again."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._calls: list[_Call] = []
        self._register_state_dict_hook(_shorten_foreign_keys)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _lengthen_foreign_keys, with_module=True
        )

    def __getattr__(self, name: str) -> Any:
        """Answer for the wrapped module: decoder layers read attributes such as `is_sliding` from their attention."""
        # Every layer asks for its own modules at every token.
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Name layers of other methods inside of the wrapped module as if this layer were not around it.

        PEFT saves an adapter by these names, which then fit the model with and without the prefix.
        """
        outside, inside = _join_names(prefix, ""), _join_names(prefix, "base_layer.")
        foreign: str | None = None
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if isinstance(module, BaseTunerLayer) and module is not self and not f"{name}.".startswith(f"{foreign}."):
                foreign = name
            if foreign is not None and f"{name}.".startswith(f"{foreign}."):
                name = outside + name.removeprefix(inside)
            yield name, module

    def list_adapters(self) -> list[str]:
        """Names of the adapters that this layer has something for."""
        raise NotImplementedError

    def list_effective_adapters(self) -> list[str]:
        """Names of the adapters that take part in a forward, in their order: active ones, or those of the rows."""
        if self._disable_adapters:
            return []
        available, rows = self.list_adapters(), self.rows
        wanted = self.active_adapters if rows is None else rows.adapters
        if wanted == available:
            return available
        return [name for name in wanted if name in available]

    @property
    def rows(self) -> RowAdapters | None:
        """The adapter of each row while a mixed batch runs."""
        return self._calls[-1].rows if self._calls else None

    def begin_call(self, rows: RowAdapters | None) -> None:
        """Prepare for a call of the whole model: a forward, or `generate` with all of its forwards.

        Calls may be nested: what `generate` calls back may run the model, too.

        Args:
            rows ([`RowAdapters`], *optional*): gives every row an adapter of its own.
        """
        self._calls.append(_Call(rows, {}))

    def end_call(self) -> None:
        """Return to what was before [`begin_call`]."""
        self._calls.pop()

    def restore_base_layer(self) -> nn.Module:
        """Return the wrapped module as it was before the first adapter."""
        return self.base_layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Refused: other methods of PEFT call this when they unload or merge what they have in the same model."""
        raise ValueError(
            "The model has a prefix beside the adapter that is unloaded or merged, and would lose it. Unload the "
            "prefix first, with `unload()` of the model that `get_peft_model` returned for it; or merge without "
            "unloading, with `merge_adapter()`."
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the prefix as it is while adapters of other methods in the same model are merged."""

    def unmerge(self) -> None:
        """The same for unmerging."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        """Adapters follow their module's device; they keep their own dtype."""
        device = find_device(base_layer)
        # Without weights nothing tells, and on the meta device the values of the adapter would be lost.
        return (None if device.type == "meta" else device), None


def _join_names(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _list_foreign_layers(layer: nn.Module) -> list[str]:
    """Names of the layers of other methods inside of a layer, as if it did not wrap them."""
    return [f"{name}." for name, module in layer.named_modules() if name and isinstance(module, BaseTunerLayer)]


def _shorten_foreign_keys(layer: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Name what belongs to other methods in a state dict as [`PrefixPlusLayerBase.named_modules`] does."""
    for name in _list_foreign_layers(layer):
        for key in [key for key in state_dict if key.startswith(f"{prefix}base_layer.{name}")]:
            state_dict[prefix + key.removeprefix(f"{prefix}base_layer.")] = state_dict.pop(key)


def _lengthen_foreign_keys(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """The inverse of [`_shorten_foreign_keys`]."""
    for name in _list_foreign_layers(layer):
        for key in [key for key in state_dict if key.startswith(prefix + name)]:
            state_dict[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state_dict.pop(key)


class PrefixPlusLayer(PrefixPlusLayerBase):
    """Puts the active adapters' prefixes in front of one attention module's keys and values.

    Args:
        base_layer (`nn.Module`): an attention module.
    """

    adapter_layer_names = ("prefix_plus_encoder",)
    other_param_names = ("prefix_plus_dropout",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.prefix_plus_encoder = nn.ModuleDict()
        self.prefix_plus_dropout = nn.ModuleDict()
        self._original_config: PreTrainedConfig | None = None
        if uses_attention_interface(base_layer):
            self._original_config = original_config(base_layer)
            self._routed_config = route_config(self._original_config)
        self._active_adapter: list[str] = []

    def update_layer(self, adapter_name: str, encoder: PrefixEncoder, dropout: PrefixDropout) -> None:
        """Add an adapter.

        Args:
            adapter_name (`str`): its name.
            encoder ([`PrefixEncoder`]): produces its keys and values.
            dropout ([`PrefixDropout`]): its dropout.
        """
        self.prefix_plus_encoder[adapter_name] = encoder
        self.prefix_plus_dropout[adapter_name] = dropout
        self._update_route()

    def fold(self, adapter_name: str) -> None:
        """Replace the projection of one adapter by its result."""
        self.prefix_plus_encoder[adapter_name] = fold_encoder(self.get_encoder(adapter_name))

    def get_encoder(self, adapter_name: str) -> PrefixEncoder:
        """Return what produces the keys and values of one adapter."""
        encoder: PrefixEncoder = self.prefix_plus_encoder[adapter_name]  # type: ignore[assignment]
        return encoder

    def list_adapters(self) -> list[str]:
        # Past `__getattr__` and the `ModuleDict`: every layer asks at every token.
        return list(cast(nn.ModuleDict, self._modules["prefix_plus_encoder"])._modules)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._update_route()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._update_route()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._update_route()

    def begin_call(self, rows: RowAdapters | None) -> None:
        was_mixed = self.rows is not None
        super().begin_call(rows)
        if was_mixed or rows is not None:
            self._update_route()

    def end_call(self) -> None:
        was_mixed = self.rows is not None
        super().end_call()
        if was_mixed or self.rows is not None:
            self._update_route()

    def restore_base_layer(self) -> nn.Module:
        if self._original_config is not None:
            self.base_layer.config = self._original_config
        return self.base_layer

    def _update_route(self) -> None:
        """Route the module only while a prefix is active: without one it is the base model's module, bit for bit."""
        if self._original_config is not None:
            is_active = bool(self.list_effective_adapters())
            self.base_layer.config = self._routed_config if is_active else self._original_config

    def get_prefix_states(self, adapter_names: Sequence[str], batch_size: int) -> PrefixStates:
        """Compute the prefix of some adapters: one behind the other, or that of each row in a mixed batch.

        Args:
            adapter_names (`Sequence[str]`): at least one adapter of this layer.
            batch_size (`int`): rows of the batch.

        Returns:
            [`PrefixStates`]: batch 1 if all rows share it, or `batch_size`.
        """
        states = [
            self.prefix_plus_dropout[name](self.prefix_plus_encoder[name](), batch_size) for name in adapter_names
        ]
        if self.rows is None:
            return concatenate_states(states)
        return select_rows(states, self.rows.select(adapter_names, batch_size, states[0].keys.device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base_layer, adapter_names = self.base_layer, self.list_effective_adapters()
        if not adapter_names:
            return base_layer(*args, **kwargs)
        if not self._calls or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            states = self.get_prefix_states(adapter_names, read_batch_size(base_layer, args, kwargs))
        else:
            batch_size = None if self.rows is None else read_batch_size(base_layer, args, kwargs)
            kept, key = self._calls[-1].states, (tuple(adapter_names), batch_size)
            if key not in kept:
                states = self.get_prefix_states(adapter_names, read_batch_size(base_layer, args, kwargs))
                kept[key] = states._replace(matched={})
            states = kept[key]
        return attend_with_prefix(base_layer, states, *args, **kwargs)


Layer = TypeVar("Layer", bound=PrefixPlusLayerBase)


def list_layers(model: nn.Module, layer_class: type[Layer]) -> list[Layer]:
    """List the layers of a class in a model, in the order of its modules.

    `nn.Module.modules` makes up names on its way and takes twice as long, and every forward of a model asks.
    """
    layers: list[Layer] = []
    waiting: list[nn.Module | None] = [model]
    seen: set[nn.Module] = set()
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if isinstance(module, layer_class):
            layers.append(module)
        waiting.extend(reversed(module._modules.values()))
    return layers
