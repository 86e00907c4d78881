"""The two products of attention, as modules write them: matrix products and Einstein sums."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Contraction(NamedTuple):
    """A product of attention: of queries and keys, or of weights and values.

    Attributes:
        left (`torch.Tensor`): queries or weights.
        right (`torch.Tensor`): keys or values.
        equation (`str`, *optional*): of an `einsum`; `None` for matrix products over the last two axes, where the
            right side is `[batch, heads, ..., ...]`, or `[batch * heads, ..., ...]`.
        is_keys (`bool`): whether the right side are the keys, whose features are contracted.
    """

    left: Tensor
    right: Tensor
    equation: str | None
    is_keys: bool

    def read_states(self) -> Tensor:
        """The keys or values on the right, `[1, heads, tokens, dim]`; only for a batch of one."""
        if self.equation is not None:
            term, states_term, _ = self._name_axes()
            return torch.einsum(f"{term}->{states_term}", self.right)
        states = self.right.transpose(-1, -2) if self.is_keys else self.right
        return states if states.dim() == 4 else states[None]

    def contract_states(self, left: Tensor, states: Tensor) -> Tensor:
        """The same product with the prefix's keys or values, `[batch or 1, heads, P, dim]`, on the right."""
        if self.equation is not None:
            _, states_term, equation = self._name_axes()
            left_term = self.equation.partition(",")[0]
            states = states.expand(left.shape[left_term.index(states_term[0])], -1, -1, -1)
            return torch.einsum(equation, left, states)
        if left.dim() == 3:
            states = states.expand(left.shape[0] // states.shape[1], -1, -1, -1).flatten(0, 1)
        return torch.matmul(left, states.transpose(-1, -2) if self.is_keys else states)

    def _name_axes(self) -> tuple[str, str, str]:
        """Letters of the right side as it is, as prefix states, and the equation with those in its place."""
        assert self.equation is not None
        terms, _, result = self.equation.replace(" ", "").partition("->")
        left, _, right = terms.partition(",")
        shared = [letter for letter in left if letter in right and letter in result]
        contracted = next(letter for letter in left if letter in right and letter not in result)
        own = next(letter for letter in right if letter not in left)
        tokens, features = (own, contracted) if self.is_keys else (contracted, own)
        # The first shared axis is the batch, the last one the heads; streams between them share the prefix.
        states = f"{shared[0]}{shared[-1]}{tokens}{features}"
        return right, states, f"{left},{states}->{result}"


def find_contraction(name: str, args: tuple[Any, ...], kwargs: Any, is_keys: bool) -> Contraction | None:
    """Recognize a product of two activations.

    Args:
        name (`str`): of the function that is called.
        args (`tuple`), kwargs (`dict`): its arguments.
        is_keys (`bool`): whether keys would be on the right side.

    Returns:
        [`Contraction`], *optional*: `None` for any other call.
    """
    equation = None
    if name == "einsum":
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = list(operands[0])
        equation = equation.replace("...", "XYZ"[: operands[0].dim() - len(equation.partition(",")[0].strip(". "))])
    elif name in ("matmul", "__matmul__", "bmm"):
        operands = list(args[:2])
    elif name == "baddbmm":
        operands = [*args[1:3], *(kwargs[key] for key in ("batch1", "batch2") if key in kwargs)]
    else:
        return None
    if len(operands) != 2 or any(isinstance(item, nn.Parameter) or item.dim() < 3 for item in operands):
        return None
    return Contraction(operands[0], operands[1], equation, is_keys)
