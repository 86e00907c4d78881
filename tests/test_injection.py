"""Which modules get a prefix, and what is refused before a model is touched."""

import warnings

import pytest
import torch
from helpers import INIT_TOKEN_IDS, Snapshot, add_prefix, list_lengths, named_prefix_parameters, perturb, run
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.error import NoMatchingPeftModuleError
from tiny_models import VOCAB_SIZE, build_model
from torch import nn
from zoo_models import build_zoo_model

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer
from peft_prefix_plus.architectures import find_attention_modules

P = len(INIT_TOKEN_IDS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: P, 1: P, 2: P, 3: P}),
        ({"target_modules": ["self_attn"]}, {0: P, 1: P, 2: P, 3: P}),
        ({"target_modules": ["layers.1.self_attn", "model.layers.3.self_attn"]}, {1: P, 3: P}),
        ({"target_modules": r".*\.[02]\.self_attn"}, {0: P, 2: P}),
        ({"exclude_modules": ["layers.0.self_attn"]}, {1: P, 2: P, 3: P}),
        ({"exclude_modules": r"model\.layers\.[^3]\..*"}, {3: P}),
        ({"layers_to_transform": [1, 2]}, {1: P, 2: P}),
        ({"layers_to_transform": 3}, {3: P}),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {0: P}),
        ({"layers_to_transform": [0, 1], "exclude_modules": ["layers.0.self_attn"]}, {1: P}),
        ({"num_virtual_tokens_pattern": {"0.self_attn": 2, "3.self_attn": 0}}, {0: 2, 1: P, 2: P}),
        ({"num_virtual_tokens_pattern": {r".*\.[0-2]\..*": 0}, "num_virtual_tokens": 7}, {3: 7}),
    ],
    ids=str,
)
def test_settings_select_the_layers(settings, expected):
    base = build_model("llama", num_hidden_layers=4)
    model = add_prefix(base, **settings)
    assert list_lengths(model) == {f"model.layers.{i}.self_attn": length for i, length in expected.items()}
    assert run(model).isfinite().all()
    assert {name.split(".self_attn.")[0].split(".")[-1] for name in named_prefix_parameters(model)} == set(
        map(str, expected)
    )


@pytest.mark.parametrize(
    "fields",
    [{"prefix_init_token_ids": [5, 6, 7]}, {"prefix_init": "zero"}, {"num_virtual_tokens": 3}, {"projection": "none"}],
    ids=str,
)
def test_fields_set_later_count_as_those_given_at_once(fields):
    late = PrefixPlusConfig(task_type="CAUSAL_LM")
    for name, value in fields.items():
        setattr(late, name, value)
    models = [
        get_peft_model(build_model("llama"), config)
        for config in (late, PrefixPlusConfig(task_type="CAUSAL_LM", **fields))
    ]
    assert list_lengths(models[0]) == list_lengths(models[1])
    assert torch.equal(run(models[0].eval()), run(models[1].eval()))


def test_a_prefix_longer_than_the_positions_of_a_model_gives_a_warning():
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=[5] * 9)
    with pytest.warns(UserWarning, match="9 virtual tokens, but LlamaForCausalLM was made for 8 positions"):
        get_peft_model(build_model("llama", max_position_embeddings=8), config)


@pytest.mark.parametrize(
    "settings",
    [{"layers_to_transform": [1]}, {"num_virtual_tokens_pattern": {"0.self_attn": 2}}, {"num_frozen_tokens": 2}],
    ids=str,
)
def test_selection_survives_saving_and_loading(settings, tmp_path):
    model = add_prefix(build_model("llama"), **settings)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert list_lengths(loaded) == list_lengths(model)
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize(
    ("settings", "error", "fragments"),
    [
        ({"target_modules": ["q_proj"]}, ValueError, ["['q_proj']", "layers.0.self_attn.q_proj", "attention modules"]),
        ({"target_modules": ["self_attn", "mlp"]}, ValueError, ["layers.0.mlp", "model.layers.0.self_attn"]),
        ({"target_modules": "model"}, ValueError, ["'model'", "cannot carry a prefix"]),
        ({"target_modules": ["nope"]}, NoMatchingPeftModuleError, ["['nope']", "model.layers.0.self_attn"]),
        ({"target_modules": []}, NoMatchingPeftModuleError, ["[]", "model.layers.0.self_attn"]),
        ({"exclude_modules": ["self_attn"]}, NoMatchingPeftModuleError, ["`exclude_modules` ['self_attn']"]),
        ({"layers_to_transform": [7]}, ValueError, ["`layers_to_transform` names the layers [7]"]),
        ({"num_virtual_tokens_pattern": {".*": 0}}, NoMatchingPeftModuleError, ["{'.*': 0}"]),
        ({"num_frozen_tokens": P}, ValueError, ["`num_frozen_tokens` is 5", "at most 4"]),
        (
            {"num_frozen_tokens": 2, "num_virtual_tokens_pattern": {"1.self_attn": 2}},
            ValueError,
            ["`num_frozen_tokens` is 2", "at most 1"],
        ),
        ({"prefix_init_token_ids": [VOCAB_SIZE]}, ValueError, [f"[{VOCAB_SIZE}]", f"{VOCAB_SIZE} token embeddings"]),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_does_not_fit_raises_and_leaves_the_model_alone(settings, error, fragments, training):
    model = build_model("llama")
    snapshot = Snapshot(model)
    model.train(training)
    with pytest.raises(error) as raised:
        add_prefix(model, **settings)
    for fragment in fragments:
        assert fragment in str(raised.value)
    assert model.training is training
    assert all(parameter.requires_grad for parameter in model.parameters())
    snapshot.assert_unchanged(model.eval())


def test_too_many_tokens_for_a_table_raise_and_leave_the_model_alone():
    model = build_model("gpt2")
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="only 64 absolute positions"):
        add_prefix(model, prefix_init="vocab", num_virtual_tokens=64)
    snapshot.assert_unchanged(model)


@pytest.mark.parametrize(
    ("build", "task_type", "fragments"),
    [
        (
            lambda: build_zoo_model("causal", "mamba"),
            "CAUSAL_LM",
            ["MambaForCausalLM has no softmax attention", "state-space", "LoRA"],
        ),
        (
            lambda: build_zoo_model("encoder", "nystromformer"),
            None,
            ["NystromformerForMaskedLM computes attention", "NystromformerSelfAttention"],
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2)), None, ["Sequential", "without a transformers config"]),
    ],
    ids=["state-space", "landmarks", "no-transformers"],
)
def test_unsupported_models_raise_and_stay_as_they_are(build, task_type, fragments):
    model = build()
    modules, keys = list(model.modules()), list(model.state_dict())
    with pytest.raises(ValueError) as raised:
        get_peft_model(model, PrefixPlusConfig(task_type=task_type))
    for fragment in fragments:
        assert fragment in str(raised.value)
    assert list(model.modules()) == modules and list(model.state_dict()) == keys


