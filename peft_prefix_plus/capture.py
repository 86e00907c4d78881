"""The keys and values that real tokens leave in every attention module."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import record_states
from .geometry import count_positions, find_attention_modules, find_position_tables
from .layer import PrefixPlusLayerBase
from .states import PrefixStates


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
        ValueError: if the tokens do not fit the vocabulary or the table of positions, or the model cannot be captured.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    elif isinstance(model, BaseTuner):
        model = model.model
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError(
            "The base model's weights are on the meta device, so no keys and values can be computed. Load the weights "
            "first, or load a saved adapter with `PeftModel.from_pretrained`."
        )
    ids = torch.as_tensor(input_ids, device=device)
    _check_token_ids(model, ids)
    ids = ids.reshape(1, -1)
    positions = _choose_positions(model, ids)
    modules = find_attention_modules(model)
    with torch.no_grad(), _bare_evaluation(model), record_states(list(modules.values())) as recording:
        model(input_ids=ids, **positions, use_cache=False)
    return {name: recording[module] for name, module in modules.items() if module in recording}


def _check_token_ids(model: PreTrainedModel, ids: Tensor) -> None:
    if ids.numel() == 0:
        raise ValueError("There are no tokens to capture; give at least one token id.")
    if ids.is_floating_point() or ids.dim() == 0 or ids.numel() != ids.shape[-1]:
        raise ValueError(
            f"`input_ids` must be the token ids of one text, `[tokens]` or `[1, tokens]`, got {ids.dtype} of shape "
            f"{tuple(ids.shape)}."
        )
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= num_embeddings:
        wrong = ids[(ids < 0) | (ids >= num_embeddings)].tolist()
        raise ValueError(
            f"The model has {num_embeddings} token embeddings, but got the token ids {wrong}. The tokens come from "
            "another tokenizer; use that of the base model."
        )


def _choose_positions(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Negative positions, or none where a table of learned positions starts by itself at its first row."""
    num_tokens = ids.shape[1]
    tables = find_position_tables(model)
    if not tables:
        return {"position_ids": torch.arange(-num_tokens, 0, device=ids.device)[None]}
    limit = min(count_positions(table) for table in tables.values())
    if num_tokens >= limit:
        raise ValueError(
            f"The prefix has {num_tokens} tokens, but the model has learned only {limit} absolute positions, and the "
            "input needs some too. Shorten the initialization, or set a smaller `num_virtual_tokens`."
        )
    return {}


@contextmanager
def _bare_evaluation(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation and every prefix off, and back."""
    training = [module for module in model.modules() if module.training]
    layers = [module for module in model.modules() if isinstance(module, PrefixPlusLayerBase)]
    disabled = [layer.disable_adapters for layer in layers]
    model.eval()
    for layer in layers:
        # Not `enable_adapters`, which also sets what requires gradients.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer._disable_adapters = was_disabled
        for module in training:
            module.training = True
