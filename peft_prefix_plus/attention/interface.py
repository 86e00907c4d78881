"""The attention function of routed modules: prepend the prefix, then attend as the model would."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..architectures import compute_key_bias
from ..states import PrefixStates
from .delivery import current_recorder, take_matching_prefix
from .dense import attend_eager, attend_sdpa, cast_for_sdpa
from .flash import attend_flash
from .flex import attend_flex
from .routing import MaskContract, UnroutedModule, find_mask_contract, read_implementation, resolve_attention_function
from .selection import hide_unselected

_ATTEND: dict[MaskContract, Callable[..., tuple[Tensor, Tensor | None]]] = {
    MaskContract.EAGER: attend_eager,
    MaskContract.SDPA: attend_sdpa,
    MaskContract.FLEX: attend_flex,
    MaskContract.FLASH: attend_flash,
}


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the prefix and the tokens; every argument is as the model's own attention function gets it.

    Args:
        module (`nn.Module`): the routed attention module.
        query (`torch.Tensor`): `[batch, heads, queries, key_dim]`.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, value_dim]`.
        attention_mask (`torch.Tensor` or `BlockMask`, *optional*): what the real implementation gets.
        *args, **kwargs: passed on.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: output `[batch, queries, heads, value_dim]`, and the weights, whose
        first columns are the prefix's, if the real implementation returns them.
    """
    implementation = read_implementation(module)
    contract = find_mask_contract(implementation)
    attend = resolve_attention_function(module, implementation)
    attention_mask = hide_unselected(module, key, attention_mask, contract, kwargs)
    recorder = current_recorder()
    if recorder is not None:
        recorder.record(module, PrefixStates(key, value))
        return attend(UnroutedModule(module), query, key, value, attention_mask, *args, **kwargs)
    if attend is sdpa_attention_forward:
        query, key, value = cast_for_sdpa(query, key, value)
    prefix = take_matching_prefix(module, key, value)
    bias = compute_key_bias(module, prefix.values)
    if bias is not None:
        prefix = prefix._replace(bias=bias)
    return _ATTEND[contract](attend, module, query, key, value, attention_mask, prefix, *args, **kwargs)
