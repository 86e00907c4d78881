"""Asks models how they number their tokens."""

from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.ibert.quant_modules import QuantEmbedding

from .modules import iterate_base_modules
from .stacks import belongs_to_text, takes_argument

# What modeling files call their tables of learned absolute positions.
POSITION_TABLE_NAMES = frozenset(
    {"wpe", "embed_positions", "position_embedding", "position_embeddings", "pos_embed", "positions_embed"}
)


# Ways to look positions up whose first argument are the positions.
_LOOKUPS = (nn.Embedding.forward, QuantEmbedding.forward)


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
        if _is_position_table(name, module) and belongs_to_text(model, name)
    }


def find_trained_position_table(model: nn.Module) -> str | None:
    """Find a table of absolute positions that an adapter of the model has trained, alone or with modules around it.

    Args:
        model (`nn.Module`): a transformers model.

    Returns:
        `str`, *optional*: the name of what was trained. PEFT has put a wrapper in its place.
    """
    name: str
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and belongs_to_text(model, name):
            inside = wrapper.original_module.named_modules(prefix=name)
            if any(_is_position_table(inner, module) for inner, module in inside):
                return name
    return None


def _is_position_table(name: str, module: nn.Module) -> bool:
    # PEFT keeps the original of what an adapter trains inside of a wrapper.
    return name.removesuffix(".original_module").rpartition(".")[2] in POSITION_TABLE_NAMES and (
        type(module).forward in _LOOKUPS or counts_positions_itself(module)
    )


def read_position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the configuration of a model's text part names; `None` if it names no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    # XLNet says -1.
    return limit if isinstance(limit, int) and limit > 0 else None


def counts_positions_itself(table: nn.Module) -> bool:
    """Whether a table numbers the tokens by itself, from the length of what came before."""
    return takes_argument(table, "past_key_values_length")


def find_first_position(table: nn.Module) -> int:
    """The row that a text's first token takes: the RoBERTa family counts from behind the padding's row."""
    padding_idx = getattr(table, "padding_idx", None)
    return 0 if padding_idx is None else padding_idx + 1


def find_first_text_position(model: PreTrainedModel) -> int:
    """The position of a text's first token in a model without a table of positions: PaliGemma counts from 1."""
    return int(model.config.model_type == "paligemma")


def continues_media(model: nn.Module) -> bool:
    """Whether a model remembers from an image, or from generating, where the text that follows stands."""
    return any(getattr(module, "rope_deltas", None) is not None for module in (model, *model.children()))


def count_positions(table: nn.Module) -> int | None:
    """How many positions a table holds, without the rows that some architectures reserve; `None`: it grows."""
    if not isinstance(table, nn.Embedding):
        return None
    offset = getattr(table, "offset", 0)
    return table.num_embeddings - find_first_position(table) - (offset if isinstance(offset, int) else 0)


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


def compares_positions_with_places(model: nn.Module) -> bool:
    """Whether a model takes the position of a token for its place in the row: MiniMax M3 selects blocks of places.

    Where a row begins with padding, the two are different, and what a token sees would end before the token.
    """
    return any(hasattr(module, "build_block_mask") for module in model.modules())


def uses_sectioned_rotary(model: PreTrainedModel) -> bool:
    """Whether positions have several coordinates (time, height, width), as in some multimodal models."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in rope
