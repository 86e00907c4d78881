"""The prefix inside the attention function, against attention computed one query at a time."""

import math
import threading

import pytest
import torch
from helpers import INIT_TOKEN_IDS, add_prefix, draw_tokens, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny_models import ARCHITECTURES, build_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from peft_prefix_plus import PrefixPlusConfig, PrefixStates
from peft_prefix_plus.architectures import find_attention_call, find_attention_modules, read_geometry
from peft_prefix_plus.attention import (
    ROUTE_NAME,
    attend_with_prefix,
    extend_mask,
    find_mask_contract,
    match_prefix,
    original_config,
    prepend_prefix,
    record_states,
    refuse_mask,
    resolve_attention_function,
    route_config,
)
from peft_prefix_plus.dropout import PrefixDropout
from peft_prefix_plus.encoders import build_encoder
from peft_prefix_plus.layer import PrefixPlusLayer

KEY_DIM, VALUE_DIM = 3, 4
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


class BareAttention(nn.Module):
    """Attention without projections: the test says what reaches the attention function."""

    def __init__(self, implementation: str, num_heads: int = 2, num_key_value_heads: int = 2) -> None:
        super().__init__()
        self.config = LlamaConfig(num_attention_heads=num_heads, num_key_value_heads=num_key_value_heads)
        self.config._attn_implementation = implementation
        self.num_key_value_groups = num_heads // num_key_value_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(self, query, key, value, mask, scaling=KEY_DIM**-0.5, **kwargs)


