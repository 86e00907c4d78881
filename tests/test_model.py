"""The tuner: which modules it takes, what it refuses, and PEFT's whole interface on top of it."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from helpers import INIT_TOKEN_IDS, add_prefix, draw_tokens, named_prefix_parameters, perturb
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, build_model
from torch import nn
from transformers import PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer, PrefixPlusModel, PrefixStates
from peft_prefix_plus.dropout import PrefixDropout
from peft_prefix_plus.encoders import DirectPrefix
from peft_prefix_plus.geometry import read_geometry

both_kinds = pytest.mark.parametrize("name", ["llama", "gpt2"])
P = len(INIT_TOKEN_IDS)


class Snapshot:
    """Everything of a model that an adapter which was refused must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.ids = draw_tokens()
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.modules = {name: (type(module), module.training) for name, module in model.named_modules()}
        self.configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
        self.num_hooks = len(model._forward_pre_hooks)
        with torch.no_grad():
            self.logits = model(self.ids).logits

    def assert_unchanged(self, model: nn.Module) -> None:
        assert list(model.state_dict()) == list(self.state)
        assert all(torch.equal(tensor, self.state[name]) for name, tensor in model.state_dict().items())
        assert {name: (type(m), m.training) for name, m in model.named_modules()} == self.modules
        for name, module in model.named_modules():
            assert not hasattr(module, "config") or module.config is self.configs[name], name
        assert len(model._forward_pre_hooks) == self.num_hooks
        assert torch.equal(model(self.ids).logits, self.logits)


def list_lengths(model: nn.Module) -> dict[str, int]:
    """Prefix lengths of the adapter `default` by layer, where there is one."""
    return {
        name.removeprefix("base_model.model."): module.prefix_plus_encoder["default"].num_virtual_tokens
        for name, module in model.named_modules()
        if isinstance(module, PrefixPlusLayer) and "default" in module.prefix_plus_encoder
    }


def names(*layers: int) -> list[str]:
    return [f"model.layers.{i}.self_attn" for i in layers]


def add_second(model: PeftModel, name: str = "other", **settings) -> None:
    settings = {"prefix_init_token_ids": [3, 4, 6]} | settings
    model.add_adapter(name, PrefixPlusConfig(task_type="CAUSAL_LM", **settings))


@torch.no_grad()
def run(model: nn.Module, adapters: str | list[str] | None = None) -> torch.Tensor:
    if adapters is not None:
        model.base_model.set_adapter(adapters)
    return model.base_model(draw_tokens()).logits


# Selecting modules


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
        ({"layers_to_transform": [7]}, NoMatchingPeftModuleError, ["`layers_to_transform` [7]"]),
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


def build_t5() -> PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB_SIZE}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def build_bloom() -> PreTrainedModel:
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=VOCAB_SIZE)
    return transformers.BloomForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "task_type", "fragments"),
    [
        (build_t5, "SEQ_2_SEQ_LM", ["T5ForConditionalGeneration", "encoder-decoder", "supported are decoders"]),
        (build_bloom, "CAUSAL_LM", ["BloomForCausalLM", "no attention module", "Llama", "GPT-2"]),
        (lambda: nn.Sequential(nn.Linear(2, 2)), None, ["Sequential", "model of transformers"]),
    ],
)
def test_unsupported_models_raise_and_stay_as_they_are(build, task_type, fragments):
    model = build()
    modules, keys = list(model.modules()), list(model.state_dict())
    with pytest.raises(ValueError) as raised:
        get_peft_model(model, PrefixPlusConfig(task_type=task_type))
    for fragment in fragments:
        assert fragment in str(raised.value)
    assert list(model.modules()) == modules and list(model.state_dict()) == keys


# The model that comes out


