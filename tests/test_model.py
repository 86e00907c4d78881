"""The tuner: PEFT's whole interface on top of it, with one adapter, with several, and without a `PeftModel`."""

import copy
import warnings

import pytest
import torch
import transformers
from helpers import (
    INIT_TOKEN_IDS,
    Snapshot,
    add_prefix,
    add_second,
    both_kinds,
    draw_tokens,
    get_trainable,
    named_prefix_parameters,
    perturb,
    put_nan,
    run,
    save,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tiny_models import build_model
from transformers import PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer, PrefixPlusModel, PrefixStates
from peft_prefix_plus.architectures import read_geometry
from peft_prefix_plus.dropout import PrefixDropout
from peft_prefix_plus.encoders import DirectPrefix

P = len(INIT_TOKEN_IDS)


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
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    base = inject_adapter_in_model(config, build_model("llama"), adapter_name="lora")
    ids, prompt = draw_tokens(), torch.tensor(INIT_TOKEN_IDS).expand(2, -1)
    expected = base.eval()(torch.cat([prompt, ids], dim=1)).logits[:, P:]
    del base.peft_config
    model = add_prefix(base)
    torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=2e-4)
