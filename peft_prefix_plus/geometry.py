"""Asks models about their attention: the only place that looks into architectures."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.ibert.quant_modules import QuantEmbedding

# What modeling files call their tables of learned absolute positions.
POSITION_TABLE_NAMES = frozenset(
    {"wpe", "embed_positions", "position_embedding", "position_embeddings", "pos_embed", "positions_embed"}
)

_NUM_HEADS_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_attn_heads")
_KEY_DIM_NAMES = (
    "qk_head_dim",
    "head_dim",
    "head_size",
    "attention_head_size",
    "dim_head",
    "key_dim",
    "qk_channels_per_head",
    "d_head",
    "d_kv",
    "key_value_proj_dim",
)
_HIDDEN_SIZE_NAMES = ("embed_dim", "hidden_size", "d_model", "n_embd", "split_size", "dim")

# Ways to look positions up whose first argument are the positions.
_LOOKUPS = (nn.Embedding.forward, QuantEmbedding.forward)

# What an attention module calls if it computes attention by itself.
_ATTENTION_FUNCTIONS = frozenset({"softmax", "Softmax", "scaled_dot_product_attention"})

# Modules that compute softmax attention, but not between all queries and all keys that they may see: in overlapping
# chunks, or through landmarks. A prefix cannot be put in front of those.
_SPARSE_ATTENTION = frozenset(
    {
        "BigBirdBlockSparseAttention",
        "BigBirdPegasusBlockSparseAttention",
        "HieraMaskUnitAttention",
        "LEDEncoderSelfAttention",
        "LongformerSelfAttention",
        "MobileViTV2LinearSelfAttention",
        "NystromformerSelfAttention",
        "PegasusXGlobalLocalAttention",
        "SwiftFormerEfficientAdditiveAttention",
    }
)

# Models inside of models that run without gradients.
_GRADIENT_FREE_NAMES = frozenset({"patcher"})

# What the attributes of some classes do not say. Heads of the keys that reach the attention function:
_KEY_VALUE_HEADS: dict[str, Callable[[Any], int]] = {
    "DeepseekV4Attention": lambda module: 1,
    # Grouped keys and values have been repeated by then.
    "FalconAttention": lambda module: module.num_heads if module.new_decoder_architecture else module.num_kv_heads,
    "JetMoeAttention": lambda module: module.num_key_value_heads * module.top_k,
}
# Size of one head's value:
_VALUE_DIMS: dict[str, Callable[[Any], int]] = {
    "LevitAttention": lambda module: module.attention_ratio * module.key_dim,
    "LevitAttentionSubsample": lambda module: module.attention_ratio * module.key_dim,
}
# Calls of the attention function in one forward, each with other values:
_ATTENTION_CALLS = {"DiffLlamaAttention": 2}
# The axis of the batch in the hidden states:
_BATCH_AXIS = {"XLNetRelativeAttention": 1}


@dataclass(frozen=True)
class AttentionGeometry:
    """Shapes of the keys and values that an attention module hands to its attention function.

    Attributes:
        num_key_value_heads (`int`): heads of keys and values, before they are repeated for grouped queries.
        key_dim (`int`): size of one head's key.
        value_dim (`int`): size of one head's value.
        device (`torch.device`): where the module's parameters live.
    """

    num_key_value_heads: int
    key_dim: int
    value_dim: int
    device: torch.device


def read_geometry(module: nn.Module) -> AttentionGeometry:
    """Read the geometry of an attention module from its attributes and its configuration.

    Args:
        module (`nn.Module`): an attention module of transformers.

    Returns:
        [`AttentionGeometry`]

    Raises:
        ValueError: if the number of heads or their size cannot be found.
    """
    owners = (module, getattr(module, "config", None))
    num_heads = _first_attribute(owners, _NUM_HEADS_NAMES)
    key_dim = _first_attribute(owners, _KEY_DIM_NAMES)
    if key_dim is None and num_heads:
        hidden_size = _first_attribute(owners, _HIDDEN_SIZE_NAMES)
        key_dim = hidden_size // num_heads if hidden_size else None
    num_key_value_heads = _first_attribute((module,), ("num_key_value_heads", "num_kv_heads", "kv_heads"))
    key_projection: Any = getattr(module, "k_proj", None)
    if num_key_value_heads is None and key_dim and hasattr(key_projection, "out_features"):
        num_key_value_heads = key_projection.out_features // key_dim
    if num_key_value_heads is None and uses_attention_interface(module):
        num_key_value_heads = _first_attribute(owners[1:], ("num_key_value_heads",))
    num_key_value_heads = num_key_value_heads or num_heads
    if not num_key_value_heads or not key_dim:
        raise ValueError(
            f"Cannot find the number of key/value heads and their size for {type(module).__name__}: looked for "
            "`num_key_value_heads`, `num_attention_heads` and `head_dim` on the module and its config. Exclude the "
            "module with `exclude_modules`, or report the architecture."
        )
    value_dim = _first_attribute((module,), ("v_head_dim", "head_v_dim", "v_channels_per_head")) or key_dim
    name = type(module).__name__
    if name in _KEY_VALUE_HEADS:
        num_key_value_heads = _KEY_VALUE_HEADS[name](module)
    if name in _VALUE_DIMS:
        value_dim = _VALUE_DIMS[name](module)
    num_key_value_heads *= count_attention_calls(module)
    return AttentionGeometry(num_key_value_heads, key_dim, value_dim, next(module.parameters()).device)


def count_attention_calls(module: nn.Module) -> int:
    """How often a module calls its attention function in one forward, each time with other keys or values."""
    return _ATTENTION_CALLS.get(type(module).__name__, 1)


def read_batch_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Read the batch size of a forward of an attention module from its arguments."""
    hidden_states: Tensor = args[0] if args else next(item for item in kwargs.values() if isinstance(item, Tensor))
    if hidden_states.dim() < 3:
        # The texts or images stand one behind the other.
        return 1
    return hidden_states.shape[_BATCH_AXIS.get(type(module).__name__, 0)]


