"""Loading: what fits is loaded as it was saved, what does not leaves the model as it was."""

import json
import warnings

import pytest
import torch
from helpers import (
    Snapshot,
    add_foreign,
    add_prefix,
    both_kinds,
    draw_tokens,
    get_trainable,
    lose_all,
    lose_one,
    make_integers,
    misshape,
    named_prefix_parameters,
    perturb,
    put_infinity,
    put_nan,
    rewrite_weights,
    run,
    save,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import build_model

from peft_prefix_plus import PrefixPlusConfig

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


def test_an_adapter_without_values_is_not_saved(tmp_path):
    save(tmp_path / "whole")
    config = PrefixPlusConfig.from_pretrained(tmp_path / "whole")
    model = get_peft_model(build_model("llama"), config)
    with pytest.raises(RuntimeError, match="no values yet"):
        model.save_pretrained(tmp_path / "empty")
    assert not (tmp_path / "empty" / "adapter_model.safetensors").exists()
