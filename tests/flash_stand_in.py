"""Flash kernels in plain torch, which insist on what the real ones need.

The signatures are those of flash-attention 2.8, with the sinks of the vLLM build of flash-attention 3.
"""

import itertools

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

FLASH_STAND_IN = "flash_stand_in"


class FlashCalls:
    """How often the kernels ran."""

    def __init__(self) -> None:
        self.dense = self.varlen = 0


def attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence: `[queries, heads, dim]` to `[tokens, kv_heads, dim]`, aligned at the ends."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * (scale or query.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(query))[:, None] + len(key) - len(query) - torch.arange(len(key))
    left, right = window[0], 0 if causal else window[1]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= -distance <= right
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, len(query), 1)], dim=-1)
    # A query that sees nothing gets zeros.
    weights = scores.softmax(dim=-1)[..., : len(key)].nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


def check_states(query: Tensor, key: Tensor, value: Tensor) -> None:
    assert key.shape == value.shape and query.shape[-1] == key.shape[-1], "one head dimension for all three"
    assert query.shape[-2] % key.shape[-2] == 0
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[-1] <= 256


def check_offsets(offsets: Tensor, longest: int, total: int) -> None:
    assert offsets.dtype == torch.int32 and offsets.dim() == 1 and offsets.is_contiguous()
    assert offsets[0] == 0 and offsets[-1] <= total
    lengths = offsets.diff()
    assert bool((lengths >= 0).all()) and int(lengths.max()) <= int(longest)


def build_kernels(calls: FlashCalls):
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        assert dropout_p == 0.0 and alibi_slopes is None and not return_attn_probs
        assert q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0]
        check_states(q, k, v)
        calls.dense += 1
        rows = zip(q, k, v, strict=True)
        return torch.stack([attend_one(*row, softmax_scale, causal, window_size, softcap, s_aux) for row in rows])

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        assert dropout_p == 0.0 and alibi_slopes is None and not return_attn_probs and block_table is None
        assert q.dim() == k.dim() == v.dim() == 3
        check_states(q, k, v)
        check_offsets(cu_seqlens_q, max_seqlen_q, len(q))
        check_offsets(cu_seqlens_k, max_seqlen_k, len(k))
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        calls.varlen += 1
        output = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        pairs = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True)
        pieces = [
            attend_one(q[a:b], k[c:d], v[c:d], softmax_scale, causal, window_size, softcap, s_aux)
            for (a, b), (c, d) in pairs
        ]
        return torch.cat([*pieces, output[cu_seqlens_q[-1] :]])

    return flash_attn_func, flash_attn_varlen_func


def register_flash_stand_in(monkeypatch: pytest.MonkeyPatch) -> FlashCalls:
    """Register the kernels as attention implementation `FLASH_STAND_IN`, by transformers' own loader."""
    calls = FlashCalls()
    dense, varlen = build_kernels(calls)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn"):
        monkeypatch.setattr(flash_utils, name, None)
    for name in ("_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash_utils, name, None)

    def load(implementation: str, *args: object, **kwargs: object):
        assert implementation == FLASH_STAND_IN
        return dense, varlen, None, flash_utils._pad_input, flash_utils._unpad_input

    monkeypatch.setattr(flash_utils, "_lazy_imports", load)
    monkeypatch.setitem(AttentionInterface._global_mapping, FLASH_STAND_IN, flash_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, FLASH_STAND_IN, flash_attention_mask)
    return calls


@pytest.fixture(name="flash")
def flash_fixture(monkeypatch: pytest.MonkeyPatch) -> FlashCalls:
    return register_flash_stand_in(monkeypatch)