def compute_key_bias(module: nn.Module, values: Tensor) -> Tensor | None:
    """Compute what an attention module adds to the scores of a key because of its value, as Doge does.

    Args:
        module (`nn.Module`): an attention module.
        values (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.

    Returns:
        `torch.Tensor`, *optional*: `[batch, heads, 1, tokens]`; `None` for all other architectures.
    """
    project: Any = getattr(module, "dt_proj", None)
    if project is None or not hasattr(module, "prepare_dynamic_mask"):
        return None
    module_any: Any = module
    steps = project(values.transpose(1, 2).flatten(2))
    bias = torch.exp(module_any.A * nn.functional.softplus(steps)).transpose(-1, -2)
    return bias.repeat_interleave(module_any.num_key_value_groups, dim=1)[:, :, None, :]


def _first_attribute(owners: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def find_attention_call(module_class: type[nn.Module]) -> FunctionType | None:
    """Find the method of an attention class that looks its attention function up in `ALL_ATTENTION_FUNCTIONS`.

    Its `__globals__` hold what the lookup uses: the interface and the eager function of that modeling file.

    Args:
        module_class (`type[nn.Module]`): any module class.

    Returns:
        `FunctionType`, *optional*: `None` if the class never asks the interface.
    """
    # Not `functools.cache`, about which `torch.compile` would warn.
    if module_class not in _attention_calls:
        _attention_calls[module_class] = _search_attention_call(module_class)
    return _attention_calls[module_class]


_attention_calls: dict[type[nn.Module], FunctionType | None] = {}


def _search_attention_call(module_class: type[nn.Module]) -> FunctionType | None:
    for owner in module_class.__mro__:
        for attribute in vars(owner).values():
            function = inspect.unwrap(attribute) if inspect.isfunction(attribute) else None
            if isinstance(function, FunctionType) and "ALL_ATTENTION_FUNCTIONS" in function.__code__.co_names:
                return function
    return None


@cache
def computes_attention(module_class: type[nn.Module]) -> bool:
    """Whether a class that does not ask the attention interface is one that takes a softmax over attention scores."""
    name = module_class.__name__
    if name in _SPARSE_ATTENTION or re.search("(attention|attn)$", name, re.IGNORECASE) is None:
        return False
    return any(
        inspect.isfunction(function)
        and not _ATTENTION_FUNCTIONS.isdisjoint(inspect.unwrap(function).__code__.co_names)
        for owner in module_class.__mro__
        if owner is not nn.Module
        for function in vars(owner).values()
    )


def uses_attention_interface(module: nn.Module) -> bool:
    """Whether `module` is an attention module that asks the attention interface of transformers."""
    # A `PreTrainedModel` also names the interface, to check implementations, but never calls it.
    return (
        not isinstance(module, PreTrainedModel)
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
        and find_attention_call(type(module)) is not None
    )


def is_attention_module(module: nn.Module) -> bool:
    """Whether `module` computes softmax attention in a way that can carry a prefix."""
    return uses_attention_interface(module) or (
        not isinstance(module, PreTrainedModel) and computes_attention(type(module))  # type: ignore[arg-type]
    )


def iterate_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of the model by the name it has without adapters.

    Args:
        model (`nn.Module`): a model, with or without tuner layers in it.

    Yields:
        `tuple[str, nn.Module]`: the name as in the bare model, and the bare module.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        bare = module
        while isinstance(bare, BaseTunerLayer):
            bare = bare.base_layer
        if id(bare) not in seen:
            seen.add(id(bare))
            yield name.replace(".base_layer", ""), bare


def find_attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find every attention module that can carry a prefix, in the order of the model.

    Args:
        model (`nn.Module`): a transformers model.

    Returns:
        `dict[str, nn.Module]`: bare attention modules by name.
    """
    return {name: module for name, module in iterate_base_modules(model) if is_attention_module(module)}


def explain_missing_attention(model: nn.Module) -> str:
    """Say why a model without a module from [`find_attention_modules`] cannot carry a prefix, and what to do."""
    classes = {type(module).__name__ for module in model.modules()}
    sparse = sorted(classes & _SPARSE_ATTENTION)
    fixed = sorted(name for name in classes if name.endswith("FlashAttention2"))
    if fixed:
        return (
            f"has attention modules that call flash kernels by themselves ({fixed[0]}). Load it with "
            "`attn_implementation='sdpa'` or `'eager'`."
        )
    if not sparse:
        return (
            "has no softmax attention that a prefix could be put in front of: convolutions, state-space layers and "
            "linear attention have no keys and values of single tokens. Use another method, such as LoRA."
        )
    remedy = "Load the model with `attention_type='original_full'`" if "BigBird" in sparse[0] else "Use another method"
    return (
        f"computes attention in overlapping chunks or through landmarks ({', '.join(sparse)}), in front of which no "
        f"prefix can be put. {remedy}."
    )


def is_cross_attention(name: str) -> bool:
    """Whether an attention module, by its name in the model, attends to the output of an encoder."""
    ending = ".".join(name.lower().split(".")[-2:])
    return re.search("cross|encoder_attn|encdec|encoder_decoder_attention", ending) is not None


def find_owner(model: nn.Module, name: str) -> str:
    """Return the name of the innermost model of transformers around a module."""
    return find_stacks(model, name)[-1]


def takes_tokens(model: nn.Module) -> bool:
    """Whether a model of transformers reads token ids, rather than images or sound."""
    return takes_argument(model, "input_ids") or takes_argument(model, "decoder_input_ids")


def find_stacks(model: nn.Module, name: str) -> list[str]:
    """Return the names of the models of transformers around a module, the outermost one, `""`, first."""
    bare = dict(iterate_base_modules(model))
    parts = name.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts))]
    return [stack for stack in names if isinstance(bare.get(stack), PreTrainedModel)]


def belongs_to_text(model: nn.Module, name: str) -> bool:
    """Whether a module of a model works on text, and not in a tower for images or sound."""
    owner = model.get_submodule(find_owner(model, name))
    return takes_argument(owner, "input_ids") and re.search("audio|vision|visual|image|speech", name) is None


def find_numbered_stack(model: PreTrainedModel) -> PreTrainedModel | None:
    """Find the outermost model around the text's attention that can be told the positions of its input.

    Args:
        model (`PreTrainedModel`): a model of transformers.

    Returns:
        `PreTrainedModel`, *optional*: the model itself or one inside of it; `None` if none takes `position_ids`.
    """
    attention = next((name for name in find_attention_modules(model) if belongs_to_text(model, name)), "")
    stacks: Any = (model.get_submodule(name) for name in find_stacks(model, attention))
    return next((stack for stack in stacks if takes_argument(stack, "position_ids")), None)


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model names an argument."""
    return name in inspect.signature(type(model).forward).parameters


def runs_without_gradients(name: str) -> bool:
    """Whether a module, by its name, lies in a part of the model that is never trained through."""
    return not _GRADIENT_FREE_NAMES.isdisjoint(name.split("."))


def find_position_tables(model: nn.Module) -> dict[str, nn.Module]:
    """Find the tables of absolute positions of text, learned or sinusoidal; empty for relative positions.

    Args:
        model (`nn.Module`): a transformers model.

    Returns:
        `dict[str, nn.Module]`: bare tables by name.
    """
    return {
        name: module
        for name, module in iterate_base_modules(model)
        if name.rpartition(".")[2] in POSITION_TABLE_NAMES
        and (type(module).forward in _LOOKUPS or counts_positions_itself(module))
        and belongs_to_text(model, name)
    }


def counts_positions_itself(table: nn.Module) -> bool:
    """Whether a table numbers the tokens by itself, from the length of what came before."""
    return takes_argument(table, "past_key_values_length")


def uses_absolute_positions(model: PreTrainedModel) -> bool:
    """Whether a model without a table of positions depends on where a text starts, all the same.

    CTRL adds sines to its embeddings; other models scale queries by their position, or look their rotations up in a
    table that starts at 0.
    """
    config: Any = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type == "ctrl"
        or "llama_4_scaling_beta" in rope
        or any(
            isinstance(getattr(module, "embed_positions", None), Tensor) or hasattr(module, "softmax_scaling")
            for module in model.modules()
        )
    )


