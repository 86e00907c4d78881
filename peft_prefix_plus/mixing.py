"""Mixed batches: every row of a forward has an adapter of its own."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .architectures import TEXT_INPUTS, find_inputs
from .states import RowSelection

# What PEFT calls the base model among the names of adapters.
BASE = "__base__"


class RowAdapters:
    """The adapter of each row of a mixed batch.

    Args:
        names (`Sequence[str]`): one adapter a row; `"__base__"` for none.
        prefixes (`Collection[str]`): all prefixes of the model, unlike adapters of other methods in it.
    """

    def __init__(self, names: Sequence[str], prefixes: Collection[str]) -> None:
        self.names = tuple(names)
        self.prefixes = prefixes
        self.adapters = tuple(dict.fromkeys(name for name in names if name != BASE))
        # Rows of the forward that is running: beams and returned sequences repeat every row.
        self.batch_size = len(names)
        self._selections: dict[Any, RowSelection] = {}

    def check_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], main_input: str) -> None:
        """Check that the inputs of a model, where they can be told, have as many rows as there are names.

        Args:
            args (`tuple`), kwargs (`Mapping`): of its forward or of `generate`.
            main_input (`str`): what it reads, if it reads no text. Images that stand in a text have other rows.

        Raises:
            ValueError: if not.
        """
        inputs = find_inputs(args, kwargs, (*TEXT_INPUTS, "inputs", main_input))
        if inputs is not None and inputs.shape[0] != len(self.names):
            raise ValueError(self._describe_misfit(inputs.shape[0]))

    def _describe_misfit(self, batch_size: int) -> str:
        return (
            f"`adapter_names` has {len(self.names)} names, but the batch has {batch_size} rows. Give one name "
            f"for each row, and {BASE!r} for a row without an adapter."
        )

    def repeat(self, batch_size: int) -> list[str]:
        """Return the adapter of each of `batch_size` rows, where generation may have repeated every row in place.

        Raises:
            ValueError: if the batch is not made of the rows that have names.
        """
        repeats, remainder = divmod(batch_size, len(self.names))
        if remainder or not repeats:
            raise ValueError(self._describe_misfit(batch_size))
        return [name for name in self.names for _ in range(repeats)]

    def select(self, adapters: Sequence[str], batch_size: int, device: torch.device) -> RowSelection:
        """Say which of some adapters each row uses.

        Args:
            adapters (`Sequence[str]`): names; rows with another adapter use none of them.
            batch_size (`int`): number of rows.
            device (`torch.device`): where the index is needed.
        """
        key = (tuple(adapters), batch_size, device)
        if key not in self._selections:
            numbers = {name: number for number, name in enumerate(adapters)}
            rows = [numbers.get(name, -1) for name in self.repeat(batch_size)]
            self._selections[key] = RowSelection(torch.tensor(rows, device=device), min(rows) >= 0)
        return self._selections[key]

    def spread(self, numbers: Mapping[str, int], batch_size: int) -> list[int]:
        """Return the number of each row's adapter; 0 for a row without one."""
        return [numbers.get(name, 0) for name in self.repeat(batch_size)]


def check_adapter_names(adapter_names: Any, available: Collection[str], is_training: bool) -> None:
    """Check the argument `adapter_names` of a forward against the prefixes of a model.

    Raises:
        TypeError: if it is not a list of names.
        ValueError: if a name is unknown, or the model is in training mode.
    """
    if not isinstance(adapter_names, list | tuple) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"`adapter_names` must be a list with one name a row, not {adapter_names!r}.")
    unknown = sorted(set(adapter_names) - set(available) - {BASE})
    if unknown or not adapter_names:
        raise ValueError(
            f"`adapter_names` has {unknown}, but the model has the prefixes {', '.join(available)}. Rows without one "
            f"are named {BASE!r}."
        )
    if is_training:
        raise ValueError("`adapter_names` is for inference, and the model is in training mode. Call `model.eval()`.")


def _name_rows(rows: RowAdapters, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tell a module that is trained and saved beside the adapters, such as a head, whose row is whose.

    What LoRA trained beside the prefixes is used by all rows whose prefix has nothing in its place.
    """
    states: Tensor = args[0] if args else next(item for item in kwargs.values() if isinstance(item, Tensor))
    available = module._get_available_adapters()
    shared = next((name for name in module.active_adapters if name not in rows.prefixes), BASE)
    names = [name if name in available else shared for name in rows.repeat(len(states))]
    return args, {**kwargs, "adapter_names": names}


def _count_rows(rows: RowAdapters, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = find_inputs(args, kwargs)
    if inputs is not None:
        rows.batch_size = inputs.shape[0]


@contextmanager
def name_rows(model: nn.Module, stacks: Sequence[nn.Module], rows: RowAdapters) -> Iterator[None]:
    """Have modules in `modules_to_save` take part in a mixed batch, and some models count its rows.

    Args:
        model (`nn.Module`): the model.
        stacks (`Sequence[nn.Module]`): those that write to `rows.batch_size` how many rows they got.
        rows ([`RowAdapters`]): the rows.
    """
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [
        wrapper.register_forward_pre_hook(partial(_name_rows, rows), with_kwargs=True) for wrapper in wrappers
    ] + [stack.register_forward_pre_hook(partial(_count_rows, rows), with_kwargs=True) for stack in stacks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
