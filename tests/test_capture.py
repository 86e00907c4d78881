"""Keys and values of real tokens: equal to the model's own cache, without a trace left behind."""

import copy

import pytest
import torch
from helpers import INIT_TOKEN_IDS, add_prefix, draw_tokens, perturb
from peft import PeftModel, inject_adapter_in_model
from tiny_models import ARCHITECTURES, MAX_POSITIONS, VOCAB_SIZE, build_model
from torch.testing import assert_close
from transformers import DynamicCache
from zoo_models import build_zoo_model

from peft_prefix_plus import PrefixPlusConfig, PrefixStates, capture_prefix_states
from peft_prefix_plus.architectures import find_attention_modules, is_cross_attention
from peft_prefix_plus.capture import capture_noise_states

IDS = [11, 23, 5, 42, 7]
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def assert_equal_states(one: dict[str, PrefixStates], other: dict[str, PrefixStates]) -> None:
    assert list(one) == list(other)
    for name, states in one.items():
        assert torch.equal(states.keys, other[name].keys), name
        assert torch.equal(states.values, other[name].values), name


@architectures
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_capture_equals_the_models_own_cache(name, implementation):
    model = build_model(name, implementation)
    # Positions that the captured tokens stand at: the first ones of a table, or those before 0.
    start = 0 if ARCHITECTURES[name].learned_positions else -len(IDS)
    positions = torch.arange(start, start + len(IDS))[None]
    with torch.no_grad():
        cache = model(torch.tensor([IDS]), position_ids=positions, past_key_values=DynamicCache()).past_key_values
    captured = capture_prefix_states(model, IDS)
    assert list(captured) == list(find_attention_modules(model))
    for states, layer in zip(captured.values(), cache.layers, strict=True):
        assert_close(states.keys, layer.keys, atol=1e-6, rtol=1e-5)
        assert_close(states.values, layer.values, atol=1e-6, rtol=1e-5)
        assert states.mask is None and not states.keys.requires_grad


def test_learned_positions_need_no_position_ids():
    model = build_model("gpt2")
    with torch.no_grad():
        cache = model(torch.tensor([IDS]), use_cache=True).past_key_values
    for states, layer in zip(capture_prefix_states(model, IDS).values(), cache.layers, strict=True):
        assert torch.equal(states.keys, layer.keys) and torch.equal(states.values, layer.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_have_the_models_dtype(dtype):
    for states in capture_prefix_states(build_model("llama", dtype=dtype), IDS).values():
        assert states.keys.dtype == states.values.dtype == dtype


@pytest.mark.parametrize("ids", [IDS, torch.tensor(IDS), torch.tensor([IDS]), torch.tensor(IDS, dtype=torch.int32)])
def test_lists_and_tensors_are_equal(ids):
    model = build_model("llama")
    assert_equal_states(capture_prefix_states(model, ids), capture_prefix_states(model, IDS))


@pytest.mark.parametrize("ids", [torch.tensor([IDS, IDS]), [IDS, IDS], torch.tensor([1.5, 2.0])], ids=str)
def test_batches_and_fractions_are_refused(ids):
    with pytest.raises(ValueError):
        capture_prefix_states(build_model("llama"), ids)


@pytest.mark.parametrize("ids", [[], torch.tensor([]), torch.empty(1, 0, dtype=torch.long)], ids=str)
def test_no_tokens_raise(ids):
    with pytest.raises(ValueError, match=r"no tokens to capture; give at least one"):
        capture_prefix_states(build_model("llama"), ids)


@pytest.mark.parametrize("wrong", [VOCAB_SIZE, 10_000, -1])
def test_ids_outside_the_vocabulary_raise(wrong):
    with pytest.raises(ValueError, match=rf"{VOCAB_SIZE} token embeddings.*\[{wrong}\].*another tokenizer"):
        capture_prefix_states(build_model("llama"), [3, wrong, VOCAB_SIZE - 1])


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("num_tokens", [MAX_POSITIONS, MAX_POSITIONS + 1])
def test_more_tokens_than_learned_positions_raise(name, num_tokens):
    with pytest.raises(ValueError, match=rf"{num_tokens} tokens.*only {MAX_POSITIONS} absolute.*num_virtual_tokens"):
        capture_prefix_states(build_model(name), [5] * num_tokens)
    capture_prefix_states(build_model(name), [5] * (MAX_POSITIONS - 1))


def test_meta_device_raises():
    with pytest.raises(ValueError, match=r"meta device.*from_pretrained"):
        capture_prefix_states(build_model("llama").to("meta"), IDS)


@pytest.mark.parametrize("ids", [IDS, [10_000]], ids=["captured", "refused"])
def test_the_mode_of_every_module_is_restored(ids):
    model = build_model("gpt2").train()
    model.transformer.h[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    try:
        capture_prefix_states(model, ids)
    except ValueError:
        assert ids == [10_000]
    assert {name: module.training for name, module in model.named_modules()} == before


def test_training_mode_does_not_reach_the_capture():
    model = build_model("gpt2")
    expected = capture_prefix_states(model, IDS)
    assert model.config.attn_pdrop > 0
    assert_equal_states(capture_prefix_states(model.train(), IDS), expected)


@architectures
@pytest.mark.parametrize("wrapped", ["peft-model", "tuner", "base"])
def test_active_prefixes_are_left_out_and_left_alone(name, wrapped):
    base = build_model(name)
    expected, ids = capture_prefix_states(base, IDS), draw_tokens()
    model = add_prefix(base, prefix_dropout=0.5)
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    perturb(model)
    model.base_model.set_adapter(["default", "other"])
    logits = model.base_model(ids).logits
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    configs = [module.config for module in find_attention_modules(base).values()]
    captured = capture_prefix_states({"peft-model": model, "tuner": model.base_model, "base": base}[wrapped], IDS)
    assert_equal_states(captured, expected)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert [module.config for module in find_attention_modules(base).values()] == configs
    assert torch.equal(model.base_model(ids).logits, logits)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"modules_to_save": ["embed_tokens"]}, {}),
        ({"modules_to_save": ["input_layernorm"]}, {}),
        ({"trainable_token_indices": [IDS[0]]}, {"trainable_token_indices": [1]}),
    ],
    ids=str,
)
def test_what_was_trained_beside_a_prefix_is_left_out(first, second):
    expected = add_prefix(build_model("llama"))(draw_tokens()).logits
    model = add_prefix(build_model("llama"), prefix_init_token_ids=[3, 4], **first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * parameter.requires_grad
    trained = model(draw_tokens()).logits
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=INIT_TOKEN_IDS, **second)
    model.add_adapter("other", config)
    assert torch.equal(model(draw_tokens()).logits, trained)
    model.set_adapter("other")
    assert_close(model.eval()(draw_tokens()).logits, expected)


