"""Gives a prefix to attention modules that compute attention by themselves, without the attention interface.

Such a module multiplies queries and keys, does what it likes to the scores (scales them, adds masks and biases), takes
their softmax and multiplies it with the values. While it runs, [`AttentionArithmetic`] follows the scores from one
product to the other and computes the columns of the prefix beside them: whatever acts on every score alike acts on
them too, and what tells tokens apart (a mask, a bias of their positions) does not. The softmax is taken over both.
The module's masks, caches and positions stay as they are.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..architectures import read_alibi_slopes
from ..states import PrefixStates
from .contraction import Contraction, find_contraction
from .delivery import current_recorder, peek_prefix, take_prefix
from .dense import attend_sdpa
from .prepending import match_prefix

# Change places or choose entries, so that what comes out no longer is one score per query and key.
_REARRANGING = frozenset(
    {"gather", "transpose", "permute", "swapaxes", "flip", "roll", "sort", "cumsum", "__getitem__"}
)

# Name the sizes that come out; those of the prefix differ in the last axis.
_RESHAPING = frozenset({"view", "reshape"})

# Shown by `torch.compile(fullgraph=True)`.
_NOT_COMPILED = "PrefixPlus runs modules without the attention interface uncompiled; leave out `fullgraph=True`"


class _Scores(NamedTuple):
    """Scores between the first product and the softmax, and what has been done to them."""

    product: Contraction
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()


class _Weights(NamedTuple):
    """Weights between the softmax and the second product; those of the prefix, and the keys that a capture wants."""

    prefix: Tensor | None
    keys: Tensor | None


class AttentionArithmetic(TorchFunctionMode):
    """While active, adds a prefix to the attention that a module computes, or records its keys and values.

    Args:
        module (`nn.Module`): the attention module that runs.
        prefix ([`PrefixStates`], *optional*): its prefix; `None`: record.
        mask (`torch.Tensor`, *optional*): the attention mask that the module gets.
    """

    def __init__(self, module: nn.Module, prefix: PrefixStates | None, mask: Any = None) -> None:
        super().__init__()
        self.module = module
        self.prefix = prefix
        self.mask = mask
        self.slopes = read_alibi_slopes(module)
        # By identity; the tensors are kept, so that an identity is not given away again.
        self._followed: dict[int, tuple[Tensor, _Scores | _Weights]] = {}
        # Softmaxes whose weights have not met the values yet.
        self._num_open = 0

    def prove_completion(self) -> None:
        """Raise a `RuntimeError` if weights of the prefix were lost on their way to the values."""
        if self._num_open:
            raise RuntimeError(
                f"{type(self.module).__name__} does something to its attention weights that PrefixPlus cannot follow, "
                "so a part of its output was computed without the prefix. Exclude the module with `exclude_modules`, "
                "or report the architecture."
            )

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._attend_fused(*args, **kwargs)
        tensors = _list_tensors((*args, *kwargs.values()))
        subject, state = next(
            (self._followed[id(tensor)] for tensor in tensors if id(tensor) in self._followed), (None, None)
        )
        contraction = find_contraction(name, args, kwargs, is_keys=not isinstance(state, _Weights))
        if contraction is not None and isinstance(state, _Weights):
            return self._contract_values(func, args, kwargs, contraction, state)
        if name == "softmax" and subject is not None and isinstance(state, _Scores):
            return self._take_softmax(func, args, kwargs, subject, state)
        if name == "softmax" and tensors[0].dim() > 2 and self._last_axis(args, kwargs):
            self._refuse()
        output = func(*args, **kwargs)
        if contraction is not None:
            self._follow(output, self._start_scores(name, args, kwargs, contraction))
        elif subject is not None and state is not None and isinstance(output, Tensor) and name not in _REARRANGING:
            self._continue(func, args, kwargs, subject, state, output)
        return output

    def _follow(self, tensor: Tensor, state: _Scores | _Weights) -> None:
        self._followed[id(tensor)] = (tensor, state)

    def _start_scores(self, name: str, args: tuple[Any, ...], kwargs: Any, contraction: Contraction) -> _Scores:
        scores = _Scores(contraction)
        if name == "baddbmm":
            alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
            added = self._continue_bias(scores, args[0] * beta, args[0].dtype)
            return scores._replace(steps=(lambda prefix: prefix * alpha, added))
        return scores

    def _continue(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Any,
        subject: Tensor,
        state: _Scores | _Weights,
        output: Tensor,
    ) -> None:
        """Follow scores or weights through one operation, if it leaves one entry per query and token."""
        if output.shape[-1:] != subject.shape[-1:]:
            return
        name = func.__name__
        if name in _RESHAPING or (output.numel() == subject.numel() and output.shape != subject.shape):
            step: Callable[[Tensor], Tensor] = lambda prefix: prefix.reshape(*output.shape[:-1], -1)  # noqa: E731
        elif output.dim() != subject.dim():
            return
        else:
            operands = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor) and item is not subject]
            of_tokens = [item for item in operands if item.dim() and item.shape[-1] == subject.shape[-1] != 1]
            if isinstance(state, _Scores) and subject.shape[-1] == 1 and re.search("mul|div", name) is None:
                # A single key may be hidden or have a position, too; but a factor is for all keys.
                of_tokens = [item for item in operands if item.dim() == subject.dim()]
            if isinstance(state, _Scores) and self.slopes is not None and operands:
                of_tokens = operands
            if of_tokens:
                step = self._continue_bias(state, of_tokens[0], output.dtype)
            else:
                step = lambda prefix: func(  # noqa: E731
                    *(prefix if item is subject else item for item in args),
                    **{key: prefix if item is subject else item for key, item in kwargs.items()},
                )
        if isinstance(state, _Scores):
            self._follow(output, state._replace(steps=(*state.steps, step)))
        elif state.prefix is not None:
            self._follow(output, state._replace(prefix=step(state.prefix)))
        else:
            self._follow(output, state)

    def _continue_bias(
        self, state: _Scores | _Weights, operand: Tensor, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor]:
        """What an operand with one entry per token means for the prefix: nothing, unless it is an ALiBi bias."""
        if isinstance(state, _Weights) or self.slopes is None or self.prefix is None:
            return lambda prefix: prefix.to(dtype)
        length = self.prefix.num_virtual_tokens
        if operand is not self.mask:
            bias = self.slopes.continue_bias(operand, length)
        elif operand.dtype == torch.bool:
            bias = self.slopes.skip_padding(operand, dtype)
        elif self.slopes.mask_scale is not None:
            bias = self.slopes.spread(length, operand.device, dtype) * self.slopes.mask_scale
        else:
            return lambda prefix: prefix.to(dtype)
        return lambda prefix: prefix + bias

    def _take_softmax(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, subject: Tensor, scores: _Scores
    ) -> Tensor:
        if not self._last_axis(args, kwargs) or args[0] is not subject:
            self._refuse()
        if self.prefix is None:
            weights: Tensor = func(*args, **kwargs)
            self._follow(weights, _Weights(None, scores.product.read_states()))
            return weights
        query = scores.product.left
        prefix = self.prefix
        columns = scores.product.contract_states(query, prefix.keys.to(query.device, query.dtype))
        for step in scores.steps:
            columns = step(columns)
        columns = columns.expand(*subject.shape[:-1], -1)
        if prefix.mask is not None:
            columns = columns.masked_fill(_hidden_columns(prefix, columns), torch.finfo(columns.dtype).min)
        joint = func(torch.cat([columns.to(subject.dtype), subject], dim=-1), *args[1:], **kwargs)
        weights = joint[..., prefix.num_virtual_tokens :]
        self._follow(weights, _Weights(joint[..., : prefix.num_virtual_tokens], None))
        self._num_open += 1
        return weights

    @staticmethod
    def _last_axis(args: tuple[Any, ...], kwargs: Any) -> bool:
        """Whether a softmax goes over the last axis, that of the keys."""
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return dim in (-1, args[0].dim() - 1)

    def _contract_values(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, contraction: Contraction, weights: _Weights
    ) -> Tensor:
        output: Tensor = func(*args, **kwargs)
        recorder = current_recorder()
        if weights.prefix is None and weights.keys is not None and recorder is not None:
            recorder.record(self.module, PrefixStates(weights.keys, contraction.read_states()))
        elif weights.prefix is not None:
            values = take_prefix(self.module).values.to(output.device, output.dtype)
            output = output + contraction.contract_states(weights.prefix.to(output.dtype), values)
            self._num_open -= 1
            # A second product with the same weights, as with values of relative positions, is not for the prefix.
            self._followed = {key: item for key, item in self._followed.items() if item[1] is not weights}
        return output

    def _attend_fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **unused: Any
        ) -> tuple[Tensor, None]:
            causal = is_causal and mask is None
            output = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, causal, **kwargs)
            return output.transpose(1, 2), None

        recorder = current_recorder()
        if self.prefix is None and recorder is not None:
            recorder.record(self.module, PrefixStates(key, value))
            return attend(self.module, query, key, value, attn_mask)[0].transpose(1, 2)
        prefix = match_prefix(take_prefix(self.module), key, value)
        if attn_mask is not None:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
            if self.slopes is not None and self.slopes.mask_scale is not None:
                length = prefix.num_virtual_tokens
                bias = self.slopes.spread(length, query.device, query.dtype)[None] * self.slopes.mask_scale
                prefix = prefix._replace(bias=bias)
        output, _ = attend_sdpa(attend, self.module, query, key, value, attn_mask, prefix, is_causal=is_causal)
        return output.transpose(1, 2)

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{type(self.module).__name__} takes a softmax that PrefixPlus cannot follow from queries and keys, so "
            "its attention cannot carry a prefix. Exclude the module with `exclude_modules`."
        )


def _list_tensors(items: Iterable[Any]) -> list[Tensor]:
    """The tensors among some arguments; `einsum` may get its operands as one list."""
    nested = (item if isinstance(item, list | tuple) else (item,) for item in items)
    return [item for group in nested for item in group if isinstance(item, Tensor)]


def _hidden_columns(prefix: PrefixStates, columns: Tensor) -> Tensor:
    assert prefix.mask is not None
    hidden = ~prefix.mask.to(columns.device)
    if columns.dim() == 3:
        num_heads = prefix.keys.shape[1]
        return hidden.expand(columns.shape[0] // num_heads, -1).repeat_interleave(num_heads, dim=0)[:, None]
    return hidden.view(hidden.shape[0], *(1,) * (columns.dim() - 2), -1)


def find_mask_argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The attention mask among the arguments of a module's forward."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    return bound.arguments.get("attention_mask")


@torch.compiler.disable(reason=_NOT_COMPILED)  # type: ignore[no-untyped-call, untyped-decorator]
def attend_by_arithmetic(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module that computes attention by itself, with the prefix that is on its way to it."""
    # Only a module with position biases may have merged them into its mask.
    mask = find_mask_argument(module, args, kwargs) if read_alibi_slopes(module) is not None else None
    arithmetic = AttentionArithmetic(module, peek_prefix(module), mask)
    with arithmetic:
        output = module(*args, **kwargs)
    arithmetic.prove_completion()
    return output


@contextmanager
def record_arithmetic(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Record the keys and values of modules that compute attention by themselves, whenever one of them runs."""
    listening: list[AttentionArithmetic] = []

    def start(module: nn.Module, args: Any) -> None:
        mode = AttentionArithmetic(module, None)
        mode.__enter__()  # type: ignore[no-untyped-call]
        listening.append(mode)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        listening.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    handles = [module.register_forward_pre_hook(start) for module in modules]
    handles += [module.register_forward_hook(stop) for module in modules]
    try:
        yield
    finally:
        while listening:
            listening.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for handle in handles:
            handle.remove()
