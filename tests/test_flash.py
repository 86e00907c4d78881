"""Prefixes on flash kernels, for which `flash_stand_in` stands in: they equal sdpa and honour the contract."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from flash_stand_in import FLASH_STAND_IN, flash_fixture  # noqa: F401
from helpers import (
    INIT_TOKEN_IDS,
    add_prefix,
    compute_logits_under_dropout,
    draw_tokens,
    named_prefix_parameters,
    pad_rows,
    perturb,
)
from peft import get_peft_model
from test_laws import TOLERANCE, greedy, prompt_positions
from tiny_models import ARCHITECTURES, build_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.integrations.flash_attention import flash_attention_forward

from peft_prefix_plus import PrefixPlusConfig, PrefixStates
from peft_prefix_plus.attention import flash as flash_module
from peft_prefix_plus.attention.flash import attend_flash

LENGTH = 24  # more than the sliding windows of 16
# transformers cannot tell the dtype of a module without linear layers, so GPT-2 has no flash attention in float32.
cases = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ARCHITECTURES if name != "gpt2"]
    + [("gpt2", torch.bfloat16), ("gemma3_text", torch.bfloat16)],
    ids=str,
)
sides = pytest.mark.parametrize("side", [None, "left", "right"])


def build_pair(name: str, dtype: torch.dtype = torch.float32, **settings):
    """The same model with a prefix, on sdpa and on the stand-in."""
    pair = []
    for implementation in ("sdpa", FLASH_STAND_IN):
        model = add_prefix(build_model(name, dtype=dtype), **settings)
        perturb(model)
        model.set_attn_implementation(implementation)
        pair.append(model)
    return pair


def draw_rows(side: str | None, length: int) -> tuple[Tensor, Tensor]:
    rows = draw_tokens(batch_size=3, length=length)
    return pad_rows(rows, [length, length - 3, 4], side) if side else (rows, torch.ones_like(rows))


def count_windowed_layers(name: str, length: int) -> int:
    """How many layers hide tokens from each other at this length."""
    window = ARCHITECTURES[name].sliding_window
    config = build_model(name).config
    if window is None or length <= window:
        return 0
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return types.count("sliding_attention")


def test_the_stand_in_attends_as_sdpa_does(flash):
    for name in ("llama", "mistral", "gemma3_text"):
        ids, mask = draw_rows("left", LENGTH)
        logits = build_model(name, FLASH_STAND_IN)(ids, attention_mask=mask).logits
        expected = build_model(name)(ids, attention_mask=mask).logits
        assert_close(logits[mask.bool()], expected[mask.bool()], **TOLERANCE[torch.float32])
    assert flash.varlen == 8 and flash.dense == 0


@cases
@pytest.mark.parametrize("length", [7, LENGTH], ids=["short", "long"])
@sides
def test_flash_equals_sdpa(name, dtype, length, side, flash):
    ids, mask = draw_rows(side, length)
    sdpa, other = build_pair(name, dtype)
    assert_close(
        other(ids, attention_mask=mask).logits[mask.bool()],
        sdpa(ids, attention_mask=mask).logits[mask.bool()],
        **TOLERANCE[dtype],
    )
    num_layers = sdpa.config.num_hidden_layers
    assert (flash.dense, flash.varlen)[side is not None] == num_layers - count_windowed_layers(name, length)
    assert (flash.dense, flash.varlen)[side is None] == 0


@cases
@pytest.mark.parametrize("side", [None, "left"])
def test_captured_prefix_equals_prompt(name, dtype, side, flash):
    model, rows = build_model(name, dtype=dtype), draw_tokens()
    ids, mask = pad_rows(rows, [7, 4], side) if side else (rows, torch.ones_like(rows))
    prompt, full, full_mask = torch.tensor(INIT_TOKEN_IDS), torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12)
    for i, length in enumerate([7, 4] if side else [7, 7]):
        full[i, 7 - length :] = torch.cat([prompt, rows[i, :length]])
        full_mask[i, 7 - length :] = 1
    model.set_attn_implementation(FLASH_STAND_IN)
    expected = model(full, attention_mask=full_mask.long(), position_ids=prompt_positions(full_mask).long())
    model.set_attn_implementation("sdpa")
    peft_model = add_prefix(model)
    model.set_attn_implementation(FLASH_STAND_IN)
    given = {"position_ids": prompt_positions(mask)} if ARCHITECTURES[name].learned_positions else {}
    logits = peft_model(ids, attention_mask=mask, **given).logits
    assert_close(logits[mask.bool()], expected.logits[:, 5:][mask.bool()], **TOLERANCE[dtype])


def test_the_prefix_may_be_captured_on_flash(flash):
    expected = add_prefix(build_model("llama"))
    model = add_prefix(build_model("llama", FLASH_STAND_IN))
    assert flash.dense > 0
    for name, parameter in named_prefix_parameters(model).items():
        assert_close(parameter, named_prefix_parameters(expected)[name], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3_text", "opt"])
@pytest.mark.parametrize("length", [7, LENGTH], ids=["short", "long"])
@sides
def test_gradients_equal_those_of_sdpa(name, length, side, flash):
    ids, mask = draw_rows(side, length)
    gradients = []
    for model in build_pair(name):
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        logits.square().mean().backward()
        gradients.append({key: value.grad for key, value in named_prefix_parameters(model).items()})
    for key, expected in gradients[0].items():
        assert bool(expected.abs().sum() > 0), key
        assert_close(gradients[1][key], expected, atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}],
    ids=["dynamic", "static", "beams", "prompt-lookup", "uncached"],
)
def test_generation_equals_that_of_sdpa(name, padded, settings, flash):
    batch_size = 1 if "prompt_lookup_num_tokens" in settings else 3
    ids, mask = pad_rows(draw_tokens(batch_size), [7, 4 if padded else 7, 7][:batch_size], "left")
    if padded and batch_size == 1:
        ids, mask = pad_rows(draw_tokens(1), [4], "left")
    sdpa, other = build_pair(name)
    expected = greedy(sdpa, ids, mask, max_new_tokens=12)
    settings = {"max_new_tokens": 12} | settings
    if "num_beams" in settings:
        expected = greedy(sdpa, ids, mask, **settings)
    assert torch.equal(greedy(other, ids, mask, **settings), expected)
    assert flash.dense + flash.varlen > 0


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("length", [7, LENGTH], ids=["short", "long"])
@pytest.mark.parametrize("mode", ["token", "element"])
@sides
def test_dropout_is_honoured(name, length, mode, side, flash):
    ids, mask = draw_rows(side, length)
    logits = [
        compute_logits_under_dropout(model, ids, mask)
        for model in build_pair(name, prefix_dropout=0.5, prefix_dropout_mode=mode)
    ]
    assert_close(logits[1], logits[0], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("length", [7, LENGTH], ids=["kernel", "window"])
def test_float32_queries_come_back_in_the_dtype_of_the_weights(length, flash):
    model = add_prefix(build_model("mistral", dtype=torch.bfloat16))
    model.set_attn_implementation(FLASH_STAND_IN)
    ids = draw_tokens(length=length)
    expected = model(ids).logits
    for layer in model.get_base_model().model.layers:
        attention = layer.self_attn.base_layer
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.register_forward_hook(lambda module, args, output: output.float())
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert_close(logits, expected, **TOLERANCE[torch.bfloat16])


class BareAttention(nn.Module):
    """What an attention function reads from its module."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.config = LlamaConfig()
        self.config._attn_implementation_internal = FLASH_STAND_IN
        self.is_causal, self.layer_idx = is_causal, 0
        self.o_proj = nn.Linear(2, 2)


