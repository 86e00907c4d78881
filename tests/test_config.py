"""The configuration: what it accepts, how it is written and read, and that it stays as the user wrote it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from helpers import INIT_TOKEN_IDS, add_prefix, draw_tokens
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model
from tiny_models import build_model

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.config import DEFAULT_NUM_VIRTUAL_TOKENS
from peft_prefix_plus.peft_type import PREFIX_PLUS

# Settings, then what the message has to name: the field, the value, and what is expected or to be done.
INVALID = [
    ({"projection": "cnn"}, ["`projection`", "'cnn'", "'none', 'linear', 'mlp'"]),
    ({"projection": None}, ["`projection`", "None", "'mlp'"]),
    ({"prefix_dropout_mode": "row"}, ["`prefix_dropout_mode`", "'row'", "'token', 'element'"]),
    ({"prefix_init": "xavier"}, ["`prefix_init`", "'xavier'", "'vocab', 'text', 'tokens', 'random', 'zero'"]),
    ({"num_virtual_tokens": 0}, ["`num_virtual_tokens`", "0", "integer of at least 1"]),
    ({"num_virtual_tokens": -3}, ["`num_virtual_tokens`", "-3", "integer of at least 1"]),
    ({"num_virtual_tokens": 2.5}, ["`num_virtual_tokens`", "2.5", "integer of at least 1"]),
    ({"num_virtual_tokens": "20"}, ["`num_virtual_tokens`", "'20'", "integer of at least 1"]),
    ({"num_virtual_tokens": True}, ["`num_virtual_tokens`", "True", "integer of at least 1"]),
    ({"projection_dim": 0}, ["`projection_dim`", "0", "integer of at least 1"]),
    ({"projection_dim": None}, ["`projection_dim`", "None", "integer of at least 1"]),
    ({"embedding_step": 0}, ["`embedding_step`", "0", "from 0.001 to 1000"]),
    ({"embedding_step": -4.0}, ["`embedding_step`", "-4.0", "from 0.001 to 1000"]),
    ({"embedding_step": float("nan")}, ["`embedding_step`", "nan", "from 0.001 to 1000"]),
    ({"embedding_step": True}, ["`embedding_step`", "True", "from 0.001 to 1000"]),
    ({"embedding_step": "4"}, ["`embedding_step`", "'4'", "from 0.001 to 1000"]),
    ({"num_frozen_tokens": -1}, ["`num_frozen_tokens`", "-1", "integer of at least 0"]),
    (
        {"num_frozen_tokens": 4, "num_virtual_tokens": 4},
        ["`num_frozen_tokens` is 4", "4 virtual tokens", "at most 3", "longer prefix"],
    ),
    ({"prefix_init_seed": -1}, ["`prefix_init_seed`", "-1", "integer of at least 0"]),
    ({"prefix_init_seed": None}, ["`prefix_init_seed`", "None", "integer of at least 0"]),
    ({"prefix_dropout": 1.0}, ["`prefix_dropout`", "1.0", "at least 0 and below 1"]),
    ({"prefix_dropout": -0.1}, ["`prefix_dropout`", "-0.1", "at least 0 and below 1"]),
    ({"prefix_dropout": float("nan")}, ["`prefix_dropout`", "nan", "at least 0 and below 1"]),
    ({"prefix_dropout": "0.1"}, ["`prefix_dropout`", "'0.1'", "at least 0 and below 1"]),
    ({"prefix_dropout": None}, ["`prefix_dropout`", "None", "at least 0 and below 1"]),
    ({"prefix_dropout": False}, ["`prefix_dropout`", "False", "at least 0 and below 1"]),
    ({"num_virtual_tokens_pattern": [3]}, ["`num_virtual_tokens_pattern`", "[3]", "dict"]),
    ({"num_virtual_tokens_pattern": {"(": 3}}, ["`num_virtual_tokens_pattern`", "'('", "regular expression"]),
    ({"num_virtual_tokens_pattern": {1: 3}}, ["`num_virtual_tokens_pattern`", "1", "regular expression"]),
    ({"num_virtual_tokens_pattern": {"attn": -1}}, ["num_virtual_tokens_pattern['attn']", "-1", "at least 0"]),
    ({"num_virtual_tokens_pattern": {"attn": "3"}}, ["num_virtual_tokens_pattern['attn']", "'3'", "at least 0"]),
    ({"target_modules": "("}, ["`target_modules`", "'('", "regular expression"]),
    ({"target_modules": [1]}, ["`target_modules`", "[1]", "list of module names or a regular expression"]),
    ({"target_modules": 5}, ["`target_modules`", "5", "list of module names or a regular expression"]),
    ({"exclude_modules": "*"}, ["`exclude_modules`", "'*'", "regular expression"]),
    ({"exclude_modules": ("a",)}, ["`exclude_modules`", "('a',)", "list of module names or a regular expression"]),
    (
        {"target_modules": ".*attn", "layers_to_transform": [0]},
        ["`layers_to_transform`", "regular expression in `target_modules`", "as a list"],
    ),
    ({"layers_pattern": "layers"}, ["`layers_pattern`", "`layers_to_transform`", "set that, or remove it"]),
    ({"layers_to_transform": []}, ["`layers_to_transform`", "empty", "`None` for all layers"]),
    ({"layers_to_transform": [0, -1]}, ["`layers_to_transform`", "-1", "integer of at least 0"]),
    ({"layers_to_transform": "0"}, ["`layers_to_transform`", "'0'", "integer of at least 0"]),
    (
        {"prefix_init_text": "a", "prefix_init_token_ids": [1]},
        ["`prefix_init_text`", "`prefix_init_token_ids`", "not both"],
    ),
    ({"prefix_init": "zero", "prefix_init_text": "a"}, ["`prefix_init_text`", "'text'", "'zero'", "remove one"]),
    ({"prefix_init": "text", "prefix_init_token_ids": [1]}, ["`prefix_init='text'`", "needs `prefix_init_text`"]),
    ({"prefix_init": "text"}, ["`prefix_init='text'`", "needs `prefix_init_text`"]),
    ({"prefix_init": "tokens"}, ["`prefix_init='tokens'`", "needs `prefix_init_token_ids`"]),
    ({"prefix_init_text": 3}, ["`prefix_init_text`", "3", "must be a string"]),
    ({"prefix_init_token_ids": []}, ["`prefix_init_token_ids`", "[]", "at least one token id"]),
    ({"prefix_init_token_ids": 7}, ["`prefix_init_token_ids`", "7", "at least one token id"]),
    ({"prefix_init_token_ids": [1, -2]}, ["`prefix_init_token_ids`", "-2", "integer of at least 0"]),
    ({"prefix_init_token_ids": [1, "2"]}, ["`prefix_init_token_ids`", "'2'", "integer of at least 0"]),
    ({"task_type": "POETRY"}, ["task type", "POETRY", "CAUSAL_LM"]),
]

FULL = {
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 7,
    "num_virtual_tokens_pattern": {"layers.1.self_attn": 3, r"layers\.0\..*": 0},
    "target_modules": ["self_attn"],
    "exclude_modules": ["layers.5.self_attn"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "modules_to_save": ["lm_head"],
    "projection": "linear",
    "projection_dim": 8,
    "embedding_step": 2.0,
    "prefix_dropout": 0.25,
    "prefix_dropout_mode": "element",
    "prefix_init_text": "Zusammenfassung für Fünfjährige: 要約",
    "prefix_init_seed": 3,
    "tokenizer_name_or_path": "somewhere",
    "tokenizer_kwargs": {"add_special_tokens": True},
    "num_frozen_tokens": 2,
}


@pytest.mark.parametrize(("settings", "fragments"), INVALID, ids=lambda value: str(value)[:50])
def test_invalid_settings_are_named_with_a_remedy(settings, fragments):
    with pytest.raises(ValueError) as raised:
        PrefixPlusConfig(**settings)
    for fragment in fragments:
        assert fragment in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_virtual_tokens": 1},
        {"prefix_dropout": 0},
        {"embedding_step": 2},
        {"prefix_dropout": 0.999},
        {"num_frozen_tokens": 3, "num_virtual_tokens": 4},
        {"num_frozen_tokens": 100},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"target_modules": r".*\.(0|1)\.attn"},
        {"num_virtual_tokens_pattern": {"attn": 0}},
        {"num_virtual_tokens_pattern": None},
        {"prefix_init": "text", "prefix_init_text": "a"},
        {"prefix_init": "tokens", "prefix_init_token_ids": [0]},
    ],
    ids=str,
)
def test_valid_settings_are_accepted(settings):
    PrefixPlusConfig(**settings)


def test_defaults():
    config = PrefixPlusConfig()
    assert config.peft_type is PREFIX_PLUS
    assert (config.projection, config.projection_dim, config.embedding_step) == ("linear", 16, 4.0)
    assert (config.prefix_dropout, config.prefix_dropout_mode) == (0.0, "token")
    assert (config.prefix_init, config.prefix_init_seed, config.num_frozen_tokens) == ("vocab", 0, 0)
    assert config.num_virtual_tokens is None and config.target_modules is None
    assert not config.prefix_is_initialized
    assert not config.is_prompt_learning


def test_a_text_or_tokens_imply_the_initialization():
    assert PrefixPlusConfig(prefix_init_text="a").prefix_init == "text"
    assert PrefixPlusConfig(prefix_init_token_ids=[1]).prefix_init == "tokens"


def test_sets_become_sorted_lists():
    config = PrefixPlusConfig(target_modules={"b", "a"}, exclude_modules={"d", "c"})
    assert (config.target_modules, config.exclude_modules) == (["a", "b"], ["c", "d"])


def test_instances_share_no_containers():
    PrefixPlusConfig().num_virtual_tokens_pattern["attn"] = 3
    assert PrefixPlusConfig().num_virtual_tokens_pattern == {}


@pytest.mark.parametrize(
    ("pattern", "name", "length"),
    [
        ({}, "model.layers.0.self_attn", 20),
        ({"self_attn": 3}, "model.layers.0.self_attn", 3),
        ({"layers.1.self_attn": 3}, "model.layers.1.self_attn", 3),
        ({"layers.1.self_attn": 3}, "model.layers.11.self_attn", 20),
        ({"1.self_attn": 3}, "model.layers.11.self_attn", 20),
        ({"model.layers.0.self_attn": 3}, "model.layers.0.self_attn", 3),
        ({"layers.0": 3}, "model.layers.0.self_attn", 20),
        ({r"layers\.(0|2)\.self_attn": 0}, "model.layers.2.self_attn", 0),
        ({r".*\.0\..*": 3, "self_attn": 5}, "model.layers.0.self_attn", 3),
        ({"self_attn": 5, r".*\.0\..*": 3}, "model.layers.0.self_attn", 5),
        ({"self_attn|attn": 4}, "h.3.attn", 4),
    ],
)
def test_pattern_matches_like_loras_rank_pattern(pattern, name, length):
    config = PrefixPlusConfig(num_virtual_tokens_pattern=pattern, num_virtual_tokens=20)
    assert config.resolve_num_virtual_tokens(name) == length


def test_pattern_falls_back_to_the_default_length():
    assert PrefixPlusConfig().resolve_num_virtual_tokens("attn") == DEFAULT_NUM_VIRTUAL_TOKENS


def assert_equal_but_initialized(loaded: PeftConfig, config: PrefixPlusConfig) -> None:
    assert type(loaded) is PrefixPlusConfig and loaded.peft_type is PREFIX_PLUS
    assert loaded == dataclasses.replace(config, prefix_is_initialized=True)


@pytest.mark.parametrize("settings", [{}, FULL], ids=["defaults", "full"])
@pytest.mark.parametrize("read", [PrefixPlusConfig.from_pretrained, PeftConfig.from_pretrained])
def test_save_and_load_roundtrip(settings, read, tmp_path):
    config = PrefixPlusConfig(**settings)
    config.save_pretrained(str(tmp_path))
    assert_equal_but_initialized(read(str(tmp_path)), config)


def test_load_from_a_subfolder(tmp_path):
    config = PrefixPlusConfig(**FULL)
    config.save_pretrained(str(tmp_path / "inner"))
    assert_equal_but_initialized(PrefixPlusConfig.from_pretrained(str(tmp_path), subfolder="inner"), config)


@pytest.mark.parametrize("settings", [{}, FULL], ids=["defaults", "full"])
def test_dict_and_json_roundtrip(settings):
    config = PrefixPlusConfig(**settings)
    attributes = json.loads(json.dumps(config.to_dict()))
    assert PrefixPlusConfig(**attributes) == config
    assert get_peft_config(attributes) == config


def test_only_the_saved_file_says_initialized(tmp_path):
    config = PrefixPlusConfig(**FULL)
    before = config.to_dict()
    config.save_pretrained(str(tmp_path))
    assert config.to_dict() == before and not config.prefix_is_initialized
    assert json.loads((tmp_path / "adapter_config.json").read_text())["prefix_is_initialized"] is True


def test_a_model_keeps_its_config_uninitialized_when_it_is_saved(tmp_path):
    model = add_prefix(build_model("llama"))
    model.save_pretrained(tmp_path)
    assert not model.active_peft_config.prefix_is_initialized
    assert PrefixPlusConfig.from_pretrained(str(tmp_path)).prefix_is_initialized


def test_get_peft_model_leaves_the_users_config_alone():
    config = PrefixPlusConfig(
        task_type="CAUSAL_LM",
        prefix_init_token_ids=list(INIT_TOKEN_IDS),
        num_virtual_tokens_pattern={"0.self_attn": 3},
    )
    before = config.to_dict()
    model = get_peft_model(build_model("llama"), config)
    # What PEFT itself writes into every config.
    own = {"base_model_name_or_path", "revision", "auto_mapping"}
    # What the length turned out to be.
    own |= {"num_virtual_tokens"}
    after = config.to_dict()
    assert {key: value for key, value in after.items() if key not in own} == {
        key: value for key, value in before.items() if key not in own
    }
    assert model.active_peft_config.num_virtual_tokens == len(INIT_TOKEN_IDS)


def test_one_config_serves_two_models():
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for name in ("llama", "gpt2"):
        get_peft_model(build_model(name), config)(draw_tokens())


def save_adapter(directory) -> None:
    add_prefix(build_model("llama")).save_pretrained(directory)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "header-length", "header", "last-byte"])
def test_truncated_weights_raise_before_the_model_is_touched(keep, tmp_path):
    save_adapter(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    model = build_model("llama")
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a complete safetensors file.*once more"):
        PeftModel.from_pretrained(model, tmp_path)
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="once more"):
        PrefixPlusConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", '{"peft_type": "PREFIX_PLUS",}', "\x00", "[]", '"text"', "5", "null"], ids=repr
)
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "adapter_config.json"))):
        PrefixPlusConfig.from_pretrained(str(tmp_path))


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "adapter_config.json"))):
        PrefixPlusConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("projection", "transformer"),
        ("prefix_init", "magic"),
        ("prefix_dropout_mode", 3),
        ("num_virtual_tokens", "many"),
        ("prefix_dropout", 2),
        ("target_modules", {"a": 1}),
        ("num_virtual_tokens_pattern", [1]),
        ("num_frozen_tokens", None),
        ("prefix_init_token_ids", [1.5]),
        ("prefix_is_initialized", "no"),
        ("tokenizer_kwargs", "fast"),
        ("layers_pattern", 3),
    ],
)
def test_unknown_values_in_the_file_raise_and_leave_the_model_alone(field, value, tmp_path):
    save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    model = build_model("llama")
    modules = list(model.modules())
    with pytest.raises(ValueError, match=field):
        PeftModel.from_pretrained(model, tmp_path)
    assert list(model.modules()) == modules


def test_unknown_fields_in_the_file_warn_and_are_ignored(tmp_path):
    save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        PeftModel.from_pretrained(build_model("llama"), tmp_path)


def test_a_path_of_a_tokenizer_is_saved_as_text(tmp_path):
    config = PrefixPlusConfig(prefix_init_text="text", tokenizer_name_or_path=Path("tokenizer"))
    assert config.tokenizer_name_or_path == "tokenizer"
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tokenizer_name_or_path"] == "tokenizer"


def test_arguments_of_a_tokenizer_that_could_not_be_saved_are_refused():
    with pytest.raises(ValueError, match="cannot be saved as JSON"):
        PrefixPlusConfig(prefix_init_text="text", tokenizer_kwargs={"cache_dir": Path("cache")})