def test_the_base_model_is_frozen_and_only_the_prefix_trains():
    model = add_prefix(build_model("llama"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(named_prefix_parameters(model)) != set()
    assert isinstance(model.base_model, PrefixPlusModel)


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_raises_and_names_what_works(method):
    model = add_prefix(build_model("llama"))
    expected = run(model)
    with pytest.raises(ValueError, match=r"cannot be merged.*`unload\(\)`.*`fold_prefix\(\)`"):
        getattr(model, method)()
    assert torch.equal(run(model), expected)


@both_kinds
def test_unload_leaves_no_trace(name):
    base = build_model(name)
    snapshot = Snapshot(base)
    model = add_prefix(base)
    perturb(model)
    run(model)
    assert model.unload() is base
    snapshot.assert_unchanged(base)
    assert not hasattr(base, "peft_config")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        add_prefix(base)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_one_adapter_per_row_is_refused(call):
    model, ids = add_prefix(build_model("llama")), draw_tokens()
    with pytest.raises(ValueError, match=r"`adapter_names`.*not supported.*set_adapter"):
        getattr(model, call)(input_ids=ids, adapter_names=["default", "default"])
    assert model(ids).logits.isfinite().all()


@both_kinds
def test_status_and_parameter_counts(name, capsys):
    model = add_prefix(build_model(name), layers_to_transform=[1])
    add_second(model)
    trained = sum(p.numel() for key, p in named_prefix_parameters(model).items() if ".default." in key)
    status = model.get_model_status()
    assert status.peft_types == {"default": "PREFIX_PLUS", "other": "PREFIX_PLUS"}
    assert status.active_adapters == ["default"] and status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.enabled is True and status.merged_adapters == [] and status.trainable_params == trained
    layers = {layer.name: layer for layer in model.get_layer_status() if layer.module_type == "PrefixPlusLayer"}
    assert [layer.available_adapters for layer in layers.values()] == [["other"], ["default", "other"]]
    assert all(set(layer.devices) == set(layer.available_adapters) for layer in layers.values())
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,} ||" in capsys.readouterr().out
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


HEADS = {
    TaskType.SEQ_CLS: transformers.LlamaForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.LlamaForTokenClassification,
    TaskType.QUESTION_ANS: transformers.LlamaForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: transformers.LlamaModel,
    None: transformers.LlamaModel,
}


@pytest.mark.parametrize("task_type", HEADS)
def test_other_heads(task_type, tmp_path):
    build = HEADS[task_type]
    config = build_model("llama").config

    def build_base() -> PreTrainedModel:
        torch.manual_seed(0)
        model = build(config).eval()
        model.config.pad_token_id = 0
        return model

    ids = draw_tokens()
    model = get_peft_model(build_base(), PrefixPlusConfig(task_type=task_type, prefix_init_token_ids=[3, 4])).eval()
    perturb(model)
    expected, before = model(ids)[0], build_base()(ids)[0]
    assert not torch.allclose(expected, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(build_base(), tmp_path)(ids)[0], expected)


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    model = add_prefix(build_model("llama"), modules_to_save=["norm"])
    norm = model.get_base_model().model.norm.modules_to_save["default"]
    assert all(parameter.requires_grad for parameter in norm.parameters())
    with torch.no_grad():
        norm.weight *= 2
    perturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(build_model("llama"), tmp_path)), run(model))


def test_generation_after_deleting_and_adding_again():
    model = add_prefix(build_model("llama"))
    expected = run(model)
    model.delete_adapter("default")
    model.add_adapter("default", PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=INIT_TOKEN_IDS))
    model.set_adapter("default")
    assert torch.equal(run(model), expected)


# Several adapters


@both_kinds
def test_a_new_adapter_starts_from_the_bare_model_and_is_not_active(name):
    model = add_prefix(build_model(name))
    perturb(model)
    expected = run(model)
    add_second(model)
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model), expected)
    alone = add_prefix(build_model(name), prefix_init_token_ids=[3, 4, 6])
    assert torch.equal(run(model, "other"), run(alone))
    assert torch.equal(run(model, "default"), expected)


def concatenate(model: PeftModel, first: str, second: str) -> None:
    """Give every layer an adapter `both`, whose prefix is that of two adapters, as plain keys and values."""
    for module in model.modules():
        if isinstance(module, PrefixPlusLayer):
            states = module.get_prefix_states([first, second], 1)
            encoder = DirectPrefix(read_geometry(module.base_layer), states.num_virtual_tokens)
            one = torch.ones(1, encoder.geometry.num_key_value_heads, 1, 1)
            encoder.initialize(states, PrefixStates(one, one))
            module.update_layer("both", encoder, PrefixDropout(0.0, "token"))


@both_kinds
@pytest.mark.parametrize(("first", "second"), [("default", "other"), ("other", "default")])
def test_two_active_adapters_are_their_concatenated_prefix(name, first, second):
    model = add_prefix(build_model(name))
    add_second(model)
    perturb(model)
    expected = run(model, [first, second])
    concatenate(model, first, second)
    for module in model.modules():
        if hasattr(module, "prefix_plus_shift"):
            module.update_layer("both", P + 3)
    torch.testing.assert_close(run(model, "both"), expected, atol=1e-6, rtol=1e-5)
    for single in (first, second):
        assert not torch.allclose(run(model, single), expected, atol=1e-3)


def test_two_active_adapters_both_train():
    model = add_prefix(build_model("llama"))
    add_second(model)
    perturb(model)
    model.base_model.set_adapter(["default", "other"])
    ids = draw_tokens()
    model.base_model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in named_prefix_parameters(model).values())