class DeafAttention(nn.Module):
    """An attention module that could call the interface, and does not."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim, self.num_key_value_heads = 8, 2
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, never: bool = False) -> Tensor:
        if never:
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return self.o_proj(hidden_states)


class TalkativeAttention(DeafAttention):
    """An attention module that asks the interface twice."""

    def forward(self, hidden_states: Tensor, never: bool = False) -> Tensor:
        self.num_key_value_groups = 1
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        heads = hidden_states.view(*hidden_states.shape[:2], 2, 8).transpose(1, 2)
        first = attend(self, heads, heads, heads, None, scaling=1.0)[0]
        second = attend(self, heads, heads, -heads, None, scaling=1.0)[0]
        return (first + second).flatten(2)


@st.composite
def attention_problems(draw):
    """Queries, keys, values, a prefix, and who sees what."""
    batch, kv_heads, groups = draw(st.sampled_from([1, 3])), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, tokens, length = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    prefix_batch = draw(st.sampled_from([1, batch]))
    prefix = PrefixStates(
        randn(prefix_batch, kv_heads, length, KEY_DIM), randn(prefix_batch, kv_heads, length, VALUE_DIM)
    )
    if draw(st.booleans()):
        mask = torch.rand(draw(st.sampled_from([1, batch])), length, generator=generator) < 0.6
        mask[:, draw(st.integers(0, length - 1))] = True
        prefix = prefix._replace(mask=mask)
    form = draw(st.sampled_from(["none", "bool", "float", "bias"]))
    mask = None
    if form != "none":
        heads = kv_heads * groups
        shape = [draw(st.sampled_from([1, size])) for size in (batch, heads, queries)] + [tokens]
        visible = torch.rand(shape, generator=generator) < 0.6
        mask = visible if form == "bool" else torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        if form == "bias":
            mask = torch.where(visible, randn(*shape), mask)
    query = randn(batch, kv_heads * groups, queries, KEY_DIM)
    key, value = randn(batch, kv_heads, tokens, KEY_DIM), randn(batch, kv_heads, tokens, VALUE_DIM)
    return query, key, value, mask, prefix


def at(tensor: Tensor, *index: int) -> Tensor:
    """Index a tensor whose axes of size 1 stand for any size."""
    return tensor[tuple(min(i, size - 1) for i, size in zip(index, tensor.shape, strict=False))]


def attend_by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, prefix: PrefixStates):
    """Softmax attention over prefix and tokens in double precision, one query at a time.

    Returns:
        output `[batch, queries, heads, value_dim]`, and weights `[batch, heads, queries, P + tokens]`.
    """
    batch, heads, queries, _ = query.shape
    groups, length, tokens = heads // key.shape[1], prefix.num_virtual_tokens, key.shape[2]
    output = torch.zeros(batch, queries, heads, VALUE_DIM, dtype=torch.float64)
    weights = torch.zeros(batch, heads, queries, length + tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                scores = torch.full((length + tokens,), -math.inf, dtype=torch.float64)
                rows = []
                for p in range(length):
                    rows.append(at(prefix.values, b, h // groups)[p])
                    if prefix.mask is None or at(prefix.mask, b)[p]:
                        scores[p] = query[b, h, q].double() @ at(prefix.keys, b, h // groups)[p].double()
                for t in range(tokens):
                    rows.append(value[b, h // groups, t])
                    score = query[b, h, q].double() @ key[b, h // groups, t].double()
                    given_mask = torch.tensor(0.0) if mask is None else at(mask, b, h, q)[t]
                    if given_mask.dtype == torch.bool:
                        scores[length + t] = score if given_mask else -math.inf
                    elif given_mask > torch.finfo(torch.float32).min:
                        scores[length + t] = score + given_mask * KEY_DIM**0.5
                weights[b, h, q] = (scores * KEY_DIM**-0.5).softmax(dim=-1)
                output[b, q, h] = weights[b, h, q] @ torch.stack(rows).double()
    return output.float(), weights.float()


@given(attention_problems())
@settings(max_examples=60, deadline=None)
def test_extended_attention_is_attention_with_the_prefix(problem):
    query, key, value, mask, prefix = problem
    expected, expected_weights = attend_by_hand(query, key, value, mask, prefix)
    matched = match_prefix(prefix, key, value)
    keys, values = prepend_prefix(key, value, matched)
    extended = extend_mask(mask, matched, key.shape[2], query.dtype)
    groups = query.shape[1] // key.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = query @ keys.transpose(-1, -2) * KEY_DIM**-0.5
    if extended is not None and extended.dtype == torch.bool:
        scores = scores.masked_fill(~extended, -math.inf)
    elif extended is not None:
        scores = scores + extended
    weights = scores.softmax(dim=-1)
    assert_close(weights, expected_weights, **TOLERANCE)
    assert_close((weights @ values).transpose(1, 2), expected, **TOLERANCE)
    if prefix.mask is not None:
        hidden = ~prefix.mask.expand(query.shape[0], -1)[:, None, None, :].expand_as(
            weights[..., : prefix.num_virtual_tokens]
        )
        assert not weights[..., : prefix.num_virtual_tokens][hidden].any(), "hidden virtual tokens get no weight"


@given(attention_problems())
@settings(max_examples=60, deadline=None)
def test_mask_of_real_tokens_is_preserved(problem):
    query, key, _, mask, prefix = problem
    extended = extend_mask(mask, prefix, key.shape[2], query.dtype)
    if mask is None and prefix.mask is None:
        assert extended is None
        return
    tokens = extended[..., prefix.num_virtual_tokens :]
    if mask is None:
        assert extended.dtype == query.dtype and not tokens.any()
    else:
        assert extended.dtype == mask.dtype
        assert torch.equal(*torch.broadcast_tensors(tokens, mask))
    columns = extended[..., : prefix.num_virtual_tokens]
    visible = columns if columns.dtype == torch.bool else columns == 0
    expected = torch.ones(1, 1, dtype=torch.bool) if prefix.mask is None else prefix.mask
    assert torch.equal(*torch.broadcast_tensors(visible, expected[:, None, None, :]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_hidden_columns_have_the_lowest_value_of_every_dtype(dtype, masked):
    prefix = PrefixStates(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1), torch.tensor([[True, False]]))
    extended = extend_mask(torch.zeros(1, 1, 1, 3, dtype=dtype) if masked else None, prefix, 3, dtype)
    assert extended.dtype == dtype
    assert extended.flatten().tolist() == [0, torch.finfo(dtype).min, 0, 0, 0]


@pytest.mark.parametrize("mode", ["token", "element"])
def test_double_precision_models_train_with_dropout(mode):
    model = add_prefix(
        build_model("llama", "eager", torch.float64), prefix_dropout=0.5, prefix_dropout_mode=mode
    ).train()
    assert model(draw_tokens()).logits.isfinite().all()


@given(st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_prepend_puts_the_prefix_in_front(length, tokens, per_row):
    prefix = PrefixStates(
        torch.randn(2 if per_row else 1, 2, length, 3), torch.randn(2 if per_row else 1, 2, length, 4)
    )
    key, value = torch.randn(2, 2, tokens, 3), torch.randn(2, 2, tokens, 4)
    matched = match_prefix(prefix, key, value)
    keys, values = prepend_prefix(key, value, matched)
    assert torch.equal(keys[..., length:, :], key) and torch.equal(values[..., length:, :], value)
    assert torch.equal(keys[..., :length, :], prefix.keys.expand(2, -1, -1, -1))
    assert torch.equal(values[..., :length, :], prefix.values.expand(2, -1, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_match_takes_dtype_and_batch_of_the_tokens_without_copies(dtype):
    prefix = PrefixStates(torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 4), torch.ones(1, 5, dtype=torch.bool))
    key, value = torch.randn(4, 2, 7, 3, dtype=dtype), torch.randn(4, 2, 7, 4, dtype=dtype)
    matched = match_prefix(prefix, key, value)
    assert matched.keys.shape == (4, 2, 5, 3) and matched.values.shape == (4, 2, 5, 4)
    assert matched.keys.dtype == matched.values.dtype == dtype
    assert matched.mask.shape == (4, 5) and matched.mask.dtype == torch.bool
    assert matched.keys.stride(0) == matched.values.stride(0) == matched.mask.stride(0) == 0


@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(3, 3, 4), (2, 5, 4), (2, 3, 6)])
def test_match_refuses_other_shapes(heads, key_dim, value_dim):
    prefix = PrefixStates(torch.randn(1, heads, 5, key_dim), torch.randn(1, heads, 5, value_dim))
    with pytest.raises(ValueError) as raised:
        match_prefix(prefix, torch.randn(1, 2, 7, 3), torch.randn(1, 2, 7, 4))
    assert f"({heads}, {key_dim}, {value_dim})" in str(raised.value) and "(2, 3, 4)" in str(raised.value)
    assert "another base model" in str(raised.value)


def route(module: nn.Module) -> nn.Module:
    module.config = route_config(module.config)
    return module.eval()


@implementations
@given(problem=attention_problems())
@settings(max_examples=40, deadline=None)
def test_routed_attention_is_attention_with_the_prefix(implementation, problem):
    query, key, value, mask, prefix = problem
    if implementation == "eager" and mask is not None and mask.dtype == torch.bool:
        return  # transformers gives eager additive masks only
    module = route(BareAttention(implementation, query.shape[1], key.shape[1]))
    output, _ = attend_with_prefix(module, prefix, query, key, value, mask, is_causal=False)
    assert_close(output, attend_by_hand(query, key, value, mask, prefix)[0], **TOLERANCE)


@given(problem=attention_problems(), surplus=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_sdpa_without_a_mask_is_causal_behind_the_prefix(problem, surplus):
    query, key, value, _, prefix = problem
    torch.manual_seed(surplus)
    num_queries = query.shape[2] + 1
    query = torch.randn(*query.shape[:2], num_queries, KEY_DIM)
    # A static cache hands over more keys than there are queries; those behind are empty.
    key = torch.randn(*key.shape[:2], num_queries + surplus, KEY_DIM)
    value = torch.randn(*value.shape[:2], num_queries + surplus, VALUE_DIM)
    module = route(BareAttention("sdpa", query.shape[1], key.shape[1]))
    output, _ = attend_with_prefix(module, prefix, query, key, value)
    causal = torch.ones(num_queries, num_queries, dtype=torch.bool).tril()[None, None]
    key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    assert_close(output, attend_by_hand(query, key, value, causal, prefix)[0], **TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mask_form", ["causal", "none", "bool"])
def test_position_bias_is_zero_for_the_prefix(masked, mask_form):
    prefix = PrefixStates(torch.randn(1, 2, 3, KEY_DIM), torch.randn(1, 2, 3, VALUE_DIM))
    if masked:
        prefix = prefix._replace(mask=torch.tensor([[True, False, True]]))
    query, key, value = (torch.randn(2, 2, 4, dim) for dim in (KEY_DIM, KEY_DIM, VALUE_DIM))
    bias, causal = torch.randn(1, 2, 4, 4), torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    mask = causal if mask_form == "bool" else None
    module = route(BareAttention("sdpa"))
    output, _ = attend_with_prefix(
        module, prefix, query, key, value, mask, position_bias=bias, is_causal=mask_form != "none"
    )
    visible = torch.ones_like(causal) if mask_form == "none" else causal
    expected = torch.where(visible, bias, torch.finfo(torch.float32).min)
    assert_close(output, attend_by_hand(query, key, value, expected, prefix)[0], **TOLERANCE)


@implementations
def test_gradients_reach_the_prefix_and_only_its_visible_tokens(implementation):
    prefix = PrefixStates(
        torch.randn(1, 2, 3, KEY_DIM, requires_grad=True),
        torch.randn(1, 2, 3, VALUE_DIM, requires_grad=True),
        torch.tensor([[True, False, True]]),
    )
    query, key, value = (torch.randn(2, 2, 4, dim) for dim in (KEY_DIM, KEY_DIM, VALUE_DIM))
    mask = torch.where(torch.ones(4, 4).tril().bool(), 0.0, torch.finfo(torch.float32).min)[None, None]
    attend_with_prefix(route(BareAttention(implementation)), prefix, query, key, value, mask)[
        0
    ].square().sum().backward()
    for tensor in (prefix.keys, prefix.values):
        assert tensor.grad[..., [0, 2], :].all() and not tensor.grad[..., 1, :].any()


def test_scores_that_a_model_computes_in_float32_stay_so():
    """GPT-2 as Stanford trained it: in half precision its scores are too large for the softmax."""
    base = build_model("gpt2", "eager", reorder_and_upcast_attn=True)
    with torch.no_grad():
        for block in base.transformer.h:
            block.attn.c_attn.weight[:, :64] *= 40
    base.half()
    ids = draw_tokens()
    start = torch.tensor([INIT_TOKEN_IDS]).expand(len(ids), -1)
    expected = base(torch.cat([start, ids], 1)).logits[:, len(INIT_TOKEN_IDS) :]
    assert expected.isfinite().all()
    assert_close(add_prefix(base)(ids).logits, expected)


def test_eager_weights_have_the_prefix_in_front():
    model, ids = add_prefix(build_model("llama", "eager")), draw_tokens()
    for weights in model(ids, output_attentions=True).attentions:
        assert weights.shape == (2, 4, 7, len(INIT_TOKEN_IDS) + 7)
        assert_close(weights.sum(dim=-1), torch.ones(2, 4, 7))
        assert weights[..., : len(INIT_TOKEN_IDS)].all()


def test_the_implementation_is_looked_up_at_every_call():
    model, ids = add_prefix(build_model("llama", "sdpa")), draw_tokens()
    perturb(model)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True)
    assert output.attentions is not None and output.attentions[0] is not None
    assert_close(output.logits, expected, **TOLERANCE)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, expected)


def attend_after_doubling(module, query, key, value, attention_mask, **kwargs):
    """What a user might register: sdpa with other scores."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, 2 * query, key, value, attention_mask, **kwargs)


