"""Where the input stands relative to the prefix."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import (
    compares_positions_with_places,
    continues_media,
    count_positions,
    counts_positions_itself,
    find_first_position,
    find_first_text_position,
    find_inputs,
    find_numbered_stacks,
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
            start, tokens = arguments["past_key_values_length"], arguments.get("input_ids")
            if isinstance(tokens, Tensor):
                self._check_room(start + find_first_position(self.base_layer) + tokens.shape[1] - 1, shift)
            arguments["past_key_values_length"] = start + shift
        else:
            name = next(iter(arguments))
            self._check_room(arguments[name], shift)
            arguments[name] = arguments[name] + shift
        return self.base_layer(*bound.args, **bound.kwargs)

    def _check_room(self, rows: Tensor | int, shift: int) -> None:
        """Check that a table has the rows behind some of its rows; the last of those is enough."""
        limit = None if torch.compiler.is_compiling() else count_positions(self.base_layer)
        if limit is None:
            return
        last = int(rows.max() if isinstance(rows, Tensor) else rows) - find_first_position(self.base_layer)
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
        first_position (`int`): where the model itself lets a text begin.
    """

    def __init__(self, moves_input: bool, has_coordinates: bool, first_position: int = 0) -> None:
        self.shift: dict[str, int] = {}
        self.moves_input = moves_input
        self.has_coordinates = has_coordinates
        self.first_position = first_position

    def __call__(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = _name_arguments(model, args, kwargs)
        inputs = find_inputs(args, kwargs)
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        is_numbered = position_ids is not None or not isinstance(mask, Tensor) or mask.dim() != 2
        if inputs is None or (is_numbered and not self.moves_input):
            return None
        # Last, as the length of a static cache is a tensor, on which a compiled forward cannot decide.
        if self.has_coordinates and self._follows_media(model, kwargs):
            return None
        # Every token asks, and the first layer answers.
        layers = (module for module in model.modules() if isinstance(module, PrefixPlusLayer))
        active = (layer for layer in layers if layer.list_effective_adapters())
        first = next(active, None)
        if first is None:
            return None
        if position_ids is None:
            # The encoder of a pair reads its input at once, whatever the decoder has read before.
            cache = None if model.config.is_encoder_decoder else kwargs.get("past_key_values")
            position_ids = _count_tokens(inputs, None if is_numbered else mask, cache) + self.first_position
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
    def _follows_media(model: nn.Module, kwargs: dict[str, Any]) -> bool:
        if any(name.startswith(MEDIA_ARGUMENTS) and value is not None for name, value in kwargs.items()):
            return True
        cache = kwargs.get("past_key_values")
        return cache is not None and continues_media(model) and cache.get_seq_length() > 0


def _name_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward, all but the first by their names."""
    if len(args) < 2:
        return args, kwargs
    names = list(inspect.signature(model.forward).parameters)[1 : len(args)]
    if kwargs.keys() & names:
        # The model itself says what is wrong.
        return args, kwargs
    return args[:1], {**dict(zip(names, args[1:], strict=True)), **kwargs}


def _count_tokens(inputs: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """The position of each token in its row, `[batch or 1, tokens]`; that of the first real one is 0.

    Distances are those that the model itself would have: gaps in the mask count, and only what stands before the
    first real token does not.
    """
    positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
    if cache is not None:
        positions = positions + cache.get_seq_length()
    if mask is None:
        return positions
    if cache is None:
        # Models with a state of another kind get the mask of all that they have read.
        positions = positions + mask.shape[1] - inputs.shape[1]
    padding = (mask != 0).long().argmax(dim=-1, keepdim=True)
    return (positions - padding).clamp(min=0)


def align_positions(model: PreTrainedModel, adapter_name: str, num_virtual_tokens: int) -> None:
    """Install a [`PositionAligner`] on each stack of a model without a table of positions, and tell it of an adapter.

    Args:
        model (`nn.Module`): a transformers model.
        adapter_name (`str`): the adapter's name.
        num_virtual_tokens (`int`): how many positions its prefix takes; 0 if it was not made from real tokens.
    """
    stacks = find_numbered_stacks(model)
    if not stacks or find_position_tables(model) or compares_positions_with_places(model):
        return
    moves_input = uses_absolute_positions(model)
    # transformers deletes adapters without telling the tuner.
    present = {name for layer in list_layers(model, PrefixPlusLayer) for name in layer.list_adapters()}
    # Inner models may be called by themselves, and find the positions given otherwise. Nothing may be moved twice, so
    # the innermost one moves it.
    for stack in stacks[-1:] if moves_input else stacks:
        aligner = _find_aligner(stack)
        if aligner is None:
            aligner = PositionAligner(moves_input, uses_sectioned_rotary(stack), find_first_text_position(stack))
            stack.register_forward_pre_hook(aligner, with_kwargs=True)
        aligner.shift = {name: shift for name, shift in aligner.shift.items() if name in present}
        aligner.shift[adapter_name] = num_virtual_tokens


def _find_aligner(model: nn.Module) -> PositionAligner | None:
    hooks = model._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, PositionAligner)), None)


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