def test_setting_an_adapter_decides_what_trains():
    model = add_prefix(build_model("llama"))
    add_second(model)
    for active, inactive in (("other", "default"), ("default", "other")):
        model.set_adapter(active)
        for name, parameter in named_prefix_parameters(model).items():
            assert parameter.requires_grad is (f".{active}." in name) is not (f".{inactive}." in name)
    model.set_adapter("other", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def get_trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@both_kinds
def test_loading_a_frozen_adapter_beside_it_leaves_training_alone(name, tmp_path):
    model = add_prefix(build_model(name))
    model.save_pretrained(tmp_path)
    trainable = get_trainable(model)
    model.load_adapter(tmp_path, "loaded")
    assert model.active_adapters == ["default"]
    assert get_trainable(model) == trainable


def test_adding_an_adapter_leaves_a_frozen_one_frozen(tmp_path):
    add_prefix(build_model("llama")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    add_second(model)
    assert not any(".default." in name for name in get_trainable(model))


def test_adding_what_does_not_fit_leaves_the_first_adapter_alone():
    model = add_prefix(build_model("gpt2"))
    expected, keys = run(model), list(model.state_dict())
    with pytest.raises(ValueError, match=r"\['c_attn'\].*transformer\.h\.0\.attn"):
        add_second(model, target_modules=["c_attn"])
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == keys
    assert torch.equal(run(model), expected)


@both_kinds
@pytest.mark.parametrize("deleted", ["default", "other"])
def test_deleting_leaves_nothing_behind(name, deleted):
    model = add_prefix(build_model(name))
    alone = {"default": run(model)}
    add_second(model)
    alone["other"] = run(model, "other")
    kept = {"default": "other", "other": "default"}[deleted]
    model.set_adapter(kept)
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [kept] and model.active_adapters == [kept]
    assert not any(deleted in key for key in model.state_dict())
    for module in model.modules():
        for attribute in ("prefix_plus_encoder", "prefix_plus_dropout", "prefix_plus_shift"):
            assert deleted not in vars(module).get("_modules", {}).get(attribute, {})
            assert deleted not in vars(module).get(attribute, {})
    assert torch.equal(run(model), alone[kept])


@both_kinds
def test_deleting_the_last_adapter_gives_the_base_model(name):
    base, ids = build_model(name), draw_tokens()
    expected = base(ids).logits
    model = add_prefix(base)
    model.delete_adapter("default")
    assert torch.equal(run(model), expected)
    assert not any("prefix_plus" in key for key in model.state_dict())


def test_deleting_the_active_adapter_activates_the_other():
    model = add_prefix(build_model("llama"))
    add_second(model)
    expected = run(model, "other")
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(run(model), expected)


def test_adapters_are_saved_and_loaded_one_by_one(tmp_path):
    model = add_prefix(build_model("llama"), projection="linear")
    add_second(model, projection="none")
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "other", "renamed")
    assert torch.equal(run(loaded), run(model))
    assert torch.equal(run(loaded, "renamed"), run(model, "other"))
    assert torch.equal(run(loaded, ["renamed", "default"]), run(model, ["other", "default"]))


# Loading


def save(directory: Path, name: str = "llama", **settings) -> PeftModel:
    model = add_prefix(build_model(name), **settings)
    perturb(model)
    model.save_pretrained(directory)
    return model


def rewrite_weights(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def lose_one(weights: dict) -> None:
    del weights[min(weights)]


def lose_all(weights: dict) -> None:
    weights.clear()


def add_foreign(weights: dict) -> None:
    weights["base_model.model.model.layers.9.self_attn.prefix_plus_encoder.anchor_keys"] = torch.zeros(1)


def misshape(weights: dict) -> None:
    name = next(name for name in weights if name.endswith("output_bias"))
    weights[name] = torch.zeros(len(weights[name]) + 1)


def put_nan(weights: dict) -> None:
    weights[max(name for name in weights if "prefix_plus" in name)].view(-1)[-1] = float("nan")


def put_infinity(weights: dict) -> None:
    weights[min(weights)].view(-1)[0] = float("inf")


def make_integers(weights: dict) -> None:
    weights[min(weights)] = weights[min(weights)].long()


DAMAGES = [lose_one, lose_all, add_foreign, misshape, put_nan, put_infinity, make_integers]
damages = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@both_kinds
@damages
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_weights_that_do_not_fit_raise_and_leave_the_base_model_alone(name, damage, low_cpu_mem_usage, tmp_path):
    save(tmp_path, name)
    rewrite_weights(tmp_path, damage)
    base = build_model(name)
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match="The weights do not fit adapter 'default'"):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    snapshot.assert_unchanged(base)


@both_kinds
def test_a_base_model_can_be_used_again_after_a_failure(name, tmp_path):
    expected = run(save(tmp_path / "good", name))
    save(tmp_path / "bad", name)
    rewrite_weights(tmp_path / "bad", put_nan)
    base = build_model(name)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base, tmp_path / "bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base, tmp_path / "good")
    assert torch.equal(run(loaded), expected)


def test_a_head_that_was_to_be_saved_is_given_back_after_a_failure(tmp_path):
    save(tmp_path, modules_to_save=["norm"])
    rewrite_weights(tmp_path, put_nan)
    base = build_model("llama")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base, tmp_path)
    snapshot.assert_unchanged(base)


