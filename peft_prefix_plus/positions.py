"""Where the input stands relative to the prefix."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import (
    count_positions,
    counts_positions_itself,
    find_first_position,
    find_inputs,
    find_numbered_stack,
    find_owner,
    find_position_tables,
    uses_absolute_positions,
    uses_sectioned_rotary,
)
from .layer import PrefixPlusLayer, PrefixPlusLayerBase, list_layers

# How arguments of a multimodal model begin that hold images or sound.
MEDIA_ARGUMENTS = ("pixel_values", "image", "video", "audio", "input_features")


class ShiftedPositionEmbedding(PrefixPlusLayerBase):
    """Moves the input behind the prefix in a table of absolute positions.

    The prefix was captured at the first `P` positions, so the input goes to `P, P + 1, ...`. Rotary models need no
    such layer: there the prefix stands at negative positions.

    Args:
        base_layer (`nn.Module`): the table.
    """

    other_param_names = ("prefix_plus_shift",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.prefix_plus_shift: dict[str, int] = {}
        self._active_adapter: list[str] = []

    def update_layer(self, adapter_name: str, num_virtual_tokens: int) -> None:
        """Add an adapter whose prefix takes the first `num_virtual_tokens` positions."""
        self.prefix_plus_shift[adapter_name] = num_virtual_tokens

    def list_adapters(self) -> list[str]:
        return list(self.prefix_plus_shift)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None and not self.disable_adapters:
            return self._look_up_rows(self.rows.spread(self.prefix_plus_shift, self.rows.batch_size), args, kwargs)
        return self._look_up(
            sum(self.prefix_plus_shift[name] for name in self.list_effective_adapters()), args, kwargs
        )

    def _look_up_rows(self, shifts: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look the input up behind each of the prefixes in a mixed batch, and take for every row what is its own."""
        first, *others = dict.fromkeys(shifts)
        output = self._look_up(first, args, kwargs)
        for shift in others:
            is_own = torch.tensor([own == shift for own in shifts], device=output.device)
            output = torch.where(is_own[:, None, None], self._look_up(shift, args, kwargs), output)
        return output

    def _look_up(self, shift: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(shift, int) and not shift:
            return self.base_layer(*args, **kwargs)
        bound = inspect.signature(self.base_layer.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if isinstance(arguments.get("position_ids"), Tensor):
            self._check_room(arguments["position_ids"], shift)
            arguments["position_ids"] = arguments["position_ids"] + shift
        elif counts_positions_itself(self.base_layer):
            arguments["past_key_values_length"] = arguments["past_key_values_length"] + shift
        else:
            name = next(iter(arguments))
            self._check_room(arguments[name], shift)
            arguments[name] = arguments[name] + shift
        return self.base_layer(*bound.args, **bound.kwargs)

    def _check_room(self, position_ids: Tensor, shift: int) -> None:
        limit, first = count_positions(self.base_layer), find_first_position(self.base_layer)
        if limit is None or torch.compiler.is_compiling():
            return
        last = int(position_ids.max()) - first
        if last + shift >= limit:
            raise ValueError(
                f"The input reaches position {last}, the prefix takes {shift} positions, and the model has learned "
                f"only {limit}. Shorten the prefix, or the input to at most {limit - shift}."
            )


class PositionAligner:
    """Forward pre-hook that numbers the input of a model so that it starts right behind the prefix.

    A rotary model may number a left-padded row from its padding on: only distances count. A prefix at negative
    positions makes the start count, so the positions are taken from the attention mask where the caller gives none.
    In the few models without a table of positions whose outputs still depend on where a text starts, the prefix stands
    at the first positions, and the input moves behind it. Without an active prefix the hook does nothing.

    Args:
        moves_input (`bool`): whether the input moves.
        has_coordinates (`bool`): whether the positions of images have several coordinates, which the model knows, and
            which later text continues; it is left alone then.
    """

    def __init__(self, moves_input: bool, has_coordinates: bool) -> None:
        self.shift: dict[str, int] = {}
        self.moves_input = moves_input
        self.has_coordinates = has_coordinates

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = find_inputs(args, kwargs)
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        is_numbered = position_ids is not None or not isinstance(mask, Tensor) or mask.dim() != 2
        if inputs is None or (is_numbered and not self.moves_input):
            return None
        # Last, as the length of a static cache is a tensor, on which a compiled forward cannot decide.
        if self.has_coordinates and self._has_media_or_past(kwargs):
            return None
        # Every token asks, and the first layer answers.
        layers = (module for module in model.modules() if isinstance(module, PrefixPlusLayer))
        active = (layer for layer in layers if layer.list_effective_adapters())
        first = next(active, None)
        if first is None:
            return None
        if position_ids is None and not is_numbered:
            position_ids = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]  # type: ignore[union-attr]
        elif position_ids is None:
            cache = kwargs.get("past_key_values")
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(inputs.shape[1], device=inputs.device)[None] + start
        if self.moves_input:
            position_ids = position_ids + self._compute_shift([first, *active], inputs)
        return args, {**kwargs, "position_ids": position_ids}

    def _compute_shift(self, layers: list[PrefixPlusLayer], inputs: Tensor) -> int | Tensor:
        """How far the input moves: an int, or `[batch, 1]` if every row has an adapter of its own."""
        rows = layers[0].rows
        if rows is not None:
            return torch.tensor(rows.spread(self.shift, inputs.shape[0]), device=inputs.device)[:, None]
        active = {name for layer in layers for name in layer.list_effective_adapters()}
        return sum(self.shift.get(name, 0) for name in active)

    @staticmethod
    def _has_media_or_past(kwargs: dict[str, Any]) -> bool:
        if any(name.startswith(MEDIA_ARGUMENTS) and value is not None for name, value in kwargs.items()):
            return True
        cache = kwargs.get("past_key_values")
        return cache is not None and cache.get_seq_length() > 0


def align_positions(model: PreTrainedModel, adapter_name: str, num_virtual_tokens: int) -> None:
    """Install a [`PositionAligner`] on a model that has no table of positions, once, and tell it of an adapter.

    Args:
        model (`nn.Module`): a transformers model.
        adapter_name (`str`): the adapter's name.
        num_virtual_tokens (`int`): how many positions its prefix takes; 0 if it was not made from real tokens.
    """
    stack = find_numbered_stack(model)
    if stack is None or find_position_tables(model):
        return
    aligners = [hook for hook in stack._forward_pre_hooks.values() if isinstance(hook, PositionAligner)]
    if not aligners:
        aligners = [PositionAligner(uses_absolute_positions(model), uses_sectioned_rotary(model))]
        stack.register_forward_pre_hook(aligners[0], with_kwargs=True)
    # transformers deletes adapters without telling the tuner.
    layers = list_layers(model, PrefixPlusLayer)
    present = {name for layer in layers for name in layer.list_adapters()}
    aligners[0].shift = {name: shift for name, shift in aligners[0].shift.items() if name in present}
    aligners[0].shift[adapter_name] = num_virtual_tokens


def stop_aligning_positions(model: nn.Module) -> None:
    """Remove what [`align_positions`] installed, from the model or from what it wraps."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, PositionAligner):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def forget_adapter(model: nn.Module, adapter_name: str) -> None:
    """Have the input of a model no longer moved for an adapter."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, PositionAligner):
                hook.shift.pop(adapter_name, None)


def find_shifted_stacks(model: nn.Module) -> list[nn.Module]:
    """Find the models inside of a model whose tables of positions are shifted."""
    tables = [name for name, module in model.named_modules() if isinstance(module, ShiftedPositionEmbedding)]
    return [model.get_submodule(owner) for owner in dict.fromkeys(find_owner(model, name) for name in tables)]


class PositionShifts(NamedTuple):
    """How far every adapter moves the input in one place.

    Attributes:
        table (`str`, *optional*): name of a table of positions; `None` for what numbers the input of a whole model.
        module (`nn.Module`): the table, or the model.
        numbers (`dict[str, int]`): by adapter; 0-dim tensors in a model that is prepared for hot-swapping.
    """

    table: str | None
    module: nn.Module
    numbers: dict[str, Any]


def list_shifts(model: nn.Module) -> list[PositionShifts]:
    """Find all places in a model where the input is moved behind the prefix."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ShiftedPositionEmbedding):
            found.append(PositionShifts(name, module, module.prefix_plus_shift))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, PositionAligner) and hook.moves_input:
                found.append(PositionShifts(None, module, hook.shift))
    return found