def test_attention_beside_a_state_space_gets_the_prefix():
    base = build_zoo_model("causal", "jamba")
    kinds = {type(module).__name__ for module in base.modules()}
    assert {"JambaMambaMixer", "JambaAttention"} <= kinds
    model = get_peft_model(base, PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    layers = [module for module in model.modules() if isinstance(module, PrefixPlusLayer)]
    assert layers and {type(layer.base_layer).__name__ for layer in layers} == {"JambaAttention"}


def test_default_targets_are_what_a_forward_over_text_reaches():
    expected = {
        ("causal", "llama"): {"self_attn"},
        ("causal", "bloom"): {"self_attention"},
        ("seq2seq", "t5"): {"SelfAttention", "EncDecAttention"},
        ("seq2seq", "bart"): {"self_attn", "encoder_attn"},
        ("vision", "vit"): {"attention"},
    }
    for (group, model_type), endings in expected.items():
        model = inject_adapter_in_model(PrefixPlusConfig(num_virtual_tokens=3), build_zoo_model(group, model_type))
        names = [name for name, module in model.named_modules() if isinstance(module, PrefixPlusLayer)]
        assert {name.rpartition(".")[2] for name in names} == endings
        assert len(names) == len(find_attention_modules(model)), "no module is left out"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 1, "prefix_dropout": 0.2}, "`prefix_dropout=0.2` has no effect.*a single one"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "`tokenizer_kwargs` has no effect.*`prefix_init` is 'vocab'"),
        ({"tokenizer_name_or_path": "somewhere"}, "`tokenizer_name_or_path` has no effect"),
    ],
)
def test_fields_without_effect_warn_when_the_adapter_is_made(fields, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        model = get_peft_model(build_model("llama"), PrefixPlusConfig(task_type="CAUSAL_LM", **fields))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=message)
        PeftModel.from_pretrained(build_model("llama"), tmp_path)


@pytest.mark.parametrize("fields", [{"num_virtual_tokens": 2}, {"prefix_dropout_mode": "element"}], ids=str)
def test_dropout_that_can_act_does_not_warn(fields):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no effect")
        config = PrefixPlusConfig(**({"num_virtual_tokens": 1, "prefix_dropout": 0.2} | fields))
        inject_adapter_in_model(config, build_model("llama"))


def test_a_pattern_without_effect_warns_and_a_layer_that_is_not_there_raises():
    with pytest.warns(UserWarning, match="nomatch"):
        add_prefix(build_model("llama"), num_virtual_tokens_pattern={"nomatch": 2})
    model = build_model("llama")
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"layers \[9\]"):
        add_prefix(model, layers_to_transform=[0, 9])
    snapshot.assert_unchanged(model)


@pytest.mark.parametrize(
    ("build", "module"),
    [
        (lambda: build_model("gpt2"), "wpe"),
        (lambda: build_model("opt"), "embed_positions"),
        (lambda: build_zoo_model("encoder", "bert"), "embeddings"),
        (lambda: build_zoo_model("encoder", "bert"), "position_embeddings"),
    ],
    ids=["gpt2", "opt", "bert", "bert-table"],
)
def test_a_table_of_positions_is_not_trained_where_the_input_moves(build, module):
    base = build()
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match=f"modules_to_save.*{module}.*numbers the input"):
        get_peft_model(base, PrefixPlusConfig(prefix_init_token_ids=INIT_TOKEN_IDS, modules_to_save=[module]))
    snapshot.assert_unchanged(base)
    get_peft_model(base, PrefixPlusConfig(prefix_init="random", modules_to_save=[module]))
