"""What a prefix is before training: real tokens, random numbers, or zeros."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from .capture import capture_prefix_states
from .config import DEFAULT_NUM_VIRTUAL_TOKENS, PrefixPlusConfig
from .states import PrefixStates


class InitialStates(NamedTuple):
    """Where the prefix of one attention module starts.

    Attributes:
        anchor ([`PrefixStates`]): keys and values, `[1, kv_heads, P, dim]` in float32.
        scale ([`PrefixStates`]): root mean square of the model's own keys and values per head, `[1, kv_heads, 1, 1]`.
    """

    anchor: PrefixStates
    scale: PrefixStates


def resolve_init_token_ids(config: PrefixPlusConfig, model: PreTrainedModel) -> list[int] | None:
    """Return the tokens that a configuration names, before they are fitted to the prefix length.

    Args:
        config ([`PrefixPlusConfig`]): with any `prefix_init`.
        model (`PreTrainedModel`): the base model, asked for its tokenizer's name.

    Returns:
        `list[int]`, *optional*: `None` unless `prefix_init` is `"text"` or `"tokens"`.

    Raises:
        ValueError: if the tokenizer cannot be loaded, or the text has no tokens.
    """
    if config.prefix_init == "tokens":
        return config.prefix_init_token_ids
    if config.prefix_init == "text":
        return tokenize_init_text(config, model)
    return None


def tokenize_init_text(config: PrefixPlusConfig, model: PreTrainedModel) -> list[int]:
    """Tokenize `prefix_init_text`, without special tokens unless `tokenizer_kwargs` asks for them."""
    name = config.tokenizer_name_or_path or config.base_model_name_or_path or model.config.name_or_path
    remedy = "Set `tokenizer_name_or_path`, or give `prefix_init_token_ids` instead of `prefix_init_text`."
    if not name:
        raise ValueError(f"`prefix_init_text` needs a tokenizer, but the base model has no name or path. {remedy}")
    tokenizer_kwargs = dict(config.tokenizer_kwargs or {})
    add_special_tokens = tokenizer_kwargs.pop("add_special_tokens", False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **tokenizer_kwargs)
    except Exception as error:
        raise ValueError(f"Cannot load the tokenizer {name!r} for `prefix_init_text` ({error}). {remedy}") from error
    token_ids: list[int] = tokenizer(config.prefix_init_text, add_special_tokens=add_special_tokens)["input_ids"]
    if not token_ids:
        raise ValueError(
            f"`prefix_init_text` is {config.prefix_init_text!r}, which {name!r} tokenizes to nothing. Give a text "
            "with at least one token."
        )
    return token_ids


def resolve_prefix_length(config: PrefixPlusConfig, init_token_ids: list[int] | None) -> int:
    """Return `num_virtual_tokens`, or what stands in for it: the number of init tokens, or 20."""
    if config.num_virtual_tokens is not None:
        return config.num_virtual_tokens
    return DEFAULT_NUM_VIRTUAL_TOKENS if init_token_ids is None else len(init_token_ids)


def fit_token_ids(token_ids: list[int], length: int) -> list[int]:
    """Repeat or truncate tokens to a length; truncating warns.

    Args:
        token_ids (`list[int]`): at least one.
        length (`int`): the prefix length.

    Returns:
        `list[int]`: of that length.
    """
    if len(token_ids) > length:
        warnings.warn(
            f"The initialization has {len(token_ids)} tokens, the prefix {length}: only the first {length} are used. "
            f"Leave `num_virtual_tokens` out, or set it to {len(token_ids)}, to keep them all.",
            stacklevel=2,
        )
    repeats = -(-length // len(token_ids))
    return (token_ids * repeats)[:length]


def sample_vocabulary(model: PreTrainedModel, length: int, seed: int) -> list[int]:
    """Draw token ids uniformly from the model's vocabulary, the same ones for the same seed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def build_initial_states(
    config: PrefixPlusConfig, model: PreTrainedModel, lengths: Mapping[str, int], init_token_ids: list[int] | None
) -> dict[str, InitialStates]:
    """Compute where the prefix of every targeted module starts.

    Args:
        config ([`PrefixPlusConfig`]): says how.
        model (`PreTrainedModel`): the base model; it is run once, and left as it was.
        lengths (`Mapping[str, int]`): prefix length of every targeted module.
        init_token_ids (`list[int]`, *optional*): what [`resolve_init_token_ids`] returned.

    Returns:
        `dict[str, InitialStates]`: for the names in `lengths`.

    Raises:
        ValueError: if a targeted module was not reached by the model's forward.
    """
    longest = max(lengths.values())
    if init_token_ids is None:
        token_ids = sample_vocabulary(model, longest, config.prefix_init_seed)
    else:
        token_ids = fit_token_ids(init_token_ids, longest)
    captured = capture_prefix_states(model, token_ids)
    unreached = sorted(set(lengths) - set(captured))
    if unreached:
        raise ValueError(
            f"The modules {unreached} took no part in the model's forward over the init tokens, so they cannot carry "
            "a prefix. Exclude them with `exclude_modules`."
        )
    generator = torch.Generator().manual_seed(config.prefix_init_seed)
    return {
        name: _build_states(config.prefix_init, captured[name], length, generator) for name, length in lengths.items()
    }


def _build_states(prefix_init: str, captured: PrefixStates, length: int, generator: torch.Generator) -> InitialStates:
    keys, values = captured.keys.float(), captured.values.float()
    scale = PrefixStates(_root_mean_square(keys), _root_mean_square(values))
    keys, values = keys[..., :length, :], values[..., :length, :]
    if prefix_init == "random":
        keys = torch.randn(keys.shape, generator=generator).to(keys.device) * scale.keys
        values = torch.randn(values.shape, generator=generator).to(values.device) * scale.values
    elif prefix_init == "zero":
        keys, values = torch.zeros_like(keys), torch.zeros_like(values)
    return InitialStates(PrefixStates(keys, values), scale)


def _root_mean_square(states: Tensor) -> Tensor:
    """`[1, kv_heads, tokens, dim]` to `[1, kv_heads, 1, 1]`."""
    return states.square().mean(dim=(-2, -1), keepdim=True).sqrt()