@pytest.fixture
def registered(request):
    """An attention function of the user's, with the mask maker of a known implementation or without one."""
    AttentionInterface.register("doubled", attend_after_doubling)
    if request.param is not None:
        AttentionMaskInterface.register("doubled", ALL_MASK_ATTENTION_FUNCTIONS[request.param])
    yield "doubled"
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("doubled")
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop("doubled", None)


@pytest.mark.parametrize("registered", ["eager", "sdpa"], indirect=True)
def test_an_attention_function_of_the_users_carries_a_prefix(registered):
    ids, prompt = draw_tokens(), torch.tensor(INIT_TOKEN_IDS).expand(2, -1)
    model = build_model("llama", registered)
    expected = model(torch.cat([prompt, ids], dim=1)).logits[:, len(INIT_TOKEN_IDS) :]
    assert not torch.allclose(model(ids).logits, build_model("llama")(ids).logits, atol=1e-2), "it is really called"
    assert_close(add_prefix(model)(ids).logits, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("registered", [None], indirect=True)
def test_an_implementation_without_a_mask_maker_raises_at_injection(registered):
    model, ids = build_model("llama"), draw_tokens()
    expected = model(ids).logits
    model.config._attn_implementation_internal = registered
    with pytest.raises(ValueError, match=r"cannot tell how .*'doubled' takes its mask.*AttentionMaskInterface"):
        get_peft_model(model, PrefixPlusConfig(task_type="CAUSAL_LM"))
    model.config._attn_implementation_internal = "sdpa"
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("registered", [None], indirect=True)
def test_an_implementation_without_a_mask_maker_raises_at_call_time(registered):
    model, ids = add_prefix(build_model("llama")), draw_tokens()
    expected = model(ids).logits
    model.config._attn_implementation_internal = registered
    with pytest.raises(ValueError, match=r"cannot tell how .*'doubled' takes its mask"):
        model(ids)
    model.config._attn_implementation_internal = "sdpa"
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", ["nowhere", ROUTE_NAME, "SDPA"])
def test_unknown_masks_are_refused_with_what_came_and_what_works(name):
    with pytest.raises(ValueError, match=rf"{name!r} takes its mask.*set_attn_implementation\('sdpa'\)"):
        find_mask_contract(name)


@pytest.mark.parametrize(
    ("implementation", "expected"),
    [
        (None, "eager"),
        ("eager", "eager"),
        ("sdpa", "sdpa"),
        ("flex_attention", "flex_attention"),
        ("flash_attention_2", "flash_attention_2"),
        ("flash_attention_3", "flash_attention_2"),
    ],
)
def test_the_form_of_the_mask_is_that_of_the_mask_maker(implementation, expected):
    assert find_mask_contract(implementation).value == expected


def test_resolving_a_module_without_the_interface_raises():
    with pytest.raises(TypeError, match="Linear does not use the attention interface"):
        resolve_attention_function(nn.Linear(2, 2), "sdpa")


def test_refuse_mask_raises():
    with pytest.raises(RuntimeError, match=r"'prefix_plus' is not an attention implementation.*get_peft_model"):
        refuse_mask(1, mask=2)


def test_a_whole_model_cannot_be_routed():
    model = build_model("llama")
    model.config._attn_implementation_internal = ROUTE_NAME
    with pytest.raises(RuntimeError, match="is not an attention implementation for models"):
        model(draw_tokens())


def test_a_whole_model_that_names_the_route_gets_no_adapter():
    model = build_model("llama")
    model.config._attn_implementation_internal = ROUTE_NAME
    with pytest.raises(ValueError, match=rf"cannot tell how .*{ROUTE_NAME!r}"):
        get_peft_model(model, PrefixPlusConfig(task_type="CAUSAL_LM"))


def test_route_config_leaves_the_original_alone():
    model = build_model("llama")
    config, attention = model.config, model.model.layers[0].self_attn
    routed = route_config(config)
    assert routed._attn_implementation == ROUTE_NAME and config._attn_implementation == "sdpa"
    assert routed.prefix_plus_original is config and not hasattr(config, "prefix_plus_original")
    attention.config = route_config(routed)
    assert original_config(attention) is config
    assert original_config(model.model.layers[1].self_attn) is config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recording_changes_nothing_and_restores_the_configs(name):
    model, ids = build_model(name), draw_tokens()
    modules = list(find_attention_modules(model).values())
    configs, expected = [module.config for module in modules], model(ids).logits
    with record_states(modules) as recorder:
        assert torch.equal(model(ids).logits, expected)
    recorded = recorder.get_states()
    assert list(recorded) == modules
    assert all(module.config is config for module, config in zip(modules, configs, strict=True))
    assert all(states.keys.shape[-2] == states.values.shape[-2] == 7 for states in recorded.values())
    with record_states(modules) as idle:
        pass
    assert torch.equal(model(ids).logits, expected) and not idle.get_states()


def test_the_first_forward_of_every_module_is_what_is_recorded():
    model, ids = build_model("llama"), draw_tokens(batch_size=1)
    module = model.model.layers[0].self_attn
    with record_states([module]) as first:
        model(ids)
    with record_states([module]) as both:
        model(ids)
        model(ids[:, :3])
    assert torch.equal(both.get_states()[module].keys, first.get_states()[module].keys)
    assert not first.get_states()[module].keys.requires_grad


def test_recording_restores_the_configs_after_an_error():
    model, ids = build_model("llama"), draw_tokens()
    modules = list(find_attention_modules(model).values())
    configs, expected = [module.config for module in modules], model(ids).logits
    modules[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), record_states(modules):
        model(ids)
    modules[1]._forward_pre_hooks.clear()
    assert all(module.config is config for module, config in zip(modules, configs, strict=True))
    assert torch.equal(model(ids).logits, expected)


class UncopyableConfig(LlamaConfig):
    """A config that cannot be routed."""

    def __copy__(self):
        raise TypeError("no copies")


def test_recording_restores_what_was_changed_before_a_wrong_module():
    model = build_model("llama")
    module = model.model.layers[0].self_attn
    wrong = BareAttention("sdpa")
    wrong.config = UncopyableConfig()
    with pytest.raises(TypeError, match="no copies"), record_states([module, wrong]):
        pass
    assert module.config is model.config


def test_recordings_nest():
    model, ids = build_model("llama"), draw_tokens()
    first, second = (layer.self_attn for layer in model.model.layers)
    with record_states([first]) as outer:
        with record_states([second]) as inner:
            model(ids)
        assert second in inner.get_states() and not outer.get_states()
        model(ids)
    assert first in outer.get_states() and model.model.layers[1].self_attn.config is model.config


def wrap(module: nn.Module, num_virtual_tokens: int = 3) -> PrefixPlusLayer:
    encoder = build_encoder("none", read_geometry(module), num_virtual_tokens)
    encoder.initialize(
        PrefixStates(torch.randn(1, 2, num_virtual_tokens, 8), torch.randn(1, 2, num_virtual_tokens, 8)),
        PrefixStates(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1)),
    )
    layer = PrefixPlusLayer(module)
    layer.update_layer("default", encoder, PrefixDropout(0.0, "token"))
    layer.set_adapter("default")
    return layer


