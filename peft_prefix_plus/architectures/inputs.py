"""Asks models what they read."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

TEXT_INPUTS = ("input_ids", "inputs_embeds")


def count_token_embeddings(model: PreTrainedModel) -> int:
    """How many token ids a model knows."""
    embeddings: Any = find_token_embeddings(model)
    if isinstance(embeddings, nn.ModuleList):
        embeddings = embeddings[0]
    shape = read_table_shape(embeddings)
    return shape[0] if shape else int(model.config.get_text_config().vocab_size)


def read_table_shape(table: Any) -> tuple[int, int] | None:
    """Rows and columns of a table of embeddings; `None` for a module that is none."""
    weight = getattr(table, "weight", None)
    # DeepSpeed's partitioned weights are empty, and know the shape that they have when they are gathered.
    shape = getattr(weight, "ds_shape", None) or getattr(weight, "shape", None)
    return (int(shape[0]), int(shape[1])) if shape and len(shape) == 2 else None


def find_token_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Find the table of token embeddings, or one table for each codebook; `None` for a model that hides it."""
    try:
        embeddings: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embeddings


def count_codebooks(model: PreTrainedModel) -> int:
    """How many token ids stand side by side at every position: one, but for models of sound."""
    embeddings = find_token_embeddings(model)
    return len(embeddings) if isinstance(embeddings, nn.ModuleList) else 1


def find_inputs(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str] = TEXT_INPUTS) -> Tensor | None:
    """Find the input, one row for each sample, among the arguments of a model's forward or of `generate`.

    Args:
        args (`Sequence`), kwargs (`Mapping`): the arguments.
        names (`Sequence[str]`): what it may be called; otherwise it is the first argument.

    Returns:
        `torch.Tensor`, *optional*: `None` if there is none.
    """
    named = (kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor))
    return next(named, next((item for item in args[:1] if isinstance(item, Tensor)), None))


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