class Problem:
    """Random queries, keys, values and prefix; batch 2, 4 heads over 2."""

    def __init__(self, queries: int, tokens: int, length: int = 3, batch: int = 2, dims=(8, 8)) -> None:
        generator = torch.Generator().manual_seed(queries + 31 * tokens)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.query = randn(batch, 4, queries, dims[0])
        self.key, self.value = randn(batch, 2, tokens, dims[0]), randn(batch, 2, tokens, dims[1])
        self.prefix = PrefixStates(randn(batch, 2, length, dims[0]), randn(batch, 2, length, dims[1]))

    def attend(self, mask: Tensor | None = None, is_causal: bool = True, *args, **kwargs) -> Tensor:
        module = BareAttention(is_causal)
        states = (self.query, self.key, self.value)
        return attend_flash(flash_attention_forward, module, *states, mask, self.prefix, *args, **kwargs)[0]

    def attend_by_hand(
        self, visible: Tensor, scaling: float = 8**-0.5, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """`visible` is `[batch or 1, queries, tokens]`; every query sees the prefix, less its own mask."""
        keys, values = torch.cat([self.prefix.keys, self.key], 2), torch.cat([self.prefix.values, self.value], 2)
        batch, heads, queries, _ = self.query.shape
        output = torch.zeros(batch, queries, heads, values.shape[-1])
        for b in range(batch):
            row = torch.ones(keys.shape[2] - self.key.shape[2], dtype=torch.bool)
            if self.prefix.mask is not None:
                row = self.prefix.mask[b]
            for h in range(heads):
                for q in range(queries):
                    seen = torch.cat([row, visible[b % len(visible), q].bool()])
                    scores = keys[b, h // 2, seen] @ self.query[b, h, q] * scaling
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    sink = torch.empty(0) if sinks is None else sinks[h : h + 1]
                    weights = torch.cat([scores, sink]).softmax(-1)[: len(scores)]
                    output[b, q, h] = weights @ values[b, h // 2, seen]
        return output


def build_visible(queries: int, tokens: int, is_causal: bool, window: int | None = None) -> Tensor:
    """Aligned at the ends, `[1, queries, tokens]`."""
    distance = torch.arange(queries)[:, None] + tokens - queries - torch.arange(tokens)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance.abs() < window
    return visible[None]


is_causal_or_not = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
scores = pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
sinks = pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])


@is_causal_or_not
@scores
@sinks
@pytest.mark.parametrize("window", [None, 3, 9], ids=["full", "narrow", "wide"])
@pytest.mark.parametrize("queries", [1, 3, 6])
@pytest.mark.parametrize("masked", [False, True], ids=["", "prefix-mask"])
def test_attention_by_hand(is_causal, softcap, has_sinks, window, queries, masked, flash):
    problem = Problem(queries, 6)
    if masked:
        problem.prefix = problem.prefix._replace(mask=torch.tensor([[True, False, True], [False, False, True]]))
    s_aux = torch.randn(4) if has_sinks else None
    output = problem.attend(None, is_causal, sliding_window=window, softcap=softcap, s_aux=s_aux, scaling=0.4)
    expected = problem.attend_by_hand(build_visible(queries, 6, is_causal, window), 0.4, softcap, s_aux)
    assert_close(output, expected, **TOLERANCE[torch.float32])
    assert (flash.dense + flash.varlen == 1) == (window != 3)


@is_causal_or_not
@pytest.mark.parametrize("window", [None, 3], ids=["full", "narrow"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_hand(is_causal, window, mask_dtype, side, flash):
    problem = Problem(6, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], dtype=mask_dtype)
    mask = mask.flip(-1) if side == "right" else mask
    visible = build_visible(6, 6, is_causal, window) & mask.bool()[:, None, :]
    output, expected = problem.attend(mask, is_causal, sliding_window=window), problem.attend_by_hand(visible)
    assert_close(output[mask.bool()], expected[mask.bool()], **TOLERANCE[torch.float32])


@is_causal_or_not
@pytest.mark.parametrize("window", [None, 2, 9], ids=["full", "narrow", "wide"])
@pytest.mark.parametrize("queries", [1, 6])
def test_padding_inside_a_row_takes_no_place_in_the_window(is_causal, window, queries, flash):
    problem, mask = Problem(queries, 6, batch=1), torch.tensor([[1, 1, 0, 1, 0, 1]])
    kept = mask[0].nonzero()[:, 0]
    visible = torch.zeros(1, 6, 6, dtype=torch.bool)
    visible[0, kept[:, None], kept] = build_visible(4, 4, is_causal, window)[0]
    output, expected = (
        problem.attend(mask, is_causal, sliding_window=window),
        problem.attend_by_hand(visible[:, -queries:]),
    )
    rows = mask.bool()[:, -queries:]
    assert_close(output[rows], expected[rows], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [None, 3], ids=["full", "narrow"])
@pytest.mark.parametrize("queries", [1, 2])
def test_a_static_cache_hands_over_more_keys_than_tokens(window, queries, flash):
    problem = Problem(queries, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    visible = build_visible(queries, 6, True, window) & mask.bool()[:, None, :]
    output = problem.attend(mask, sliding_window=window)
    problem.key, problem.value = problem.key[:, :, :6], problem.value[:, :, :6]
    assert_close(output, problem.attend_by_hand(visible), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("queries", [1, 3, 4, 7, 9])
def test_cross_attention_may_have_any_number_of_queries(queries, flash):
    # With 7 queries there are as many as keys behind the prefix.
    problem = Problem(queries, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    output = problem.attend(mask, is_causal=False)
    expected = problem.attend_by_hand(mask.bool()[:, None, :].expand(-1, queries, -1))
    assert_close(output, expected, **TOLERANCE[torch.float32])
    assert flash.varlen == 1


@pytest.mark.parametrize("window", [None, 3], ids=["full", "narrow"])
def test_values_may_have_fewer_features_than_keys(window, flash):
    problem = Problem(6, 6, dims=(8, 5))
    output = problem.attend(sliding_window=window)
    assert output.shape[-1] == 5
    assert_close(output, problem.attend_by_hand(build_visible(6, 6, True, window)), **TOLERANCE[torch.float32])


def test_the_flag_overrules_the_module(flash):
    problem = Problem(4, 4)
    states = (problem.query, problem.key, problem.value, None, problem.prefix)
    output, _ = attend_flash(flash_attention_forward, BareAttention(is_causal=True), *states, is_causal=False)
    assert_close(output, problem.attend_by_hand(build_visible(4, 4, False)), **TOLERANCE[torch.float32])


def test_arguments_may_be_positional(flash):
    problem = Problem(6, 6)
    output, expected = problem.attend(None, True, 0.0, 0.4, 3), build_visible(6, 6, True, 3)
    assert_close(output, problem.attend_by_hand(expected, 0.4), **TOLERANCE[torch.float32])
    assert flash.dense == 0


def pack(lengths: list[int]) -> dict[str, object]:
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@is_causal_or_not
@pytest.mark.parametrize("window", [None, 2, 4], ids=["full", "narrow", "wide"])
@pytest.mark.parametrize("given", ["offsets", "positions"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "prefix-mask"])
def test_packed_sequences_by_hand(is_causal, window, given, masked, flash):
    lengths = [3, 1, 4]
    problem = Problem(8, 8, batch=1)
    if masked:
        problem.prefix = problem.prefix._replace(mask=torch.tensor([[True, False, True]]))
    kwargs = pack(lengths)
    if given == "positions":
        kwargs = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    visible = torch.block_diag(*(build_visible(length, length, is_causal, window)[0] for length in lengths))[None]
    output = problem.attend(None, is_causal, sliding_window=window, **kwargs)
    assert_close(output, problem.attend_by_hand(visible), **TOLERANCE[torch.float32])
    assert flash.varlen == (window != 2) and flash.dense == 0


@pytest.mark.parametrize("window", [None, 2], ids=["full", "narrow"])
def test_packed_sequences_may_be_shorter_than_their_keys_and_the_row(window, flash):
    """As in continuous batching: some keys were cached, some offsets are padding, and so are the ends of the row."""
    problem = Problem(6, 10, batch=1)
    kwargs = {
        "cu_seq_lens_q": torch.tensor([0, 1, 4, 4], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 4, 9, 9], dtype=torch.int32),
        "max_length_q": 3,
        "max_length_k": 5,
    }
    visible = torch.zeros(1, 6, 10, dtype=torch.bool)
    visible[0, :1, :4], visible[0, 1:4, 4:9] = build_visible(1, 4, True, window), build_visible(3, 5, True, window)
    output = problem.attend(sliding_window=window, **kwargs)
    assert_close(output[:, :4], problem.attend_by_hand(visible)[:, :4], **TOLERANCE[torch.float32])


def test_positions_of_one_sequence_are_no_packing(flash):
    problem = Problem(2, 6, batch=1)
    output = problem.attend(position_ids=torch.tensor([[4, 5]]))
    assert_close(output, problem.attend_by_hand(build_visible(2, 6, True)), **TOLERANCE[torch.float32])
    assert flash.dense == 1


def test_several_rows_of_packed_sequences_raise(flash):
    with pytest.raises(ValueError, match=r"single row.*not 2.*DataCollatorWithFlattening"):
        Problem(4, 4).attend(**pack([4, 4]))


def test_a_bias_for_keys_raises(flash):
    problem = Problem(4, 4)
    problem.prefix = problem.prefix._replace(bias=torch.zeros(1, 4, 1, 3))
    with pytest.raises(ValueError, match=r"no bias for single keys.*set_attn_implementation\('sdpa'\)"):
        problem.attend()


def test_block_tables_raise(flash):
    cache = SimpleNamespace(update=lambda **kwargs: pytest.fail("the cache was updated"))
    with pytest.raises(ValueError, match=r"block tables.*max_blocks_per_request=0"):
        Problem(4, 4, batch=1).attend(cache=cache, block_table=torch.zeros(1, 1))


def test_a_kernel_that_aligns_at_the_beginning_raises(flash, monkeypatch):
    monkeypatch.setattr(flash_module, "flash_attn_supports_top_left_mask", lambda: True)
    with pytest.raises(ValueError, match=r"aligns.*NPU_FA2_SPARSE_MODE"):
        Problem(4, 4).attend()
    assert math.isfinite(Problem(1, 4).attend().sum()) and math.isfinite(Problem(4, 4).attend(is_causal=False).sum())


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART_SIZES = {"d_model": 32, "init_std": 0.2, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0} | {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}
DEEPSEEK_SIZES = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        ("BertModel", SIZES),
        ("ModernBertModel", SIZES | {"local_attention": 8, "global_attn_every_n_layers": 2}),
        ("Gemma2ForCausalLM", SIZES | GROUPED | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
        ("GptOssForCausalLM", SIZES | GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("DeepseekV3ForCausalLM", SIZES | DEEPSEEK_SIZES),
        ("BartForConditionalGeneration", BART_SIZES),
    ],
    ids=["encoder", "windowed-encoder", "softcap", "sinks", "latent-values", "encoder-decoder"],
)
@sides
@torch.no_grad()
def test_other_kinds_of_attention_equal_eager(model_class, settings, side, flash):
    config = getattr(transformers, model_class.split("For")[0].removesuffix("Model") + "Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    model.set_attn_implementation("eager")
    task = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    task_type = next((name for end, name in task.items() if model_class.endswith(end)), None)
    peft_model = get_peft_model(
        model, PrefixPlusConfig(task_type=task_type, num_virtual_tokens=3, prefix_init="random")
    ).eval()
    perturb(peft_model)
    ids, mask = draw_rows(side, LENGTH)
    given, seen = {"input_ids": ids, "attention_mask": mask}, mask.bool()
    if task_type == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = draw_tokens(batch_size=3, length=9)
        seen = torch.ones(3, 9, dtype=torch.bool)
    expected = peft_model(**given)[0][seen]
    # GPT-OSS would be sent to a kernel of the hub instead.
    model.config._attn_implementation_internal = FLASH_STAND_IN
    assert_close(peft_model(**given)[0][seen], expected, **TOLERANCE[torch.float32])
    assert flash.dense + flash.varlen > 0