def build_config() -> LlamaConfig:
    config = LlamaConfig(hidden_size=16, num_attention_heads=2)
    config._attn_implementation = "sdpa"
    return config


def test_a_module_that_ignores_its_prefix_raises():
    assert find_attention_call(DeafAttention) is not None
    layer, hidden_states = wrap(DeafAttention(build_config())), torch.randn(1, 4, 16)
    with pytest.raises(RuntimeError, match=r"DeafAttention.*without the prefix.*exclude_modules"):
        layer(hidden_states)
    layer.enable_adapters(False)
    assert torch.equal(layer(hidden_states), layer.base_layer.o_proj(hidden_states))


def test_a_module_may_attend_twice():
    layer, hidden_states = wrap(TalkativeAttention(build_config())), torch.randn(1, 4, 16)
    (prefix,) = [layer.get_prefix_states(["default"], 1)]
    heads = hidden_states.view(1, 4, 2, 8).transpose(1, 2)
    keys, mask = torch.cat([prefix.keys, heads], dim=2), torch.ones(4, 7, dtype=torch.bool).tril(3)
    expected = sum(
        nn.functional.scaled_dot_product_attention(
            heads, keys, torch.cat([prefix.values, sign * heads], dim=2), mask, scale=1.0
        )
        for sign in (1, -1)
    )
    assert_close(layer(hidden_states), expected.transpose(1, 2).flatten(2), **TOLERANCE)


