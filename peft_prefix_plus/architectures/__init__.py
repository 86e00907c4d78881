"""Asks models about their architecture: the only place that looks into them."""

from .alibi import (
    AlibiSlopes,
    read_alibi_slopes,
)
from .devices import (
    creates_empty_parameters,
    fetch_offloaded,
    find_device,
    find_missing_weights,
    gather_weights,
    is_on_disk,
    runs_offloaded,
)
from .geometry import (
    AttentionGeometry,
    compute_key_bias,
    count_attention_calls,
    read_batch_size,
    read_geometry,
)
from .inputs import (
    count_codebooks,
    count_token_embeddings,
    find_input_shapes,
    find_token_embeddings,
)
from .modules import (
    computes_attention,
    explain_missing_attention,
    find_attention_call,
    find_attention_modules,
    is_attention_module,
    is_cross_attention,
    iterate_base_modules,
    runs_without_gradients,
    uses_attention_interface,
)
from .positions import (
    POSITION_TABLE_NAMES,
    count_positions,
    counts_positions_itself,
    find_first_position,
    find_position_tables,
    uses_absolute_positions,
    uses_sectioned_rotary,
)
from .stacks import (
    belongs_to_text,
    find_numbered_stack,
    find_owner,
    find_stacks,
    takes_argument,
    takes_tokens,
)

__all__ = [
    "POSITION_TABLE_NAMES",
    "AlibiSlopes",
    "AttentionGeometry",
    "belongs_to_text",
    "compute_key_bias",
    "computes_attention",
    "count_attention_calls",
    "count_codebooks",
    "count_positions",
    "count_token_embeddings",
    "counts_positions_itself",
    "creates_empty_parameters",
    "explain_missing_attention",
    "fetch_offloaded",
    "find_attention_call",
    "find_attention_modules",
    "find_device",
    "find_first_position",
    "find_input_shapes",
    "find_missing_weights",
    "find_numbered_stack",
    "find_owner",
    "find_position_tables",
    "find_stacks",
    "find_token_embeddings",
    "gather_weights",
    "is_attention_module",
    "is_cross_attention",
    "is_on_disk",
    "iterate_base_modules",
    "read_alibi_slopes",
    "read_batch_size",
    "read_geometry",
    "runs_offloaded",
    "runs_without_gradients",
    "takes_argument",
    "takes_tokens",
    "uses_absolute_positions",
    "uses_attention_interface",
    "uses_sectioned_rotary",
]
