"""Hot-swapping: the weights of one adapter take the place of another's, while the model stays loaded, and compiled.

The functions have the names and the arguments of those in `peft.utils.hotswap`, which are for LoRA.
"""

import warnings
from collections.abc import Iterable, Set
from copy import copy
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftMixedModel, PeftModel
from peft.utils import ModulesToSaveWrapper, _get_submodules
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from .architectures import find_position_tables
from .checkpoints import check_saved_weights
from .config import PrefixPlusConfig
from .encoders import PrefixEncoder, PrefixSlot
from .folding import group_weights
from .injection import InjectionPlan, plan_injection
from .layer import PrefixPlusLayer, list_layers
from .positions import ShiftedPositionEmbedding, list_shifts
from .weights import PEFT_PREFIX


class _Swap(NamedTuple):
    """An adapter that was read from its files, and was found to fit."""

    config: PrefixPlusConfig
    plan: InjectionPlan
    layers: dict[str, PrefixPlusLayer]
    encoders: dict[str, PrefixEncoder]
    other_weights: dict[str, dict[str, Tensor]]


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    num_virtual_tokens: int | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for adapters of other lengths and projections, so that a compiled model is not compiled again.

    The adapters of the model are folded into slots of one length; shorter prefixes will be filled up with hidden
    virtual tokens. Outputs stay the same. A slot is not trained. Call this after the first adapter was loaded, and
    before the model is compiled.

    Args:
        model (`nn.Module`): a model with PrefixPlus adapters.
        num_virtual_tokens (`int`, *optional*): length of the longest adapter that will be swapped in. `None`: that of
            the present adapters, layer by layer.
        check_compiled (`str`): what to do if the model is compiled already: `"error"`, `"warn"` or `"ignore"`.

    Raises:
        ValueError: if the model is compiled, has no PrefixPlus adapter, or has a longer one.

    Example:

    ```py
    >>> model = PeftModel.from_pretrained(base_model, "ferries-adapter")
    >>> prepare_model_for_compiled_hotswap(model, num_virtual_tokens=32)
    >>> model = torch.compile(model)
    >>> hotswap_adapter(model, "trains-adapter", adapter_name="default")
    ```
    """
    _check_not_compiled(model, check_compiled)
    layers = list_layers(model, PrefixPlusLayer)
    encoders = [(layer, name, layer.get_encoder(name)) for layer in layers for name in layer.list_adapters()]
    if not encoders:
        raise ValueError("The model has no PrefixPlus adapter yet. Load the first one, then prepare the model.")
    for _, _, encoder in encoders:
        encoder.check_initialized()
    longest = max(_count_tokens(encoder) for _, _, encoder in encoders)
    if num_virtual_tokens is not None and not isinstance(num_virtual_tokens, int):
        raise ValueError(f"`num_virtual_tokens` must be an integer of at least {longest}, got {num_virtual_tokens!r}.")
    if num_virtual_tokens is not None and num_virtual_tokens < longest:
        raise ValueError(
            f"`num_virtual_tokens` is {num_virtual_tokens}, but an adapter of the model has {longest}. Give the "
            "length of the longest adapter."
        )
    base, configs = _find_base_model(model), _get_configs(model)
    names = list(dict.fromkeys(name for _, name, _ in encoders))
    for layer, name, encoder in encoders:
        slot = PrefixSlot(encoder.geometry, num_virtual_tokens or _count_tokens(encoder))
        slot.to(encoder.anchor_keys.device).train(encoder.training).fill(encoder)
        layer.prefix_plus_encoder[name] = slot
        # Nothing is trained that dropout could serve; and one of whole tokens might hide all that are visible.
        layer.prefix_plus_dropout[name].probability = 0.0  # type: ignore[assignment]
    for name in names:
        configs[name] = copy(configs[name])
        configs[name].projection = "none"
        configs[name].remember_injected()
        _keep_shifts_in_tensors(base, name)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put a saved adapter in the place of a loaded one, under its name.

    The new adapter must be for the same base model and the same attention modules. Length and projection may differ;
    in a compiled model only after [`prepare_model_for_compiled_hotswap`]. If anything does not fit, the model stays as
    it was.

    Args:
        model (`nn.Module`): the model with the loaded adapter, compiled or not.
        model_name_or_path (`str`): directory or Hub repository of the new adapter.
        adapter_name (`str`): the loaded adapter that gives way, for instance `"default"`.
        torch_device (`str`, *optional*): where the file is read to; `None`: the CPU. The weights go to the devices of
            their layers from there.
        **kwargs: for reading configuration and weights: `subfolder`, `revision`, `token`, `cache_dir`, ...

    Raises:
        ValueError: if there is no such adapter, or the new one does not fit.

    Example:

    ```py
    >>> model = PeftModel.from_pretrained(base_model, "ferries-adapter")
    >>> hotswap_adapter(model, "trains-adapter", adapter_name="default")
    ```
    """
    configs, base = _get_configs(model), _find_base_model(model)
    if adapter_name not in configs:
        raise ValueError(f"There is no adapter {adapter_name!r}; the model has {', '.join(configs)}.")
    swap = _plan_swap(base, configs[adapter_name], adapter_name, model_name_or_path, torch_device or "cpu", kwargs)
    is_slotted = False
    for name, layer in swap.layers.items():
        _replace_encoder(layer, adapter_name, swap.encoders[name], swap.config)
        is_slotted = is_slotted or isinstance(layer.get_encoder(adapter_name), PrefixSlot)
    for name, weights in swap.other_weights.items():
        base.get_submodule(name).modules_to_save[adapter_name].load_state_dict(weights)
    _set_shifts(base, adapter_name, swap)
    swap.config.inference_mode = configs[adapter_name].inference_mode
    if is_slotted:
        swap.config.projection = "none"
    swap.config.remember_resolved(swap.plan.config)
    configs[adapter_name] = swap.config