@both_kinds
@damages
def test_a_second_adapter_that_does_not_fit_leaves_the_first_alone(name, damage, tmp_path):
    model = save(tmp_path, name)
    rewrite_weights(tmp_path, damage)
    expected, keys = run(model), list(model.state_dict())
    with pytest.raises(ValueError, match="The weights do not fit adapter 'other'"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == keys
    assert torch.equal(run(model), expected)


@both_kinds
def test_weights_that_do_not_fit_an_adapter_in_use_leave_it_alone(name, tmp_path):
    model = save(tmp_path, name)
    rewrite_weights(tmp_path, put_nan)
    expected, keys = run(model), list(model.state_dict())
    with pytest.raises(ValueError, match="The weights do not fit adapter 'default'"):
        model.load_adapter(tmp_path, "default")
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]
    assert torch.equal(run(model), expected)


def test_an_adapter_of_another_model_raises_and_names_both(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/right-one"}))
    base = build_model("llama", num_key_value_heads=4)
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match=r"has shape \(.*but the model needs \(.*org/right-one"):
        PeftModel.from_pretrained(base, tmp_path)
    snapshot.assert_unchanged(base)


@both_kinds
@pytest.mark.parametrize("settings", [{}, {"prefix_init": "vocab"}, {"prefix_init": "random"}], ids=str)
def test_loading_never_runs_the_initialization(name, settings, tmp_path):
    expected = run(save(tmp_path, name, **settings))
    base = build_model(name)
    hook = base.register_forward_pre_hook(lambda *args: pytest.fail("the base model ran"))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    loaded.load_adapter(tmp_path, "other")
    hook.remove()
    assert torch.equal(run(loaded), expected) and torch.equal(run(loaded, "other"), expected)


def test_loading_needs_no_tokenizer(tmp_path):
    save(tmp_path)
    path = tmp_path / "adapter_config.json"
    text = {"prefix_init": "text", "prefix_init_text": "a", "prefix_init_token_ids": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | text | {"tokenizer_name_or_path": "no/where"}))
    PeftModel.from_pretrained(build_model("llama"), tmp_path)