def uses_sectioned_rotary(model: PreTrainedModel) -> bool:
    """Whether positions have several coordinates (time, height, width), as in some multimodal models."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in rope


def find_first_position(table: nn.Module) -> int:
    """The row that a text's first token takes: the RoBERTa family counts from behind the padding's row."""
    padding_idx = getattr(table, "padding_idx", None)
    return 0 if padding_idx is None else padding_idx + 1


def count_positions(table: nn.Module) -> int | None:
    """How many positions a table holds, without the rows that some architectures reserve; `None`: it grows."""
    if not isinstance(table, nn.Embedding):
        return None
    offset = getattr(table, "offset", 0)
    return table.num_embeddings - find_first_position(table) - (offset if isinstance(offset, int) else 0)


def count_token_embeddings(model: PreTrainedModel) -> int:
    """How many token ids a model knows."""
    embeddings: Any = find_token_embeddings(model)
    if isinstance(embeddings, nn.ModuleList):
        embeddings = embeddings[0]
    weight = getattr(embeddings, "weight", None)
    return int(model.config.get_text_config().vocab_size if weight is None else weight.shape[0])


def find_token_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Find the table of token embeddings, or one table for each codebook; `None` for a model that hides it."""
    try:
        embeddings: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embeddings


def find_input_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Find the shapes of what a model of images or sound reads, for a batch of one.

    Args:
        model (`PreTrainedModel`): a model whose main input are not tokens.

    Returns:
        `dict[str, tuple[int, ...]]`: the shape of the main input, by its name.

    Raises:
        ValueError: if it cannot be told from the configuration.
    """
    config: Any = model.config
    name = model.main_input_name
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and hasattr(config, "num_channels"):
        height, width = size if isinstance(size, list | tuple) else (size or 224, size or 224)
        return {name: (1, config.num_channels, height, width)}
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        return {name: (1, config.num_mel_bins, 2 * config.max_source_positions)}
    if name == "input_features" and hasattr(config, "input_feat_per_channel"):
        return {name: (1, 64, config.input_feat_per_channel)}
    if name == "input_values":
        return {name: (1, 16000)}
    raise ValueError(
        f"The prefixes of {type(model).__name__} cannot be initialized: the shape of its input {name!r} is not known "
        "from its configuration. Exclude its modules with `exclude_modules`."
    )


def count_codebooks(model: PreTrainedModel) -> int:
    """How many token ids stand side by side at every position: one, but for models of sound."""
    embeddings = find_token_embeddings(model)
    return len(embeddings) if isinstance(embeddings, nn.ModuleList) else 1
