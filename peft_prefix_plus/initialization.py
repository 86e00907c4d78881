"""What a prefix is before training: real tokens, random numbers, or zeros."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from .architectures import AttentionGeometry, count_token_embeddings, find_stacks, takes_tokens
from .capture import CaptureError, capture_noise_states, capture_prefix_states
from .config import DEFAULT_NUM_VIRTUAL_TOKENS, PrefixPlusConfig
from .states import PrefixStates

# How far a step of training moves values, where it moves keys by 1, each relative to the model's own; see the recipes.
# In a projection the parameters that all virtual tokens share move together, so that larger steps of values diverge.
VALUE_STEPS = {"none": 4.0, "linear": 2.0, "mlp": 2.0}


class InitialStates(NamedTuple):
    """Where the prefix of one attention module starts.

    Attributes:
        anchor ([`PrefixStates`]): keys and values, `[1, kv_heads, P, dim]` in float32.
        scale ([`PrefixStates`]): root mean square of the model's own keys per head, and that of its values times the
            `VALUE_STEPS` of the projection, `[1, kv_heads, 1, 1]`.
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
        # Left open, transformers would ask on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(name, **{**tokenizer_kwargs, "trust_remote_code": False})
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
    return torch.randint(count_token_embeddings(model), (length,), generator=generator).tolist()


def capture_states(
    config: PrefixPlusConfig,
    model: PreTrainedModel,
    targets: Sequence[str],
    length: int,
    init_token_ids: list[int] | None,
) -> dict[str, PrefixStates]:
    """Run a model over the init tokens, or a part of it that sees images or sound over noise.

    Args:
        config ([`PrefixPlusConfig`]): says how the prefix starts.
        model (`PreTrainedModel`): the base model; it is left as it was.
        targets (`Sequence[str]`): attention modules that are wanted.
        length (`int`): number of tokens.
        init_token_ids (`list[int]`, *optional*): what [`resolve_init_token_ids`] returned.

    Returns:
        `dict[str, PrefixStates]`: for the attention modules that were reached, not only those that are wanted.

    Raises:
        ValueError: if the model cannot be run, and the user has named the tokens.
    """
    captured: dict[str, PrefixStates] = {}
    problem: Exception | None = None
    for stack in _list_stacks(model, targets):
        if captured and config.target_modules is None:
            # What a forward of the whole model does not reach is not meant by default.
            break
        wanted = {name for name in targets if name.startswith(f"{stack}." if stack else "")}
        if wanted <= set(captured):
            continue
        part: PreTrainedModel = model.get_submodule(stack)
        try:
            if takes_tokens(part):
                states = capture_prefix_states(part, _choose_token_ids(config, part, length, init_token_ids))
            else:
                states = capture_noise_states(part, config.prefix_init_seed)
        except CaptureError:
            raise
        except Exception as error:
            # A part may need more than tokens, such as an image; perhaps the parts of this part do not.
            problem = problem or error
            continue
        captured = {f"{stack}.{name}" if stack else name: state for name, state in states.items()} | captured
    is_incomplete = not captured or (config.target_modules is not None and not set(targets) <= set(captured))
    if problem is not None and is_incomplete:
        if init_token_ids is not None:
            raise problem
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        warnings.warn(f"{type(model).__name__} cannot be run over tokens or noise alone ({reason}).", stacklevel=2)
    return captured


def _list_stacks(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The models inside of a model around the targets, the outermost ones first."""
    stacks = {stack for name in targets for stack in find_stacks(model, name)}
    return sorted(stacks, key=lambda stack: (stack.count(".") + bool(stack), stack))


def _choose_token_ids(
    config: PrefixPlusConfig, model: PreTrainedModel, length: int, init_token_ids: list[int] | None
) -> list[int]:
    if init_token_ids is None:
        return sample_vocabulary(model, length, config.prefix_init_seed)
    return fit_token_ids(init_token_ids, length)


def build_initial_states(
    config: PrefixPlusConfig,
    lengths: Mapping[str, int],
    geometries: Mapping[str, AttentionGeometry],
    captured: Mapping[str, PrefixStates],
) -> dict[str, InitialStates]:
    """Compute where the prefix of every targeted module starts.

    Args:
        config ([`PrefixPlusConfig`]): says how.
        lengths (`Mapping[str, int]`): prefix length of every targeted module.
        geometries (`Mapping[str, AttentionGeometry]`): of the same modules.
        captured (`Mapping[str, PrefixStates]`): what [`capture_states`] returned.

    Returns:
        `dict[str, InitialStates]`: for the names in `lengths`; random for a module that could not be captured.

    Raises:
        ValueError: if one could not be captured, and the user has named the tokens.
    """
    generator = torch.Generator().manual_seed(config.prefix_init_seed)
    unreached = [name for name in lengths if name not in captured]
    if unreached and config.prefix_init in ("text", "tokens"):
        raise ValueError(
            f"The modules {unreached} took no part in the model's forward over the init tokens, so their prefix "
            "cannot start from them. Exclude them with `exclude_modules`, or set `prefix_init='random'`."
        )
    if unreached:
        warnings.warn(
            f"{len(unreached)} modules, such as {unreached[0]}, cannot be run over tokens alone, so their prefix "
            "starts from random numbers.",
            stacklevel=2,
        )
    states = {
        name: _build_states(config.prefix_init, captured[name], length, generator)
        if name in captured
        else _draw_states(geometries[name], length, generator)
        for name, length in lengths.items()
    }
    value_step = VALUE_STEPS[config.projection]
    return {
        name: InitialStates(anchor, PrefixStates(sizes.keys, value_step * sizes.values))
        for name, (anchor, sizes) in states.items()
    }


def _draw_states(
    geometry: AttentionGeometry, length: int, generator: torch.Generator
) -> tuple[PrefixStates, PrefixStates]:
    """Random keys and values of the size that a normalized input would give, and that size."""
    shape = (1, geometry.num_key_value_heads, length)
    keys = torch.randn(*shape, geometry.key_dim, generator=generator).to(geometry.device)
    values = torch.randn(*shape, geometry.value_dim, generator=generator).to(geometry.device)
    size = torch.ones(1, geometry.num_key_value_heads, 1, 1, device=geometry.device)
    return PrefixStates(keys, values), PrefixStates(size, size)


def _fit_tokens(states: Tensor, length: int) -> Tensor:
    """Cut keys or values to a length, or repeat them up to it."""
    repeats = -(-length // states.shape[-2])
    return states.repeat(1, 1, repeats, 1)[..., :length, :]


def _build_states(
    prefix_init: str, captured: PrefixStates, length: int, generator: torch.Generator
) -> tuple[PrefixStates, PrefixStates]:
    """Keys and values of an initialization, and the size of the captured ones."""
    keys, values = captured.keys.float(), captured.values.float()
    sizes = PrefixStates(_root_mean_square(keys), _root_mean_square(values))
    keys, values = _fit_tokens(keys, length), _fit_tokens(values, length)
    if prefix_init == "random":
        keys = torch.randn(keys.shape, generator=generator).to(keys.device) * sizes.keys
        values = torch.randn(values.shape, generator=generator).to(values.device) * sizes.values
    elif prefix_init == "zero":
        keys, values = torch.zeros_like(keys), torch.zeros_like(values)
    return PrefixStates(keys, values), sizes


def _root_mean_square(states: Tensor) -> Tensor:
    """`[1, kv_heads, tokens, dim]` to `[1, kv_heads, 1, 1]`; 1 where there is no signal, which could not train."""
    scale = states.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return torch.where(scale == 0, 1.0, scale)
