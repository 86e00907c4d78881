"""Where the prefix meets the tokens: in front of the keys and values, inside an attention module's computation.

`routing` and `interface` are for modules that ask the attention interface of transformers for their function, with one
file for each kind of implementation; `arithmetic` is for modules that compute attention by themselves. Both find the
prefix through `delivery`, which demands a proof that it was used.
"""

from .attend import attend_with_prefix, record_states
from .delivery import PrefixDelivery
from .interface import prefix_attention_forward
from .prepending import extend_mask, match_prefix, prepend_prefix
from .routing import (
    ROUTE_NAME,
    find_mask_contract,
    original_config,
    refuse_mask,
    resolve_attention_function,
    route_config,
)

__all__ = [
    "ROUTE_NAME",
    "PrefixDelivery",
    "attend_with_prefix",
    "extend_mask",
    "find_mask_contract",
    "match_prefix",
    "original_config",
    "prefix_attention_forward",
    "prepend_prefix",
    "record_states",
    "refuse_mask",
    "resolve_attention_function",
    "route_config",
]
