"""Prefixes of attention modules that compute attention by themselves, against prompts, shorter prefixes and sums."""

import math

import pytest
import torch
from helpers import INIT_TOKEN_IDS, add_prefix, named_prefix_parameters, pad_rows, perturb
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close
from transformers import PreTrainedModel
from zoo_models import build_zoo_model, draw_text

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer, PrefixStates, capture_prefix_states
from peft_prefix_plus.architectures import find_attention_modules, takes_argument, uses_attention_interface
from peft_prefix_plus.attention import attend_with_prefix, record_states

P = len(INIT_TOKEN_IDS)
TOLERANCE = {"atol": 2e-5, "rtol": 2e-4}
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 16,
    "position_biased_input": False,
}
DECODERS = {
    "bloom": ("bloom", None, {}),
    "bloom-of-3-heads": ("bloom", None, {"n_head": 3, "hidden_size": 24}),
    "mpt": ("mpt", None, {}),
    "mpt-of-3-heads": ("mpt", None, {"n_heads": 3, "d_model": 24}),
    "falcon-rotary-eager": ("falcon", "eager", {}),
    "falcon-rotary-sdpa": ("falcon", "sdpa", {}),
    "falcon-alibi-eager": ("falcon", "eager", {"alibi": True}),
    "falcon-alibi-sdpa": ("falcon", "sdpa", {"alibi": True}),
    "falcon-grouped-eager": ("falcon", "eager", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-grouped-sdpa": ("falcon", "sdpa", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gptj": ("gptj", None, {}),
    "gpt_neo": ("gpt_neo", None, {}),
    "openai-gpt": ("openai-gpt", None, {}),
    "xlm": ("xlm", None, {}),
    "codegen": ("codegen", None, {}),
}
# Their tokens see both sides, so a prefix is no prompt.
ENCODERS = {
    "xlnet": ("causal", "xlnet", {}),
    "deberta": ("encoder", "deberta", RELATIVE),
    "deberta-v2": ("encoder", "deberta-v2", RELATIVE),
    "deberta-v2-absolute": ("encoder", "deberta-v2", {}),
}
NAMES = [*DECODERS, *ENCODERS]
POSITION_TABLES = ("gpt_neo", "openai-gpt", "xlm", "deberta-v2-absolute")
# Falcon's biases have no columns for empty places.
WITHOUT_STATIC_CACHE = ("falcon-alibi-eager", "falcon-alibi-sdpa")
decoders = pytest.mark.parametrize("name", DECODERS)
everyone = pytest.mark.parametrize("name", NAMES)


def build(name: str) -> PreTrainedModel:
    if name in ENCODERS:
        group, model_type, settings = ENCODERS[name]
        model = build_zoo_model(group, model_type, **settings)
    else:
        model_type, implementation, settings = DECODERS[name]
        model = build_zoo_model("causal", model_type, implementation, **settings)
        assert implementation in (None, model.config._attn_implementation)
    assert not any(uses_attention_interface(module) for module in find_attention_modules(model).values())
    return model


def build_prefixed(name: str, **settings: object) -> PeftModel:
    if name in DECODERS:
        return add_prefix(build(name), **settings)
    return get_peft_model(build(name), PrefixPlusConfig(prefix_init_token_ids=INIT_TOKEN_IDS, **settings)).eval()


def prefix_layers(model: nn.Module) -> list[PrefixPlusLayer]:
    return [module for module in model.modules() if isinstance(module, PrefixPlusLayer)]


def compute_logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Positions are named where a model takes them: those of the padding do not count."""
    given = {} if mask is None else {"attention_mask": mask}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if mask is not None and takes_argument(base, "position_ids"):
        given["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, **given).logits


@pytest.mark.parametrize(
    ("name", "lengths"),
    # A causal XLM does not hide padding.
    [
        (name, lengths)
        for name in DECODERS
        for lengths in ([7, 7], [7, 4], [1, 1])
        if name != "xlm" or lengths != [7, 4]
    ],
    ids=str,
)
def test_a_captured_prefix_equals_the_prompt(name, lengths):
    base, rows, prompt = build(name), draw_text(), torch.tensor([INIT_TOKEN_IDS])
    expected = [
        compute_logits(base, torch.cat([prompt, row[None, :length]], dim=1))[0, P:]
        for row, length in zip(rows, lengths, strict=True)
    ]
    ids, mask = pad_rows(rows[:, : max(lengths)], lengths, "left")
    logits = compute_logits(build_prefixed(name), ids, mask)
    for i in range(2):
        assert_close(logits[i][mask[i].bool()], expected[i], **TOLERANCE)


@everyone
@pytest.mark.parametrize("length", [1, 2, 4])
def test_padding_changes_nothing(name, length):
    model, rows = build_prefixed(name), draw_text()
    perturb(model)
    ids, mask = pad_rows(rows, [7, length], "right")
    assert_close(
        compute_logits(model, ids, mask)[1, :length], compute_logits(model, rows[1:, :length])[0], **TOLERANCE
    )


class Hide(nn.Module):
    """In the place of dropout: hides the first virtual tokens, another number in every row."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.counts = torch.tensor(counts)

    def forward(self, states: PrefixStates, batch_size: int) -> PrefixStates:
        positions = torch.arange(states.num_virtual_tokens)
        return states._replace(mask=positions >= self.counts[:, None])


class Cut(Hide):
    """In the place of dropout: takes the first virtual tokens away."""

    def forward(self, states: PrefixStates, batch_size: int) -> PrefixStates:
        (count,) = self.counts.tolist()
        return PrefixStates(states.keys[..., count:, :], states.values[..., count:, :])


def compute_with_dropout(model: PeftModel, dropout: nn.Module, ids: Tensor) -> Tensor:
    for layer in prefix_layers(model):
        layer.prefix_plus_dropout["default"] = dropout
    return compute_logits(model, ids)


@everyone
def test_a_hidden_virtual_token_has_no_influence(name):
    model, ids = build_prefixed(name), draw_text()
    perturb(model)
    logits = compute_with_dropout(model, Hide(2, 3), ids)
    for i, count in enumerate((2, 3)):
        assert_close(logits[i], compute_with_dropout(model, Cut(count), ids)[i], **TOLERANCE)
    assert_close(compute_with_dropout(model, Hide(2), ids), compute_with_dropout(model, Cut(2), ids), **TOLERANCE)
    assert not torch.allclose(logits, compute_with_dropout(model, Cut(0), ids), atol=1e-3)


# Without a table of positions, where the input stands behind the prefix.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in POSITION_TABLES])
def test_a_prefix_that_is_hidden_altogether_leaves_the_base_model(name):
    model, ids = build_prefixed(name), draw_text()
    perturb(model)
    assert_close(compute_with_dropout(model, Hide(P, P), ids), compute_logits(build(name), ids), **TOLERANCE)


@everyone
def test_without_an_active_prefix_the_model_is_the_base_model(name):
    base, ids = build(name), draw_text()
    expected, modules = compute_logits(base, ids), dict(base.named_modules())
    model = build_prefixed(name)
    assert not torch.allclose(compute_logits(model, ids), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(compute_logits(model, ids), expected)
    assert dict(model.unload().named_modules()).keys() == modules.keys()
    assert torch.equal(compute_logits(model.unload(), ids), expected)


@everyone
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_reach_all_prefix_parameters_and_nothing_else(name, dropout):
    model, ids = build_prefixed(name, prefix_dropout=dropout), draw_text()
    perturb(model)
    model.train()(ids).logits.square().mean().backward()
    prefix = named_prefix_parameters(model)
    assert len(prefix) >= len(prefix_layers(model)) > 0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in prefix:
            assert bool(parameter.grad.abs().sum() > 0), parameter_name
        else:
            assert parameter.grad is None, parameter_name


@pytest.mark.parametrize("name", ["bloom", "falcon-rotary-sdpa", "gpt_neo", "deberta-v2"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build_prefixed(name, prefix_dropout=0.4)
        perturb(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model.train()(draw_text()).logits.square().mean().backward()
        gradients.append({key: value.grad for key, value in named_prefix_parameters(model).items()})
    for key, gradient in gradients[0].items():
        assert_close(gradients[1][key], gradient, msg=key)


# Where sdpa is asked for weights, Falcon itself adds a mask of booleans to the scores.
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("sdpa")])
def test_weights_are_those_of_the_tokens_alone(name):
    model, ids = build_prefixed(name), draw_text()
    plain = compute_logits(model, ids)
    output = model(ids, output_attentions=True)
    assert_close(output.logits, plain, **TOLERANCE)
    assert len(output.attentions) == len(prefix_layers(model))
    for weights in output.attentions:
        assert weights.shape[-2:] == (7, 7)
        sums = weights.sum(dim=-1)
        assert bool((sums < 1).all()) and bool((sums > 0).any())


CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 2}}


@pytest.mark.parametrize(
    ("name", "cache"),
    [(name, cache) for name in DECODERS for cache in CACHES if cache != "static" or name not in WITHOUT_STATIC_CACHE],
)
@pytest.mark.parametrize("lengths", [[7, 7], [7, 4]], ids=["even", "padded"])
def test_cached_generation_equals_recomputation(name, cache, lengths):
    settings = CACHES[cache]
    model = build_prefixed(name)
    perturb(model)
    ids, mask = pad_rows(draw_text(), lengths, "left")
    common = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    expected = model.generate(**common, num_beams=settings.get("num_beams", 1), use_cache=False)
    assert expected.shape == (2, 15)
    assert torch.equal(model.generate(**common, **settings), expected)


@pytest.mark.parametrize("name", ["bloom", "falcon-rotary-eager", "gpt_neo", "mpt", "xlm"])
def test_half_precision_equals_the_prompt_up_to_rounding(name):
    base, ids, prompt = build(name).bfloat16(), draw_text(), torch.tensor(INIT_TOKEN_IDS).expand(2, -1)
    expected = compute_logits(base, torch.cat([prompt, ids], dim=1))[:, P:]
    logits = compute_logits(add_prefix(base), ids)
    assert logits.dtype == torch.bfloat16
    assert_close(logits, expected, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("name", ["bloom", "gptj", "xlnet"])
def test_saved_and_folded_adapters_equal_the_trained_one(name, tmp_path):
    model, ids = build_prefixed(name), draw_text()
    perturb(model)
    expected = compute_logits(model, ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(compute_logits(PeftModel.from_pretrained(build(name), tmp_path), ids), expected)
    model.fold_prefix()
    assert torch.equal(compute_logits(model, ids), expected)


def test_two_adapters_stand_one_behind_the_other():
    ids = draw_text()
    model = add_prefix(build("bloom"), prefix_init_token_ids=INIT_TOKEN_IDS[:2])
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init="zero", num_virtual_tokens=3))
    model.base_model.set_adapter(["default", "other"])
    states = prefix_layers(model)[0].get_prefix_states(["default", "other"], 1)
    assert states.num_virtual_tokens == P
    expected = add_prefix(build("bloom"), prefix_init_token_ids=INIT_TOKEN_IDS)
    for layer, twin in zip(prefix_layers(model), prefix_layers(expected), strict=True):
        own = twin.get_encoder("default")
        own.anchor_keys, own.anchor_values = (part[0] for part in layer.get_prefix_states(["default", "other"], 1)[:2])
    assert_close(model.base_model(ids).logits, expected(ids).logits, **TOLERANCE)


# What a module may do between the products, and what becomes of its scores: additive masks are lists of tokens.

SCORES = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "operator": lambda q, k: q @ k.transpose(-1, -2),
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "einsum-of-a-list": lambda q, k: torch.einsum("bhqd, bhkd -> bhqk", [q, k]),
    "einsum-with-heads-behind": lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)),
    "einsum-with-an-ellipsis": lambda q, k: torch.einsum("...qd,...kd->...qk", q, k),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(*q.shape[:2], -1, k.shape[2]),
    "baddbmm": lambda q, k: torch.baddbmm(
        torch.zeros(q.shape[0] * q.shape[1], 1, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
    ).unflatten(0, q.shape[:2]),
    "scaled-queries": lambda q, k: torch.matmul(q / 2, k.transpose(-1, -2)) * 2,
}
STEPS = {
    "nothing": lambda scores: scores,
    "in-place": lambda scores: scores.div_(1.0).mul_(torch.tensor(1.0)),
    "operator-from-the-left": lambda scores: 1.0 * scores,
    "named-operand": lambda scores: torch.mul(input=scores, other=1.0),
    "open-bound": lambda scores: torch.clamp(scores, None, 1e4),
    "factor-per-head": lambda scores: scores * torch.ones(2, 1, 1),
    "same-shape": lambda scores: scores.view(*scores.shape).reshape(scores.shape),
    "heads-in-the-batch": lambda scores: scores.flatten(0, 1).view(scores.shape),
    "double": lambda scores: scores.double(),
    "contiguous": lambda scores: scores.contiguous().clone(),
}
MASKS = {
    "added": lambda scores, visible: scores + torch.where(visible, 0.0, -1e9),
    "added-in-place": lambda scores, visible: scores.add_(torch.where(visible, 0.0, -1e9)),
    "filled": lambda scores, visible: scores.masked_fill(~visible, torch.finfo(scores.dtype).min),
    "filled-in-place": lambda scores, visible: scores.masked_fill_(~visible.expand_as(scores), -1e9),
    "chosen": lambda scores, visible: torch.where(visible, scores, torch.tensor(-1e9, dtype=scores.dtype)),
}


