"""The layer around one attention module: routing, adapters, and being out of the way."""

import copy

import pytest
import torch
from helpers import INIT_TOKEN_IDS, add_prefix, draw_tokens, perturb
from peft import PeftModel
from tiny_models import ARCHITECTURES, build_model
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer
from peft_prefix_plus.attention import ROUTE_NAME
from peft_prefix_plus.layer import PrefixPlusLayerBase, list_layers


def first_layer(model: PeftModel) -> PrefixPlusLayer:
    return next(module for module in model.modules() if isinstance(module, PrefixPlusLayer))


def build_pair(**settings) -> PeftModel:
    """A model with the adapters `default` (active) and `other`, of 5 and 3 tokens."""
    model = add_prefix(build_model("llama"), **settings)
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=[3, 4, 5]))
    perturb(model)
    return model.eval()


def is_routed(layer: PrefixPlusLayer) -> bool:
    return layer.base_layer.config._attn_implementation == ROUTE_NAME


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_are_listed_once_each_in_the_order_of_the_modules(name):
    model = add_prefix(build_model(name))
    model.register_module("nothing", None)
    model.register_module("again", first_layer(model))
    for layer_class in (PrefixPlusLayer, PrefixPlusLayerBase):
        expected = [module for module in model.modules() if isinstance(module, layer_class)]
        assert list_layers(model, layer_class) == expected


def test_the_layer_answers_for_the_module_inside():
    layer = first_layer(add_prefix(build_model("llama")))
    assert isinstance(layer.base_layer, LlamaAttention)
    for name in ("head_dim", "layer_idx", "is_causal", "scaling"):
        assert getattr(layer, name) == getattr(layer.base_layer, name)
    assert layer.q_proj is layer.base_layer.q_proj
    with pytest.raises(AttributeError, match="LlamaAttention"):
        layer.no_such_name  # noqa: B018


def test_a_layer_without_its_module_raises_and_does_not_recurse():
    with pytest.raises(AttributeError, match="base_layer"):
        PrefixPlusLayer.__new__(PrefixPlusLayer).base_layer  # noqa: B018


def test_the_module_is_routed_only_while_a_prefix_is_active():
    model = build_pair()
    layer, original = first_layer(model), model.get_base_model().config
    assert is_routed(layer)
    with model.disable_adapter():
        assert layer.base_layer.config is original
    assert is_routed(layer)
    model.base_model.set_adapter([])
    assert layer.base_layer.config is original
    model.base_model.set_adapter(["other", "default"])
    assert is_routed(layer)
    model.delete_adapter("default")
    assert is_routed(layer)
    model.delete_adapter("other")
    assert layer.base_layer.config is original


def test_unloading_gives_back_the_module_and_its_config():
    base = build_model("llama")
    modules, config = dict(base.named_modules()), base.config
    unloaded = add_prefix(base).unload()
    assert unloaded is base and dict(base.named_modules()) == modules
    assert all(layer.self_attn.config is config for layer in base.model.layers)


def test_the_models_own_config_never_names_the_route():
    base = build_model("llama")
    before = base.config.to_dict()
    model = add_prefix(base)
    model(draw_tokens())
    assert base.config._attn_implementation == "sdpa"
    assert base.config.to_dict() == before and base.model.config is base.config


def test_effective_adapters_are_the_active_ones_in_their_order():
    model = build_pair()
    layer = first_layer(model)
    assert sorted(layer.list_adapters()) == ["default", "other"]
    assert layer.list_effective_adapters() == ["default"]
    model.base_model.set_adapter(["other", "default"])
    assert layer.list_effective_adapters() == ["other", "default"]
    layer.enable_adapters(False)
    assert layer.list_effective_adapters() == []


def test_an_adapter_that_a_layer_does_not_have_is_passed_over():
    model, ids = add_prefix(build_model("llama"), layers_to_transform=[0]), draw_tokens()
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", layers_to_transform=[1], num_virtual_tokens=3))
    layers = model.get_base_model().model.layers
    assert [layer.self_attn.list_effective_adapters() for layer in layers] == [["default"], []]
    assert [is_routed(layer.self_attn) for layer in layers] == [True, False]
    model.set_adapter("other")
    assert [layer.self_attn.list_effective_adapters() for layer in layers] == [[], ["other"]]
    assert model(ids).logits.isfinite().all()


def test_states_of_several_adapters_stand_one_behind_the_other():
    layer = first_layer(build_pair())
    one, other = (layer.get_prefix_states([name], 2) for name in ("default", "other"))
    both = layer.get_prefix_states(["other", "default"], 2)
    assert torch.equal(both.keys, torch.cat([other.keys, one.keys], dim=-2))
    assert torch.equal(both.values, torch.cat([other.values, one.values], dim=-2))


def test_dropout_of_one_adapter_leaves_the_other_visible():
    layer = first_layer(build_pair(prefix_dropout=0.6)).train()
    states = layer.get_prefix_states(["default", "other"], 16)
    assert states.mask.shape == (16, len(INIT_TOKEN_IDS) + 3)
    assert not states.mask[:, : len(INIT_TOKEN_IDS)].all() and states.mask[:, len(INIT_TOKEN_IDS) :].all()


def test_positional_and_named_hidden_states_are_equal():
    model, hidden_states = build_pair(), torch.randn(2, 4, 32)
    layer = first_layer(model)
    rotary = model.get_base_model().model.rotary_emb(hidden_states, torch.arange(4)[None])
    expected = layer(hidden_states, rotary, None)[0]
    named = layer(hidden_states=hidden_states, position_embeddings=rotary, attention_mask=None)[0]
    assert torch.equal(named, expected)


def test_without_effective_adapters_the_module_runs_alone():
    model, hidden_states = build_pair(), torch.randn(2, 4, 32)
    layer = first_layer(model)
    rotary = model.get_base_model().model.rotary_emb(hidden_states, torch.arange(4)[None])
    with_prefix = layer(hidden_states, rotary, None)[0]
    layer.enable_adapters(False)
    alone = layer(hidden_states, rotary, None)[0]
    assert torch.equal(alone, layer.base_layer(hidden_states, rotary, None)[0])
    assert not torch.allclose(alone, with_prefix)


@pytest.mark.parametrize("training", [True, False])
def test_new_layers_take_over_the_mode_of_their_module(training):
    base = build_model("llama").train(training)
    model = PeftModel(base, PrefixPlusConfig(num_virtual_tokens=3, prefix_dropout=0.5))
    assert all(module.training is training for module in first_layer(model).modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_copied_layers_are_independent(name):
    model, ids = add_prefix(build_model(name)), draw_tokens()
    perturb(model)
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, expected)
    perturb(twin)
    twin.base_model.disable_adapter_layers()
    assert not torch.allclose(twin(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


def test_moving_the_dtype_of_the_base_keeps_the_prefix_working():
    model, ids = build_pair(), draw_tokens()
    expected = model(ids).logits
    model.to(torch.float64)
    assert_close(model(ids).logits, expected.double(), atol=1e-4, rtol=1e-3)
