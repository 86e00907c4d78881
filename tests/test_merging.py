"""Attention to the tokens and to the prefix by parts equals attention to both at once."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import add_prefix, draw_tokens, perturb
from tiny_models import build_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.performance.cases import count_saved_bytes
from peft_prefix_plus import PrefixPlusLayer
from peft_prefix_plus.attention import dense
from peft_prefix_plus.attention.merging import _MAX_PRECISE_QUERIES, attend_by_parts, can_merge
from peft_prefix_plus.attention.prepending import extend_mask, match_prefix, prepend_prefix
from peft_prefix_plus.states import PrefixStates

BATCH, HEADS, KV_HEADS, TOKENS, DIM = 3, 6, 2, 11, 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-10}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def build_mask(kind: str, queries: int) -> Tensor | None:
    visible = torch.rand(BATCH, 1, queries, TOKENS) > 0.4
    visible[..., -1] = True
    if kind == "none":
        return None
    if kind == "padding":
        return visible
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    if kind == "heads":
        return additive + draw(1, HEADS, queries, TOKENS)
    if kind == "infinite":
        # A row of padding, where nothing but the prefix is left.
        additive = additive.masked_fill(~visible, -torch.inf)
        additive[0] = -torch.inf
    return additive


def build_prefix(kind: str, dtype: torch.dtype) -> PrefixStates:
    rows = 1 if kind == "shared" else BATCH
    keys, values = (draw(rows, KV_HEADS, 5, DIM, dtype=dtype) for _ in range(2))
    mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3, [False] * 5]) if kind == "masked" else None
    return PrefixStates(keys, values, mask)


def attend_at_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, prefix: PrefixStates) -> Tensor:
    mask = extend_mask(mask, prefix, TOKENS, query.dtype)
    key, value = (states.repeat_interleave(HEADS // KV_HEADS, 1) for states in prepend_prefix(key, value, prefix))
    return scaled_dot_product_attention(query, key, value, mask, scale=0.4).transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prefix_kind", ["shared", "rows", "masked"])
@pytest.mark.parametrize("mask_kind", ["none", "padding", "additive", "infinite", "heads"])
@pytest.mark.parametrize("queries", [1, 4])
def test_both_parts_equal_attention_at_once(queries, mask_kind, prefix_kind, dtype):
    query, mask = draw(BATCH, HEADS, queries, DIM, dtype=dtype), build_mask(mask_kind, queries)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype) if mask_kind == "infinite" else mask.to(dtype).clamp(min=torch.finfo(dtype).min)
    key, value = (draw(BATCH, KV_HEADS, TOKENS, DIM, dtype=dtype) for _ in range(2))
    prefix = match_prefix(build_prefix(prefix_kind, dtype), key, value)
    expected = attend_at_once(query, key, value, mask, prefix)
    given = attend_by_parts(query, key, value, mask, prefix, is_causal=False, scaling=0.4)
    assert given.is_contiguous() and given.dtype == dtype
    assert_close(given, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_the_causal_flag_counts_for_the_tokens_only():
    query, key, value = draw(BATCH, HEADS, TOKENS, DIM), *(draw(BATCH, KV_HEADS, TOKENS, DIM) for _ in range(2))
    prefix = match_prefix(build_prefix("shared", torch.float32), key, value)
    causal = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    expected = attend_at_once(query, key, value, causal, prefix)
    assert_close(attend_by_parts(query, key, value, None, prefix, True, 0.4), expected, atol=1e-5, rtol=1e-5)


def test_a_hidden_prefix_changes_nothing_bit_for_bit():
    query, key, value = draw(BATCH, HEADS, 1, DIM), *(draw(BATCH, KV_HEADS, TOKENS, DIM) for _ in range(2))
    prefix = match_prefix(build_prefix("masked", torch.float32), key, value)
    hidden = prefix._replace(mask=torch.zeros(BATCH, 5, dtype=torch.bool))
    other = hidden._replace(keys=draw(*prefix.keys.shape), values=draw(*prefix.values.shape))
    first, second = (attend_by_parts(query, key, value, None, states, False, 0.4) for states in (hidden, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prefix_kind", ["shared", "rows", "masked"])
@pytest.mark.parametrize("mask_kind", ["none", "causal", "padding", "infinite"])
@pytest.mark.parametrize("queries", [1, TOKENS])
def test_gradients_equal_those_of_attention_at_once(queries, mask_kind, prefix_kind, dtype):
    query = draw(BATCH, queries, HEADS, DIM, dtype=dtype).requires_grad_()
    key, value = (draw(BATCH, TOKENS, KV_HEADS, DIM, dtype=dtype).requires_grad_() for _ in range(2))
    prefix = build_prefix(prefix_kind, dtype)
    if prefix.mask is not None:
        # Where nothing at all is visible there is nothing to compare.
        prefix.mask[:, -1] = True
    inputs = (query, key, value, prefix.keys.requires_grad_(), prefix.values.requires_grad_())
    is_causal = mask_kind == "causal" and queries > 1
    mask = build_mask("none" if mask_kind == "causal" else mask_kind, queries)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    expected_mask = torch.ones(1, 1, queries, TOKENS, dtype=torch.bool).tril() if is_causal else mask

    states = [tensor.transpose(1, 2) for tensor in inputs[:3]]
    prefix = match_prefix(prefix, *states[1:])
    given = attend_by_parts(*states, mask, prefix, is_causal, 0.4)
    expected = attend_at_once(*states, expected_mask, prefix)
    assert_close(given, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    arriving = torch.randn_like(expected)
    tolerance = 5 * TOLERANCE[dtype]
    for own, other in zip(
        torch.autograd.grad(given, inputs, arriving), torch.autograd.grad(expected, inputs, arriving), strict=True
    ):
        assert_close(own, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [32, _MAX_PRECISE_QUERIES, _MAX_PRECISE_QUERIES + 1, 400])
def test_gradients_in_half_precision_are_about_as_exact_as_those_of_attention_at_once(tokens, dtype):
    torch.manual_seed(0)
    shapes = [(2, HEADS, tokens, DIM), *2 * [(2, KV_HEADS, tokens, DIM)], *2 * [(1, KV_HEADS, 5, DIM)]]
    drawn, weights = [draw(*shape) for shape in shapes], draw(2, tokens, HEADS, DIM)
    causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()

    def differentiate(by_parts: bool, own_dtype: torch.dtype) -> list[Tensor]:
        query, key, value, keys, values = inputs = [item.to(own_dtype, copy=True).requires_grad_() for item in drawn]
        prefix = PrefixStates(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1))
        if by_parts:
            output = attend_by_parts(query, key, value, None, prefix, True, 0.4)
        else:
            output = attend_at_once(query, key, value, causal, prefix)
        (output * weights.to(own_dtype)).sum().backward()
        return [item.grad for item in inputs]

    exact = differentiate(False, torch.float32)
    errors = [
        [(own.float() - right).norm() / right.norm() for own, right in zip(grads, exact, strict=True)]
        for grads in (differentiate(True, dtype), differentiate(False, dtype))
    ]
    by_parts, at_once = errors
    assert all(own < 1.3 * other < 0.05 for own, other in zip(by_parts, at_once, strict=True))
    # That of the prefix is computed in float32, whatever the number of queries.
    assert all(own < other for own, other in zip(by_parts[3:], at_once[3:], strict=True))


def test_a_first_layer_gives_gradients_to_its_prefix_only():
    query, key, value = draw(BATCH, HEADS, TOKENS, DIM), *(draw(BATCH, KV_HEADS, TOKENS, DIM) for _ in range(2))
    prefix = build_prefix("shared", torch.float32)
    inputs = prefix.keys.requires_grad_(), prefix.values.requires_grad_()
    prefix = match_prefix(prefix, key, value)
    causal = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    given = torch.autograd.grad(attend_by_parts(query, key, value, None, prefix, True, 0.4).square().sum(), inputs)
    expected = torch.autograd.grad(attend_at_once(query, key, value, causal, prefix).square().sum(), inputs)
    assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_what_a_training_step_keeps_grows_neither_with_the_tokens_nor_with_the_rows():
    more = []
    for batch_size, length in ((2, 16), (2, 64), (8, 16)):
        ids = draw_tokens(batch_size, length)
        base, model = build_model("llama").requires_grad_(False), add_prefix(build_model("llama"), projection="none")
        inputs = base.get_input_embeddings()(ids).requires_grad_()
        step = {"inputs_embeds": inputs, "labels": ids, "use_cache": False}
        kept = [count_saved_bytes(each, partial(each.train(), **step)) for each in (model, base)]
        more.append(kept[0] - kept[1])
    assert more[0] == more[1] == more[2] < 10_000


@pytest.mark.parametrize(
    ("change", "kwargs"),
    [
        ({"value": draw(1, 2, 9, 4)}, {}),
        ({"attention_mask": draw(1, 1, 1, 9).requires_grad_()}, {}),
        # Rows of queries and of keys may share each other; the kernel divides by the numbers of both.
        ({"query": draw(3, 4, 1, 8), "key": draw(1, 2, 9, 8)}, {}),
        ({"query": draw(1, 4, 1, 8), "key": draw(3, 2, 9, 8), "value": draw(3, 2, 9, 8)}, {}),
        ({"query": draw(1, 4, 0, 8)}, {}),
        ({"key": draw(1, 2, 0, 8), "value": draw(1, 2, 0, 8)}, {}),
        ({"attend": lambda *args, **kwargs: None}, {}),
        ({}, {"dropout": 0.1}),
        ({}, {"position_bias": draw(1, 1, 1, 9)}),
        ({}, {"cache": object()}),
        ({"key": draw(1, 2, 8, 9).transpose(-1, -2)}, {}),
        ({"query": draw(1, 4, 1, 16)[..., ::2]}, {}),
        ({"value": draw(1, 2, 9, 8, dtype=torch.bfloat16)}, {}),
        ({"prefix": PrefixStates(draw(1, 2, 3, 8), draw(1, 2, 3, 8), bias=draw(1, 2, 1, 3))}, {}),
    ],
)
def test_what_is_unusual_is_attended_to_at_once(change, kwargs):
    prefix = PrefixStates(draw(1, 2, 3, 8), draw(1, 2, 3, 8))
    usual = {"attend": sdpa_attention_forward, "query": draw(1, 4, 1, 8), "key": draw(1, 2, 9, 8)}
    usual |= {"value": draw(1, 2, 9, 8), "attention_mask": None, "prefix": prefix}
    assert can_merge(**usual, kwargs={"scaling": 0.3, "dropout": 0.0, "sliding_window": None})
    assert can_merge(**usual, kwargs={"num_items_in_batch": torch.tensor(3)}), "the Trainer passes it"
    assert not can_merge(**(usual | change), kwargs=kwargs)


def test_a_choice_of_another_kernel_is_respected():
    prefix = PrefixStates(draw(1, 2, 3, 8), draw(1, 2, 3, 8))
    usual = (sdpa_attention_forward, draw(1, 4, 1, 8), draw(1, 2, 9, 8), draw(1, 2, 9, 8), None, prefix, {})
    with sdpa_kernel(SDPBackend.MATH):
        assert not can_merge(*usual)
    assert can_merge(*usual)


def test_under_autocast_both_parts_are_in_its_dtype(monkeypatch):
    """Rotary models hand over queries and keys in float32 there, and values in half precision."""
    model, ids = add_prefix(build_model("llama")).train(), draw_tokens()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    perturb(model)

    def differentiate() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        return loss, *torch.autograd.grad(loss, parameters)

    dtypes = set()

    def attend(*args):
        dtypes.update(item.dtype for item in args[:3])
        return attend_by_parts(*args)

    monkeypatch.setattr(dense, "attend_by_parts", attend)
    by_parts = differentiate()
    assert dtypes == {torch.bfloat16}
    monkeypatch.setattr(dense, "can_merge", lambda *args: False)
    assert_close(by_parts, differentiate(), atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize("projection", ["none", "linear"])
def test_second_derivatives_are_refused_and_never_left_out(projection):
    model, ids = add_prefix(build_model("llama"), projection=projection).train(), draw_tokens()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(model(ids, labels=ids).loss, parameters, create_graph=True)
    size = sum(gradient.square().sum() for gradient in gradients)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        torch.autograd.grad(size, parameters, allow_unused=True)


def test_a_padded_row_without_a_prefix_has_the_loss_and_the_gradients_of_the_base_model():
    model = add_prefix(build_model("llama"))
    ids, mask = draw_tokens(length=9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    # Also where a query of the padding sees nothing at all: its output reaches the first token's loss.
    inputs = model.get_input_embeddings()(ids).detach()
    results = []
    for settings in ({"adapter_names": ["__base__", "default"]}, {}):
        rows = slice(None) if settings else slice(1)
        given = inputs[rows].clone().requires_grad_()
        with model.disable_adapter() if not settings else nullcontext():
            logits = model(inputs_embeds=given, attention_mask=mask[rows], **settings).logits[:1]
        loss = cross_entropy(logits[0, :-1], ids[0, 1:])
        results.append((logits, loss, torch.autograd.grad(loss, given)[0][:1]))
    for mixed, alone in zip(*results, strict=True):
        assert_close(mixed, alone, atol=1e-5, rtol=1e-4)


def test_batches_of_gradients_equal_single_ones():
    query, key, value = draw(BATCH, HEADS, TOKENS, DIM), *(draw(BATCH, KV_HEADS, TOKENS, DIM) for _ in range(2))
    prefix = build_prefix("shared", torch.float32)
    inputs = prefix.keys.requires_grad_(), prefix.values.requires_grad_()
    output = attend_by_parts(query, key, value, None, match_prefix(prefix, key, value), True, 0.4)
    arriving = torch.randn(2, *output.shape)
    together = torch.autograd.grad(output, inputs, arriving, retain_graph=True, is_grads_batched=True)
    for number, single in enumerate(arriving):
        alone = torch.autograd.grad(output, inputs, single, retain_graph=True)
        assert_close([own[number] for own in together], list(alone), atol=1e-5, rtol=1e-5)


def test_transforms_of_functions_go_through_attention_at_once():
    model, ids = add_prefix(build_model("llama")), draw_tokens()
    inputs = model.get_input_embeddings()(ids).detach()

    def compute_loss(rows: Tensor) -> Tensor:
        return model(inputs_embeds=rows).logits.square().mean()

    (expected,) = torch.autograd.grad(compute_loss(inputs.requires_grad_()), inputs)
    assert_close(torch.func.grad(compute_loss)(inputs.detach()), expected, atol=1e-5, rtol=1e-4)


def count_computations(model: torch.nn.Module, run) -> set[int]:
    """How often each layer computes its prefix."""
    counts: dict[str, int] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, PrefixPlusLayer):
            counts[name] = 0

            def count(*_, name=name) -> None:
                counts[name] += 1

            handles.append(layer.get_encoder("default").register_forward_hook(count))
    run()
    for handle in handles:
        handle.remove()
    return set(counts.values())


def test_generation_computes_the_prefix_once_and_the_next_one_again():
    model, ids = add_prefix(build_model("llama")), draw_tokens()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "input_ids": ids}
    assert count_computations(model, lambda: model.generate(**settings)) == {1}
    before = model.generate(**settings).logits[0]
    perturb(model)
    after = model.generate(**settings).logits[0]
    assert not torch.allclose(before, after, atol=1e-2)
    assert_close(after, model(ids).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_what_trains_is_computed_in_every_forward():
    model, ids = add_prefix(build_model("llama"), prefix_dropout=0.5).train(), draw_tokens()
    assert count_computations(model, lambda: [model(ids) for _ in range(3)]) == {3}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "input_ids": ids}
    assert count_computations(model, lambda: model.generate(**settings)) == {4}