class OwnAttention(nn.Module):
    """Attention of two heads without projections, put together from the above."""

    def __init__(self, scores="matmul", step="nothing", mask="added", softmax=F.softmax) -> None:
        super().__init__()
        self.scores, self.step, self.mask = SCORES[scores], STEPS[step], MASKS[mask]
        self.softmax = softmax
        self.dropout = nn.Dropout(0.0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.mask(self.step(self.scores(query, key) / math.sqrt(query.shape[-1])), visible)
        weights = self.dropout(self.softmax(scores, dim=-1).to(value.dtype))
        return torch.matmul(weights, value), weights


def draw_problem(num_keys: int = 4) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], PrefixStates]:
    generator = torch.Generator().manual_seed(num_keys)
    query, key, value = (
        torch.randn(2, 2, n, d, generator=generator) for n, d in ((3, 4), (num_keys, 4), (num_keys, 5))
    )
    visible = torch.rand(2, 1, 3, num_keys, generator=generator) < 0.6
    prefix = PrefixStates(*(torch.randn(1, 2, P, d, generator=generator) for d in (4, 5)))
    return (query, key, value, visible), prefix


HIDING = torch.tensor([[True, False, True, True, True], [False, True, True, True, False]])


def attend_to_both(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, prefix: PrefixStates):
    """Attention to a prefix in front of the keys, as it stands in the books."""
    keys, values = (
        torch.cat([part.expand(2, -1, -1, -1), own], dim=2) for part, own in zip(prefix[:2], (key, value), strict=True)
    )
    scores = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
    shown = torch.ones(2, P, dtype=torch.bool) if prefix.mask is None else prefix.mask
    visible = torch.cat([shown[:, None, None].expand(-1, -1, visible.shape[2], -1), visible], dim=-1)
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return weights @ values, weights[..., P:]


