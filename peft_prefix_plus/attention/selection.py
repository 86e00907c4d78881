"""Sparse attention: modules whose indexer selects which tokens a query sees."""

from typing import Any

import torch
from torch import Tensor, nn

from .routing import MaskContract


def hide_unselected(
    module: nn.Module, key: Tensor, attention_mask: Any, contract: MaskContract, kwargs: dict[str, Any]
) -> Any:
    """Put what an indexer has selected into the mask, as the modules themselves do for `eager` and `sdpa`.

    They do not know the route by its name, and hand the selection over as they would to a kernel. The prefix has no
    part in it: every query sees it.

    Args:
        module (`nn.Module`): the attention module.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, key_dim]`, without the prefix.
        attention_mask (`torch.Tensor`, *optional*): of the tokens.
        contract ([`MaskContract`]): of the real implementation.
        kwargs (`dict`): of the attention function: `indices` `[batch, queries, selected]` of tokens, or
            `block_indices` of blocks of them.

    Returns:
        `torch.Tensor`: the mask, the same one if nothing was selected.

    Raises:
        ValueError: if the implementation takes no mask of four axes.
    """
    indices: Tensor | None = kwargs.get("indices")
    blocks: Any = kwargs.get("block_indices")
    if indices is None and blocks is None:
        return attention_mask
    if contract not in (MaskContract.EAGER, MaskContract.SDPA):
        raise ValueError(
            f"{type(module).__name__} selects the tokens that a query sees, which a prefix supports with 'eager' and "
            "'sdpa' only. Use `model.set_attn_implementation('sdpa')`."
        )
    num_tokens = key.shape[-2]
    if indices is None:
        return _hide_blocks(module, blocks, attention_mask, num_tokens, key, kwargs.get("position_ids"))
    chosen = torch.zeros(*indices.shape[:2], num_tokens, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    if attention_mask.dtype == torch.bool:
        return attention_mask & chosen
    return attention_mask.masked_fill(~chosen, torch.finfo(key.dtype).min)


def _hide_blocks(
    module: Any, blocks: Tensor, attention_mask: Any, num_tokens: int, key: Tensor, position_ids: Tensor | None
) -> Any:
    """The mask that the indexer makes of the blocks which it has selected."""
    if position_ids is None:
        position_ids = torch.arange(num_tokens - blocks.shape[-2], num_tokens, device=key.device)
    position_ids = (position_ids if position_ids.ndim > 1 else position_ids[None]).expand(key.shape[0], -1)
    return module.indexer.build_block_mask(blocks, attention_mask, num_tokens, key.dtype, key.device, position_ids)
