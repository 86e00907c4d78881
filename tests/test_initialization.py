"""Where a prefix starts: the five initialisations, and the text on its way to tokens."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from helpers import draw_tokens
from peft import PeftModel, get_peft_model
from tiny_models import VOCAB_SIZE, build_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer, capture_prefix_states
from peft_prefix_plus.architectures import AttentionGeometry, find_attention_modules, read_geometry
from peft_prefix_plus.config import DEFAULT_NUM_VIRTUAL_TOKENS, PREFIX_INITS
from peft_prefix_plus.initialization import (
    VALUE_STEPS,
    build_initial_states,
    capture_states,
    fit_token_ids,
    resolve_init_token_ids,
    resolve_prefix_length,
    sample_vocabulary,
)

WORDS = ["<unk>", "<s>", "summarize", "the", "text", "for", "a", "child"]
TEXT, TEXT_IDS = "summarize the text", [2, 3, 4]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> str:
    """A tokenizer of whole words that puts `<s>` (1) in front when it may."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def build_prefix(model: PreTrainedModel, **settings) -> PeftModel:
    return get_peft_model(model, PrefixPlusConfig(task_type="CAUSAL_LM", **settings)).eval()


def get_layers(model: PeftModel) -> dict[str, PrefixPlusLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PrefixPlusLayer)
    }


def assert_prefix_is(model: PeftModel, token_ids: list[int]) -> None:
    """The keys and values are those of these tokens, bit for bit."""
    captured = capture_prefix_states(model, token_ids)
    layers = get_layers(model)
    assert layers
    for name, layer in layers.items():
        states = layer.get_prefix_states(["default"], 1)
        assert torch.equal(states.keys, captured[name].keys) and torch.equal(states.values, captured[name].values)


def test_text_becomes_its_tokens_without_special_ones(tokenizer_dir):
    model = build_prefix(build_model("llama"), prefix_init_text=TEXT, tokenizer_name_or_path=tokenizer_dir)
    assert model.active_peft_config.num_virtual_tokens == len(TEXT_IDS)
    assert_prefix_is(model, TEXT_IDS)


def test_special_tokens_come_when_they_are_asked_for(tokenizer_dir):
    settings = {"tokenizer_name_or_path": tokenizer_dir, "tokenizer_kwargs": {"add_special_tokens": True}}
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_text=TEXT, **settings)
    assert_prefix_is(get_peft_model(build_model("llama"), config), [1, *TEXT_IDS])
    assert config.tokenizer_kwargs == {"add_special_tokens": True}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_step_0_equals_prompting_with_the_text(name, tokenizer_dir):
    base, ids = build_model(name), draw_tokens()
    prompt = torch.tensor(TEXT_IDS).expand(2, -1)
    expected = base(torch.cat([prompt, ids], dim=1)).logits[:, len(TEXT_IDS) :]
    model = build_prefix(base, prefix_init_text=TEXT, tokenizer_name_or_path=tokenizer_dir)
    assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("where", ["config", "model"])
def test_the_tokenizer_of_the_base_model_is_the_default(where, tokenizer_dir):
    base = build_model("llama")
    config = PrefixPlusConfig(prefix_init_text=TEXT)
    if where == "config":
        config.base_model_name_or_path = tokenizer_dir
    else:
        base.config._name_or_path = tokenizer_dir
    assert resolve_init_token_ids(config, base) == TEXT_IDS


def test_short_text_is_repeated(tokenizer_dir):
    model = build_prefix(
        build_model("llama"), prefix_init_text=TEXT, tokenizer_name_or_path=tokenizer_dir, num_virtual_tokens=7
    )
    assert_prefix_is(model, [2, 3, 4, 2, 3, 4, 2])


def test_long_text_is_truncated_with_a_warning(tokenizer_dir):
    with pytest.warns(UserWarning, match=r"3 tokens, the prefix 2: only the first 2.*`num_virtual_tokens` out.*to 3"):
        model = build_prefix(
            build_model("llama"), prefix_init_text=TEXT, tokenizer_name_or_path=tokenizer_dir, num_virtual_tokens=2
        )
    assert_prefix_is(model, [2, 3])


@pytest.mark.parametrize("text", ["", "   ", "\n"], ids=repr)
def test_text_without_tokens_raises(text, tokenizer_dir):
    config = PrefixPlusConfig(prefix_init_text=text, tokenizer_name_or_path=tokenizer_dir)
    with pytest.raises(ValueError, match=r"tokenizes to nothing.*at least one token") as raised:
        resolve_init_token_ids(config, build_model("llama"))
    assert repr(text) in str(raised.value) and tokenizer_dir in str(raised.value)


def test_a_base_model_without_a_name_has_no_tokenizer():
    with pytest.raises(ValueError, match=r"no name or path.*tokenizer_name_or_path.*prefix_init_token_ids"):
        build_prefix(build_model("llama"), prefix_init_text=TEXT)


def test_a_missing_tokenizer_is_named(tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"prefix_init_text.*tokenizer_name_or_path") as raised:
        build_prefix(build_model("llama"), prefix_init_text=TEXT, tokenizer_name_or_path=missing)
    assert missing in str(raised.value)


