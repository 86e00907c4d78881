"""The keys and values that real tokens leave in every attention module."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import (
    count_codebooks,
    count_positions,
    count_token_embeddings,
    find_attention_modules,
    find_device,
    find_input_shapes,
    find_inputs,
    find_missing_weights,
    find_numbered_stacks,
    find_position_tables,
    gather_weights,
    takes_argument,
    uses_absolute_positions,
)
from .attention import record_states
from .auxiliary import list_own_auxiliary
from .layer import PrefixPlusLayerBase, list_layers
from .states import PrefixStates


class CaptureError(ValueError):
    """The tokens, or the state of the model, do not allow a capture."""


def capture_prefix_states(model: PreTrainedModel, input_ids: Tensor | list[int]) -> dict[str, PrefixStates]:
    """Run a model over some tokens and keep what reaches its attention functions.

    As a prefix these keys and values act exactly like the tokens in front of the input. Rotary positions are relative:
    the tokens stand at `-P, ..., -1`, so the later input starts at 0 as ever. Learned absolute positions cannot be
    negative: there the tokens stand at `0, ..., P - 1`, and the input has to be shifted by `P`.

    Args:
        model (`PreTrainedModel`): a decoder of transformers, with or without prefixes, which are left out.
        input_ids (`torch.Tensor` or `list[int]`): `P` token ids of one text, `[P]` or `[1, P]`.

    Returns:
        `dict[str, PrefixStates]`: per attention module of the bare model; keys and values `[1, kv_heads, P, dim]` in
        the model's dtype.

    Raises:
        CaptureError: if the tokens do not fit the vocabulary or the table of positions, or there are no weights yet.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    elif isinstance(model, BaseTuner):
        model = model.model
    _check_weights(model)
    ids = torch.as_tensor(input_ids, device=find_device(model))
    with gather_weights(model):
        _check_token_ids(model, ids)
        with _negative_positions(model):
            return _record_forward(model, _build_text_inputs(model, ids.reshape(1, -1)))


def capture_noise_states(model: PreTrainedModel, seed: int) -> dict[str, PrefixStates]:
    """Run a model of images or sound over noise and keep what reaches its attention functions.

    Args:
        model (`PreTrainedModel`): a model, or a tower of one, that does not read tokens.
        seed (`int`): of the noise.

    Returns:
        `dict[str, PrefixStates]`: as from [`capture_prefix_states`].

    Raises:
        ValueError: if the shape of the model's input cannot be found.
        CaptureError: if there are no weights yet.
    """
    _check_weights(model)
    with gather_weights(model):
        return _record_forward(model, _draw_noise(model, seed))


def _check_weights(model: PreTrainedModel) -> None:
    missing = find_missing_weights(model)
    if not missing:
        return
    raise CaptureError(
        f"{len(missing)} weights of the base model, such as {missing[0]!r}, are on the meta device, so no keys and "
        "values can be computed that a prefix could start from. Load the weights first; or load a saved adapter with "
        "`PeftModel.from_pretrained(model, adapter_dir, low_cpu_mem_usage=True)`."
    )


def _draw_noise(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """What a model of images or sound reads, drawn from a normal distribution."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(find_device(model), parameter.dtype)
        for name, shape in find_input_shapes(model).items()
    }


def _record_forward(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, PrefixStates]:
    modules = find_attention_modules(model)
    with torch.no_grad(), _bare_evaluation(model), record_states(list(modules.values())) as recorder:
        model(**inputs)
    states = recorder.get_states()
    return {name: states[module] for name, module in modules.items() if module in states}


def _check_token_ids(model: PreTrainedModel, ids: Tensor) -> None:
    if ids.numel() == 0:
        raise CaptureError("There are no tokens to capture; give at least one token id.")
    if ids.is_floating_point() or ids.dim() == 0 or ids.numel() != ids.shape[-1]:
        raise CaptureError(
            f"`input_ids` must be the token ids of one text, `[tokens]` or `[1, tokens]`, got {ids.dtype} of shape "
            f"{tuple(ids.shape)}."
        )
    num_embeddings = count_token_embeddings(model)
    if int(ids.min()) < 0 or int(ids.max()) >= num_embeddings:
        wrong = ids[(ids < 0) | (ids >= num_embeddings)].tolist()
        raise CaptureError(
            f"The model has {num_embeddings} token embeddings, but got the token ids {wrong}. The tokens come from "
            "another tokenizer; use that of the base model."
        )


def _build_text_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """What the model's forward takes."""
    _check_room(model, ids.shape[1])
    # One row for each codebook of sound.
    ids = ids.expand(count_codebooks(model), -1)
    inputs: dict[str, Any] = {"use_cache": False} if takes_argument(model, "use_cache") else {}
    if takes_argument(model, "decoder_input_ids"):
        inputs["decoder_input_ids"] = ids
    if takes_argument(model, "input_ids"):
        inputs["input_ids"] = ids
    else:
        inputs |= _draw_noise(model, seed=0)
    return inputs


@contextmanager
def _negative_positions(model: PreTrainedModel) -> Iterator[None]:
    """Let the tokens stand right before position 0, where only distances count.

    The decoder of a pair numbers its own; other inner models are told by the outer ones.
    """
    stacks = find_numbered_stacks(model)
    if not stacks or find_position_tables(model) or uses_absolute_positions(model):
        yield
        return

    def number(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = find_inputs(args, kwargs)
        if inputs is None or kwargs.get("position_ids") is not None:
            return None
        positions = torch.arange(-inputs.shape[1], 0, device=inputs.device)[None]
        return args, {**kwargs, "position_ids": positions}

    handles = [stack.register_forward_pre_hook(number, with_kwargs=True) for stack in stacks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_room(model: PreTrainedModel, num_tokens: int) -> None:
    limits = [count_positions(table) for table in find_position_tables(model).values()]
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is not None and num_tokens >= limit:
        raise CaptureError(
            f"The prefix has {num_tokens} tokens, but the model has learned only {limit} absolute positions, and the "
            "input needs some too. Shorten the initialization, or set a smaller `num_virtual_tokens`."
        )


@contextmanager
def _bare_evaluation(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation and every prefix off, with what was trained beside it, and back."""
    modes = {module: module.training for module in model.modules()}
    layers = [*list_layers(model, PrefixPlusLayerBase), *list_own_auxiliary(model)]
    disabled = [layer.disable_adapters for layer in layers]
    for module in modes:
        # In evaluation, bitsandbytes may repack the weights for inference, and then passes no gradients on any more.
        module.training = type(module).__name__ == "Linear4bit"
    for layer in layers:
        # Not `enable_adapters`, which also sets what requires gradients.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer._disable_adapters = was_disabled
        for module, mode in modes.items():
            module.training = mode