def test_calling_the_base_module_past_its_layer_raises():
    model, ids = add_prefix(build_model("llama")), draw_tokens()
    layers = model.get_base_model().model.layers
    layers[1].self_attn = layers[1].self_attn.base_layer
    with pytest.raises(RuntimeError, match=r"LlamaAttention was called past its PrefixPlus layer.*unload\(\)"):
        model(ids)


def test_an_error_inside_the_module_leaves_no_prefix_behind():
    model, ids = add_prefix(build_model("llama")), draw_tokens()
    expected = model(ids).logits
    layer = model.get_base_model().model.layers[0].self_attn
    with pytest.raises(TypeError):
        layer(torch.randn(1, 4, 32))
    with pytest.raises(RuntimeError, match="past its PrefixPlus layer"):
        layer.base_layer(torch.randn(1, 4, 32), position_embeddings=(torch.ones(1, 4, 8), torch.zeros(1, 4, 8)))
    assert torch.equal(model(ids).logits, expected)


@implementations
def test_threads_do_not_see_each_other(implementation):
    model = add_prefix(build_model("llama", implementation))
    perturb(model)
    inputs = [draw_tokens(seed=seed, length=4 + seed) for seed in range(2)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
    barrier, results = threading.Barrier(2), [[], []]

    @torch.no_grad()
    def work(i: int) -> None:
        barrier.wait()
        for _ in range(20):
            results[i].append(model(inputs[i]).logits)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(results[i]) == 20
        assert all(torch.equal(logits, expected[i]) for logits in results[i])


def test_recording_in_one_thread_is_not_seen_by_another_model_in_another():
    model, other, ids = add_prefix(build_model("llama")), build_model("llama"), draw_tokens()
    expected = model(ids).logits
    results = []
    with record_states(list(find_attention_modules(other).values())) as recorder:
        thread = threading.Thread(target=lambda: results.append(model(ids).logits))
        thread.start()
        thread.join()
        assert not recorder.get_states()
    assert torch.equal(results[0], expected)