def _check_not_compiled(model: nn.Module, check_compiled: str) -> None:
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"`check_compiled` must be 'error', 'warn' or 'ignore', got {check_compiled!r}.")
    is_compiled = any(
        isinstance(module, OptimizedModule) or module._compiled_call_impl is not None for module in model.modules()
    )
    message = "The model is compiled already, and would be compiled again. Prepare it for hot-swapping before."
    if is_compiled and check_compiled == "error":
        raise ValueError(message)
    if is_compiled and check_compiled == "warn":
        warnings.warn(message, stacklevel=3)


def _unwrap(model: nn.Module) -> Any:
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def _find_base_model(model: nn.Module) -> Any:
    model = _unwrap(model)
    return _unwrap(model.get_base_model()) if isinstance(model, PeftModel | PeftMixedModel) else model


def _get_configs(model: nn.Module) -> dict[str, Any]:
    """The configurations of a model's adapters, in a dict that is the model's own."""
    model = _unwrap(model)
    if isinstance(model, PeftModel | PeftMixedModel):
        return model.peft_config  # type: ignore[no-any-return]
    if "peft_config" in vars(model):
        return vars(model)["peft_config"]  # type: ignore[no-any-return]
    raise ValueError(f"{type(model).__name__} has no adapters. Hand over the model that an adapter was loaded into.")


def _count_tokens(encoder: PrefixEncoder) -> int:
    return encoder.extract().num_virtual_tokens


def _plan_swap(
    base: Any, old_config: Any, adapter_name: str, path: str, torch_device: str, kwargs: dict[str, Any]
) -> _Swap:
    """Read an adapter and check that it fits in the place of another; nothing is changed."""
    config: Any = PrefixPlusConfig.from_pretrained(path, **kwargs)
    for kind, found in (("adapter to be replaced", old_config), ("new adapter", config)):
        if not isinstance(found, PrefixPlusConfig):
            raise ValueError(
                f"The {kind} is of type {found.peft_type.value}, not PREFIX_PLUS. For LoRA use `peft.utils.hotswap`."
            )
    if old_config.trainable_token_indices or config.trainable_token_indices:
        raise ValueError(
            "An adapter with `trainable_token_indices` cannot be hot-swapped, as the rows of embeddings belong to it. "
            "Use `load_adapter` and `set_adapter`."
        )
    plan = plan_injection(config, base)
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, PrefixPlusLayer) and adapter_name in module.list_adapters()
    }
    _check_modules(path, plan.lengths.keys(), layers.keys())
    for name, layer in layers.items():
        _check_room(name, layer.get_encoder(adapter_name), plan.lengths[name])
    check_saved_weights(config, adapter_name, plan, base)
    weights = load_peft_weights(path, device=torch_device, **kwargs)
    modules, others = group_weights({key.removeprefix(PEFT_PREFIX): tensor for key, tensor in weights.items()})
    encoders = {name: _build_encoder(config, plan, name, tensors) for name, tensors in modules.items()}
    return _Swap(config, plan, layers, encoders, _sort_other_weights(base, adapter_name, others))