@pytest.mark.parametrize(
    "settings",
    [*({"scores": s} for s in SCORES), *({"step": s} for s in STEPS), *({"mask": s} for s in MASKS)],
    ids=lambda settings: next(iter(settings.values())),
)
@pytest.mark.parametrize("num_keys", [4, 1])
@pytest.mark.parametrize("mask", [None, HIDING, HIDING[:1]], ids=["whole", "masked-by-row", "masked"])
def test_what_a_module_does_to_its_scores_is_done_to_those_of_the_prefix(settings, num_keys, mask):
    problem, prefix = draw_problem(num_keys)
    prefix = prefix._replace(mask=None if mask is None else mask.expand(2, -1))
    output, weights = attend_with_prefix(OwnAttention(**settings), prefix, *problem)
    expected_output, expected_weights = attend_to_both(*problem, prefix)
    assert_close(output, expected_output, atol=1e-5, rtol=1e-4)
    assert_close(weights, expected_weights, atol=1e-5, rtol=1e-4)


class FlatAttention(nn.Module):
    """The same with batch and heads on one axis, up to the end."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~visible.expand(-1, query.shape[1], -1, -1).flatten(0, 1), -1e9)
        weights = F.softmax(scores, dim=-1)
        output = torch.bmm(weights, value.flatten(0, 1))
        return output.unflatten(0, query.shape[:2]), weights.unflatten(0, query.shape[:2])


@pytest.mark.parametrize("num_keys", [4, 1])
@pytest.mark.parametrize("mask", [None, HIDING], ids=["whole", "masked-by-row"])
def test_heads_may_stand_in_the_batch(num_keys, mask):
    problem, prefix = draw_problem(num_keys)
    prefix = prefix._replace(mask=mask)
    output, weights = attend_with_prefix(FlatAttention(), prefix, *problem)
    expected_output, expected_weights = attend_to_both(*problem, prefix)
    assert_close(output, expected_output, atol=1e-5, rtol=1e-4)
    assert_close(weights, expected_weights, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in SCORES if name != "scaled-queries"])
def test_what_is_recorded_are_the_keys_and_values_of_the_products(name):
    (query, key, value, visible), _ = draw_problem()
    module = OwnAttention(scores=name)
    with record_states([module]) as recorder:
        output, _ = module(query[:1], key[:1], value[:1], visible[:1])
    states = recorder.get_states()[module]
    assert torch.equal(states.keys, key[:1]) and torch.equal(states.values, value[:1])
    assert torch.equal(output, module(query[:1], key[:1], value[:1], visible[:1])[0])


@pytest.mark.parametrize(
    "softmax",
    [
        lambda scores, dim: F.softmax(scores.sort(dim=dim).values, dim=dim),
        lambda scores, dim: F.softmax(scores[..., :2], dim=dim),
        lambda scores, dim: F.softmax(scores.transpose(1, 2), dim=dim).transpose(1, 2),
        lambda scores, dim: F.softmax(scores, dim=-2),
    ],
    ids=["sorted", "sliced", "transposed", "over-queries"],
)
def test_a_softmax_that_cannot_be_followed_raises(softmax):
    (query, key, value, visible), prefix = draw_problem()
    module = OwnAttention(softmax=softmax)
    with pytest.raises(
        ValueError, match=r"OwnAttention takes a softmax that PrefixPlus cannot follow.*exclude_modules"
    ):
        attend_with_prefix(module, prefix, query, key, value[:, :, : 2 if "sliced" in str(softmax) else 4], visible)


def test_softmaxes_that_are_not_of_attention_are_let_through():
    class Routed(OwnAttention):
        def forward(self, query, key, value, visible):
            gates = F.softmax(query.mean(dim=(1, 2)), dim=-1)
            mixture = torch.softmax(torch.randn(2, 2, 3, 1), dim=1)
            output, weights = super().forward(query, key, value, visible)
            return output * gates.sum(dim=-1)[:, None, None, None] * mixture.sum(dim=1, keepdim=True), weights

    problem, prefix = draw_problem()
    output, _ = attend_with_prefix(Routed(), prefix, *problem)
    assert_close(output, attend_to_both(*problem, prefix)[0], atol=1e-5, rtol=1e-4)


def test_a_module_that_takes_no_softmax_raises():
    problem, prefix = draw_problem()
    module = OwnAttention(softmax=lambda scores, dim: scores.relu())
    with pytest.raises(RuntimeError, match=r"OwnAttention computed its output without the prefix.*exclude_modules"):
        attend_with_prefix(module, prefix, *problem)


def test_the_mode_is_left_again_after_an_error():
    problem, prefix = draw_problem()
    module = OwnAttention(softmax=lambda scores, dim: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attend_with_prefix(module, prefix, *problem)
    assert not _get_current_function_mode_stack()
    with pytest.raises(ZeroDivisionError), record_states([module]):
        module(*problem)
    assert not _get_current_function_mode_stack() and not module._forward_pre_hooks and not module._forward_hooks
    module.softmax = F.softmax
    assert_close(module(*problem)[1].sum(dim=-1), torch.ones(2, 2, 3))


def test_an_error_inside_a_model_leaves_no_prefix_behind():
    model, ids = build_prefixed("bloom"), draw_text()
    expected = compute_logits(model, ids)
    attention = model.get_base_model().transformer.h[1].self_attention.base_layer
    handle = attention.dense.register_forward_pre_hook(lambda *args: 1 / 0)
    for run in (lambda: model(ids), lambda: capture_prefix_states(model, INIT_TOKEN_IDS)):
        with pytest.raises(ZeroDivisionError):
            run()
        assert not _get_current_function_mode_stack()
    handle.remove()
    assert not attention._forward_pre_hooks and not attention._forward_hooks
    assert torch.equal(compute_logits(model, ids), expected)