def test_a_tokenizer_of_another_model_raises(tokenizer_dir):
    base = build_model("llama", vocab_size=3)
    modules = list(base.modules())
    with pytest.raises(ValueError, match=r"3 token embeddings.*another tokenizer"):
        build_prefix(base, prefix_init_text=TEXT, tokenizer_name_or_path=tokenizer_dir)
    assert list(base.modules()) == modules


def test_given_tokens_are_the_prefix():
    model = build_prefix(build_model("llama"), prefix_init_token_ids=[9, 8, 7, 6])
    assert model.active_peft_config.num_virtual_tokens == 4
    assert_prefix_is(model, [9, 8, 7, 6])


def test_vocab_tokens_are_sampled_by_the_seed():
    base = build_model("llama")
    samples = [sample_vocabulary(base, 50, seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == 50 and all(0 <= token < VOCAB_SIZE for token in samples[0])
    assert len(set(samples[0])) > 20
    torch.manual_seed(99)
    assert sample_vocabulary(base, 50, 0) == samples[0], "the global seed does not matter"


@pytest.mark.parametrize("seed", [0, 7])
def test_vocab_prefix_is_what_was_sampled(seed):
    base = build_model("llama")
    model = build_prefix(base, prefix_init_seed=seed)
    assert model.active_peft_config.num_virtual_tokens == DEFAULT_NUM_VIRTUAL_TOKENS
    assert_prefix_is(model, sample_vocabulary(base, DEFAULT_NUM_VIRTUAL_TOKENS, seed))


def build_states(
    prefix_init: str, seed: int = 0, length: int = 300, dtype: torch.dtype = torch.float32, projection: str = "none"
):
    model = build_model("llama", dtype=dtype)
    config = PrefixPlusConfig(prefix_init=prefix_init, prefix_init_seed=seed, projection=projection)
    modules = find_attention_modules(model)
    captured = capture_states(config, model, list(modules), length, None)
    geometries = {name: read_geometry(module) for name, module in modules.items()}
    return build_initial_states(config, dict.fromkeys(modules, length), geometries, captured), model


def test_random_states_have_the_scale_of_the_models_own():
    states, _ = build_states("random")
    for anchor, scale in states.values():
        for drawn, size in ((anchor.keys, scale.keys), (anchor.values, scale.values / VALUE_STEPS["none"])):
            normalized = drawn / size
            assert abs(normalized.mean().item()) < 0.05
            assert_close(normalized.square().mean(dim=(-1, -2)).sqrt(), torch.ones(1, 2), atol=0.06, rtol=0)


def test_random_states_depend_on_the_seed_and_the_layer():
    first, again, other = (build_states("random", seed)[0] for seed in (0, 0, 1))
    keys = [states["model.layers.0.self_attn"].anchor.keys for states in (first, again, other)]
    assert torch.equal(keys[0], keys[1]) and not torch.equal(keys[0], keys[2])
    scaled = [state.anchor.keys / state.scale.keys for state in first.values()]
    assert not torch.allclose(scaled[0], scaled[1])


def test_zero_states_are_zero_and_keep_the_scale():
    states, _ = build_states("zero")
    for anchor, scale in states.values():
        assert not anchor.keys.any() and not anchor.values.any()
        assert (scale.keys > 0).all() and (scale.values > 0).all()


@pytest.mark.parametrize("projection", VALUE_STEPS)
@pytest.mark.parametrize("prefix_init", ["vocab", "random", "zero"])
def test_the_scale_is_the_root_mean_square_of_captured_states_times_the_step_of_values(prefix_init, projection):
    states, model = build_states(prefix_init, length=11, projection=projection)
    captured = capture_prefix_states(model, sample_vocabulary(model, 11, 0))
    step = VALUE_STEPS[projection]
    for name, (_, scale) in states.items():
        for size, own in ((scale.keys, captured[name].keys), (scale.values / step, captured[name].values)):
            assert size.shape == (1, 2, 1, 1)
            expected = [own[0, head].square().mean().sqrt() for head in range(2)]
            assert_close(size.flatten(), torch.stack(expected))


@pytest.mark.parametrize(("projection", "ratio"), [("none", 4.0), ("linear", 2.0), ("mlp", 2.0)])
def test_a_step_of_adam_moves_values_further_than_keys(projection, ratio):
    model = build_prefix(build_model("llama"), num_virtual_tokens=50, projection=projection, prefix_init="vocab")
    encoders = [layer.get_encoder("default") for layer in get_layers(model).values()]
    before = [encoder() for encoder in encoders]
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    ids = draw_tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for encoder, start in zip(encoders, before, strict=True):
        after = encoder()
        moved = [
            ((new - old).square().mean() / old.square().mean()).sqrt()
            for new, old in ((after.keys, start.keys), (after.values, start.values))
        ]
        assert_close(moved[1] / moved[0], torch.tensor(ratio), rtol=0.2, atol=0)


@pytest.mark.parametrize("prefix_init", ["vocab", "random", "zero"])
def test_states_are_single_precision_whatever_the_model(prefix_init):
    for initial in build_states(prefix_init, length=3, dtype=torch.bfloat16)[0].values():
        for states in initial:
            assert states.keys.dtype == states.values.dtype == torch.float32


@pytest.mark.parametrize("prefix_init", PREFIX_INITS)
def test_every_initialization_gives_a_working_prefix(prefix_init, tokenizer_dir):
    settings = {
        "text": {"prefix_init_text": TEXT, "tokenizer_name_or_path": tokenizer_dir},
        "tokens": {"prefix_init_token_ids": [5, 6]},
    }.get(prefix_init, {})
    base, ids = build_model("llama"), draw_tokens()
    expected = base(ids).logits
    model = build_prefix(base, prefix_init=prefix_init, num_virtual_tokens=4, **settings)
    logits = model(ids).logits
    assert logits.isfinite().all() and not torch.allclose(logits, expected)


def test_layers_of_different_length_start_with_the_same_tokens():
    model = build_prefix(
        build_model("llama"), prefix_init_token_ids=[9, 8, 7, 6], num_virtual_tokens_pattern={"0.self_attn": 2}
    )
    captured = capture_prefix_states(model, [9, 8, 7, 6])
    lengths = []
    for name, layer in get_layers(model).items():
        states = layer.get_prefix_states(["default"], 1)
        lengths.append(states.num_virtual_tokens)
        assert torch.equal(states.keys, captured[name].keys[..., : lengths[-1], :])
    assert lengths == [2, 4]


@pytest.mark.parametrize(
    ("token_ids", "length", "expected"),
    [([1, 2], 2, [1, 2]), ([1, 2], 5, [1, 2, 1, 2, 1]), ([1], 3, [1, 1, 1]), ([1, 2, 3], 6, [1, 2, 3, 1, 2, 3])],
)
def test_fitting_repeats_in_silence(token_ids, length, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_token_ids(token_ids, length) == expected


def test_fitting_truncates_with_a_warning():
    with pytest.warns(UserWarning, match="only the first 2 are used"):
        assert fit_token_ids([1, 2, 3], 2) == [1, 2]


@pytest.mark.parametrize(
    ("num_virtual_tokens", "init_token_ids", "expected"),
    [(None, None, DEFAULT_NUM_VIRTUAL_TOKENS), (None, [1, 2, 3], 3), (7, None, 7), (7, [1, 2, 3], 7)],
)
def test_prefix_length(num_virtual_tokens, init_token_ids, expected):
    config = PrefixPlusConfig(num_virtual_tokens=num_virtual_tokens)
    assert resolve_prefix_length(config, init_token_ids) == expected


@pytest.mark.parametrize("prefix_init", ["vocab", "random", "zero"])
def test_initializations_without_tokens_name_none(prefix_init):
    assert resolve_init_token_ids(PrefixPlusConfig(prefix_init=prefix_init), build_model("llama")) is None


def test_a_module_that_cannot_be_reached_starts_from_random_numbers_of_its_shape_with_a_warning():
    config = PrefixPlusConfig(num_virtual_tokens=3, projection="none")
    geometry = AttentionGeometry(2, 200, 400, torch.device("cpu"))
    states = []
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 modules, such as model\.elsewhere, cannot be run.*random numbers"):
            states.append(build_initial_states(config, {"model.elsewhere": 3}, {"model.elsewhere": geometry}, {}))
    (anchor, scale), (again, _) = (state["model.elsewhere"] for state in states)
    assert anchor.keys.shape == (1, 2, 3, 200) and anchor.values.shape == (1, 2, 3, 400)
    assert torch.equal(anchor.keys, again.keys) and torch.equal(anchor.values, again.values), "the seed decides"
    assert_close(anchor.keys.square().mean().sqrt(), torch.tensor(1.0), atol=0.1, rtol=0)
    assert torch.equal(scale.keys, torch.ones(1, 2, 1, 1)) and torch.equal(
        scale.values, VALUE_STEPS["none"] * scale.keys
    )


@pytest.mark.parametrize("prefix_init", ["tokens", "text"])
def test_a_module_that_the_named_tokens_do_not_reach_raises(prefix_init):
    named = {"prefix_init_token_ids": [3, 4, 5]} if prefix_init == "tokens" else {"prefix_init_text": TEXT}
    geometry = AttentionGeometry(2, 8, 8, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"\['model.elsewhere'\] took no part.*exclude_modules"):
        build_initial_states(PrefixPlusConfig(**named), {"model.elsewhere": 3}, {"model.elsewhere": geometry}, {})


def test_a_module_that_is_captured_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_states("vocab", length=3)


def test_frozen_tokens_that_leave_nothing_to_train_raise_with_the_text_length(tokenizer_dir):
    config = PrefixPlusConfig(
        task_type="CAUSAL_LM", prefix_init_text=TEXT, tokenizer_name_or_path=tokenizer_dir, num_frozen_tokens=3
    )
    with pytest.raises(ValueError, match=r"`num_frozen_tokens` is 3, but the prefix has 3"):
        get_peft_model(build_model("llama"), config)
    get_peft_model(build_model("llama"), dataclasses.replace(config, num_frozen_tokens=2))