def _check_modules(path: str, targeted: Set[str], present: Set[str]) -> None:
    if targeted != present:
        raise ValueError(
            f"The adapter in {path} is for other attention modules than the one to be replaced: "
            f"{len(targeted - present)} more, {len(present - targeted)} fewer, for instance "
            f"{min(targeted ^ present)!r}. Load it under a name of its own with `load_adapter`."
        )


def _build_encoder(
    config: PrefixPlusConfig, plan: InjectionPlan, name: str, tensors: dict[str, Tensor]
) -> PrefixEncoder:
    encoder = config.build_encoder(plan.geometries[name], plan.lengths[name])
    encoder.load_state_dict(tensors)
    return encoder


def _check_room(name: str, present: PrefixEncoder, length: int) -> None:
    if isinstance(present, PrefixSlot) and length > present.num_virtual_tokens:
        raise ValueError(
            f"The new adapter has {length} virtual tokens in {name!r}, but the model was prepared for "
            f"{present.num_virtual_tokens}. Call `prepare_model_for_compiled_hotswap` with `num_virtual_tokens` of at "
            f"least {length}, before compiling."
        )


def _sort_other_weights(base: Any, adapter_name: str, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort weights of `modules_to_save` by their module, and check that they are those of the present adapter."""
    wrappers = {
        name: module.modules_to_save[adapter_name].state_dict()
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    }
    expected = {f"{name}.{key}": tensor for name, state in wrappers.items() for key, tensor in state.items()}
    offloaded = [key for key, tensor in expected.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"{offloaded[0]!r}, which was trained beside the prefix, is offloaded, and cannot be swapped there. Use "
            "`load_adapter` and `set_adapter`."
        )
    different = sorted(expected.keys() ^ weights.keys())
    different += [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    if different:
        raise ValueError(
            f"Beside the prefix, the adapters hold different weights, for instance {different[0]!r}. Both need the "
            "same `modules_to_save`."
        )
    return {name: {key: weights[f"{name}.{key}"] for key in state} for name, state in wrappers.items()}


def _replace_encoder(layer: PrefixPlusLayer, adapter_name: str, new: PrefixEncoder, config: PrefixPlusConfig) -> None:
    """Copy into the present encoder where it has the same tensors, or is a slot; else put the new one in its place.

    What offloading has left on the meta device would not take a copy, and not say so.
    """
    present, dropout = layer.get_encoder(adapter_name), layer.prefix_plus_dropout[adapter_name]
    if isinstance(present, PrefixSlot):
        present.fill(new)
        return
    held, given = present.state_dict(), new.state_dict()
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (held, given)]
    is_alike = type(present) is type(new) and shapes[0] == shapes[1]
    if is_alike and not any(tensor.is_meta for tensor in held.values()):
        present.load_state_dict(given)
    else:
        new.requires_grad_(any(parameter.requires_grad for parameter in present.parameters()))
        layer.prefix_plus_encoder[adapter_name] = new.train(present.training)
    dropout.probability, dropout.mode = config.prefix_dropout, config.prefix_dropout_mode  # type: ignore[assignment]


def _set_shifts(base: Any, adapter_name: str, swap: _Swap) -> None:
    """Move the input behind the new prefix; numbers that are tensors are filled in place."""
    _wrap_tables(base, adapter_name, swap.plan.position_shifts)
    longest = max(swap.plan.lengths.values()) if swap.config.initializes_from_tokens else 0
    for table, _, numbers in list_shifts(base):
        number = longest if table is None else swap.plan.position_shifts.get(table, 0)
        if isinstance(numbers.get(adapter_name), Tensor):
            numbers[adapter_name].fill_(number)
        else:
            numbers[adapter_name] = number


def _wrap_tables(base: Any, adapter_name: str, names: Iterable[str]) -> None:
    """Wrap tables of positions that no adapter has needed so far."""
    layers = list_layers(base, PrefixPlusLayer)
    for name in names:
        parent, table, table_name = _get_submodules(base, name)
        if not isinstance(table, ShiftedPositionEmbedding):
            wrapper = ShiftedPositionEmbedding(table)
            wrapper.update_layer(adapter_name, 0)
            wrapper.set_adapter(layers[0].active_adapters)
            wrapper.enable_adapters(not layers[0].disable_adapters)
            setattr(parent, table_name, wrapper)


def _keep_shifts_in_tensors(base: Any, adapter_name: str) -> None:
    """Turn the shifts of an adapter into tensors, which may change without a new compilation."""
    _wrap_tables(base, adapter_name, find_position_tables(base))
    for _, module, numbers in list_shifts(base):
        device = next(chain(module.parameters(), base.parameters())).device
        numbers[adapter_name] = torch.as_tensor(numbers.get(adapter_name, 0), device=device)
