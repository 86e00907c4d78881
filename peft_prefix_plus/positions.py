"""Where the input stands relative to the prefix."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .geometry import count_positions, find_first_position, find_position_tables, uses_sectioned_rotary
from .layer import PrefixPlusLayer, PrefixPlusLayerBase


class ShiftedPositionEmbedding(PrefixPlusLayerBase):
    """Moves the input behind the prefix in a table of learned absolute positions.

    The prefix was captured at the first `P` positions, so the input goes to `P, P + 1, ...`. Rotary models need no
    such layer: there the prefix stands at negative positions.

    Args:
        base_layer (`nn.Embedding`): the table.
    """

    other_param_names = ("prefix_plus_shift",)

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer)
        self.prefix_plus_shift: dict[str, int] = {}
        self._active_adapter: list[str] = []

    def update_layer(self, adapter_name: str, num_virtual_tokens: int) -> None:
        """Add an adapter whose prefix takes the first `num_virtual_tokens` positions."""
        self.prefix_plus_shift[adapter_name] = num_virtual_tokens

    def list_adapters(self) -> list[str]:
        return list(self.prefix_plus_shift)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        shift = sum(self.prefix_plus_shift[name] for name in self.list_effective_adapters())
        if shift:
            if isinstance(kwargs.get("position_ids"), Tensor):
                kwargs["position_ids"] = self._shift(kwargs["position_ids"], shift)
            else:
                args = (self._shift(args[0], shift), *args[1:])
        output: Tensor = self.base_layer(*args, **kwargs)
        return output

    def _shift(self, position_ids: Tensor, shift: int) -> Tensor:
        table: nn.Embedding = self.base_layer  # type: ignore[assignment]
        limit, first = count_positions(table), find_first_position(table)
        shifted = position_ids + shift
        if not torch.compiler.is_compiling() and int(shifted.max()) - first >= limit:
            raise ValueError(
                f"The input reaches position {int(position_ids.max()) - first}, the prefix takes {shift} positions, "
                f"and the model has learned only {limit}. Shorten the prefix, or the input to at most {limit - shift}."
            )
        return shifted


class PositionAligner:
    """Forward pre-hook that starts every row's positions at its first real token.

    A rotary model may number a left-padded row from its padding on: only distances count. A prefix at negative
    positions makes the start count, so the positions are taken from the attention mask where the caller gives none.
    Without an active prefix the hook does nothing.
    """

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        inputs = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        if inputs is None and args:
            inputs = args[0]
        if inputs is None or not self._has_active_prefix(model):
            return None
        position_ids = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        return args, {**kwargs, "position_ids": position_ids[:, -inputs.shape[1] :]}

    @staticmethod
    def _has_active_prefix(model: nn.Module) -> bool:
        return any(
            bool(module.list_effective_adapters()) for module in model.modules() if isinstance(module, PrefixPlusLayer)
        )


def align_positions(model: nn.Module) -> None:
    """Install a [`PositionAligner`] on a model that numbers its own positions, once."""
    needs_one = not find_position_tables(model) and not uses_sectioned_rotary(model)
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    installed = any(isinstance(hook, PositionAligner) for hook in model._forward_pre_hooks.values())
    if needs_one and takes_positions and not installed:
        model.register_forward_pre_hook(PositionAligner(), with_kwargs=True)


def stop_aligning_positions(model: nn.Module) -> None:
    """Remove what [`align_positions`] installed, from the model or from what it wraps."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, PositionAligner):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