def test_disabled_prefixes_stay_disabled():
    model, ids = add_prefix(build_model("llama")), draw_tokens()
    with model.disable_adapter():
        expected = model(ids).logits
        capture_prefix_states(model, IDS)
        assert torch.equal(model(ids).logits, expected)


def test_a_failing_forward_leaves_the_model_as_it_was():
    model, ids = add_prefix(build_model("llama")).train(), draw_tokens()
    expected = model(ids).logits
    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture_prefix_states(model, IDS)
    hook.remove()
    assert model.get_base_model().model.layers[1].training
    assert torch.equal(model(ids).logits, expected)


def test_weights_and_random_state_are_untouched():
    model = build_model("gpt2").train()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    capture_prefix_states(model, IDS)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_models_with_injected_adapters_are_captured_bare():
    base = build_model("llama")
    expected = capture_prefix_states(base, IDS)
    model = inject_adapter_in_model(PrefixPlusConfig(num_virtual_tokens=3), base)
    assert not isinstance(model, PeftModel)
    assert_equal_states(capture_prefix_states(model, IDS), expected)


@pytest.mark.parametrize(
    ("model_type", "starts_at_zero"),
    [("diffllama", False), ("falcon", False), ("gptj", True), ("ctrl", True), ("ministral3", True), ("gpt_neo", True)],
)
def test_tokens_stand_before_zero_only_where_distances_are_all_that_counts(model_type, starts_at_zero):
    model = build_zoo_model("causal", model_type)
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    captured = capture_prefix_states(model, IDS)
    (positions,) = seen
    if starts_at_zero:
        assert positions is None
    else:
        assert positions.tolist() == [[-5, -4, -3, -2, -1]]
    assert list(captured) == list(find_attention_modules(model))
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "falcon", "gptj", "gpt_neo", "codegen"])
def test_capture_without_the_interface_equals_the_models_own_cache(model_type):
    model = build_zoo_model("causal", model_type)
    positions = {"position_ids": torch.arange(-len(IDS), 0)[None]} if model_type == "falcon" else {}
    with torch.no_grad():
        cache = model(torch.tensor([IDS]), **positions, use_cache=True).past_key_values
    for states, layer in zip(capture_prefix_states(model, IDS).values(), cache.layers, strict=True):
        assert_close(states.keys, layer.keys, atol=1e-6, rtol=1e-5)
        assert_close(states.values, layer.values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_an_encoder_decoder_is_captured_with_the_tokens_on_both_sides(model_type):
    model = build_zoo_model("seq2seq", model_type)
    captured = capture_prefix_states(model, IDS)
    assert list(captured) == list(find_attention_modules(model))
    with torch.no_grad():
        cache = model(torch.tensor([IDS]), decoder_input_ids=torch.tensor([IDS]), use_cache=True).past_key_values
    own = [states for name, states in captured.items() if "decoder." in name and not is_cross_attention(name)]
    crossing = [states for name, states in captured.items() if is_cross_attention(name)]
    for recorded, layers in ((own, cache.self_attention_cache), (crossing, cache.cross_attention_cache)):
        for states, layer in zip(recorded, layers.layers, strict=True):
            assert torch.equal(states.keys, layer.keys) and torch.equal(states.values, layer.values)


@pytest.mark.parametrize("model_type", ["vit", "clip_vision_model"])
def test_noise_reaches_every_module_of_a_vision_model_and_depends_on_the_seed(model_type):
    model = build_zoo_model("vision", model_type).train()
    one, again, other = (capture_noise_states(model, seed) for seed in (0, 0, 1))
    assert list(one) == list(find_attention_modules(model))
    assert_equal_states(one, again)
    assert all(not torch.equal(states.keys, other[name].keys) for name, states in one.items())
    # Sixteen patches and the token of the class.
    assert {states.keys.shape[-2] for states in one.values()} == {17}
    assert model.training