def test_a_saved_configuration_alone_is_no_adapter(tmp_path):
    save(tmp_path)
    model = get_peft_model(build_model("llama"), PrefixPlusConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(RuntimeError, match=r"no values yet.*from_pretrained.*prefix_is_initialized=False"):
        model(draw_tokens())


def test_loading_for_training_and_for_inference(tmp_path):
    save(tmp_path)
    frozen = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert not get_trainable(frozen) and frozen.active_peft_config.inference_mode
    model = PeftModel.from_pretrained(build_model("llama"), tmp_path, is_trainable=True)
    assert get_trainable(model) == set(named_prefix_parameters(model)) != set()
    frozen.load_adapter(tmp_path, "other", is_trainable=True)
    assert get_trainable(frozen) == {name for name in named_prefix_parameters(frozen) if ".other." in name} != set()


def test_training_goes_on_after_loading(tmp_path):
    model = save(tmp_path, num_frozen_tokens=1)
    loaded, ids = PeftModel.from_pretrained(build_model("llama"), tmp_path, is_trainable=True), draw_tokens()
    for twin in (model, loaded):
        optimizer = torch.optim.AdamW(named_prefix_parameters(twin).values(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            twin(ids, labels=ids).loss.backward()
            optimizer.step()
    assert torch.equal(run(loaded), run(model))


@both_kinds
@pytest.mark.parametrize("projection", ["none", "linear", "mlp"])
def test_low_cpu_mem_usage_loads_the_same(name, projection, tmp_path):
    model = save(tmp_path, name, projection=projection)
    loaded = PeftModel.from_pretrained(build_model(name), tmp_path, low_cpu_mem_usage=True)
    assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())
    assert torch.equal(run(loaded), run(model))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert torch.equal(run(loaded, "other"), run(model))


def test_inference_mode_freezes_a_new_adapter():
    model = add_prefix(build_model("llama"), inference_mode=True)
    assert not get_trainable(model) and run(model).isfinite().all()


def test_saving_writes_the_prefix_and_nothing_else(tmp_path):
    model = save(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    own = {key.replace(".default.", ".") for key in model.state_dict() if ".prefix_plus_encoder.default." in key}
    assert set(weights) == own
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_PLUS"


@pytest.mark.parametrize("adapter_name", ["keys", "embedding", "anchor_keys", "self_attn", "layers"])
def test_adapter_names_that_occur_in_other_names(adapter_name, tmp_path):
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if adapter_name == "keys":
        # A method of `ModuleDict`, which every tuner of PEFT keeps its adapters in.
        base = build_model("llama")
        snapshot = Snapshot(base)
        with pytest.raises(KeyError):
            get_peft_model(base, config, adapter_name)
        snapshot.assert_unchanged(base)
        return
    model = get_peft_model(build_model("llama"), config, adapter_name).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path / adapter_name, "default")
    assert torch.equal(run(loaded), run(model))


# Without a PeftModel


@both_kinds
def test_injection_into_a_bare_model(name):
    config, ids = PrefixPlusConfig(prefix_init_token_ids=INIT_TOKEN_IDS), draw_tokens()
    base = build_model(name)
    assert inject_adapter_in_model(config, base) is base
    assert torch.equal(base.eval()(ids).logits, run(add_prefix(build_model(name))))
    perturb(base)
    weights = get_peft_model_state_dict(base)
    assert weights and all("prefix_plus_encoder" in key and ".default" not in key for key in weights)
    other = inject_adapter_in_model(PrefixPlusConfig(prefix_init_token_ids=[1] * P), build_model(name)).eval()
    set_peft_model_state_dict(other, copy.deepcopy(weights))
    assert torch.equal(other(ids).logits, base(ids).logits)


@both_kinds
def test_weights_that_do_not_fit_an_injected_adapter_raise(name):
    base = inject_adapter_in_model(PrefixPlusConfig(prefix_init_token_ids=INIT_TOKEN_IDS), build_model(name)).eval()
    weights, ids = get_peft_model_state_dict(base), draw_tokens()
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    expected = base(ids).logits
    put_nan(weights)
    with pytest.raises(ValueError, match="not finite"):
        set_peft_model_state_dict(base, weights)
    assert torch.equal(base(ids).logits, expected)


@both_kinds
def test_the_route_through_transformers(name, tmp_path):
    base, ids = build_model(name), draw_tokens()
    expected = base(ids).logits
    base.add_adapter(PrefixPlusConfig(prefix_init_token_ids=INIT_TOKEN_IDS))
    base.eval()
    assert torch.equal(base(ids).logits, run(add_prefix(build_model(name))))
    base.add_adapter(PrefixPlusConfig(prefix_init_token_ids=[3, 4, 6]), "other")
    perturb(base)
    other = base.eval()(ids).logits
    assert base.active_adapters() == ["other"]
    base.set_adapter("default")
    default = base(ids).logits
    assert not torch.allclose(default, other)
    base.disable_adapters()
    assert torch.equal(base(ids).logits, expected)
    base.enable_adapters()
    assert torch.equal(base(ids).logits, default)
    base.delete_adapter(["default", "other"])
    assert torch.equal(base(ids).logits, expected)


@both_kinds
def test_an_adapter_loaded_by_transformers_equals_the_saved_one(name, tmp_path):
    expected = run(save(tmp_path, name))
    loaded = build_model(name)
    loaded.load_adapter(str(tmp_path))
    # Not bit for bit: the tensors lie elsewhere in memory, where other kernels read them.
    torch.testing.assert_close(loaded.eval()(draw_tokens()).logits, expected, atol=1e-5, rtol=1e-4)


def test_auto_classes_load_the_adapter_with_its_base_model(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base")
    model = save(tmp_path / "adapter")
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    for auto_class in (AutoPeftModelForCausalLM, transformers.AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(draw_tokens()).logits, run(model), atol=1e-5, rtol=1e-4)


def test_a_prefix_beside_lora_is_captured_from_the_adapted_modules():
    base = inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False), build_model("llama")
    )
    ids, prompt = draw_tokens(), torch.tensor(INIT_TOKEN_IDS).expand(2, -1)
    expected = base.eval()(torch.cat([prompt, ids], dim=1)).logits[:, P:]
    del base.peft_config
    model = add_prefix(base)
    torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=2e-4)
