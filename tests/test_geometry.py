"""What is read off models: heads, dimensions, attention modules, position tables."""

import pytest
import torch
import transformers
from helpers import add_prefix, draw_tokens
from tiny_models import ARCHITECTURES, MAX_POSITIONS, build_model
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_prefix_plus.attention import record_states
from peft_prefix_plus.geometry import (
    count_positions,
    find_attention_call,
    find_attention_modules,
    find_position_tables,
    is_attention_module,
    is_cross_attention,
    iterate_base_modules,
    read_geometry,
    uses_sectioned_rotary,
)

architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def build_latent_model() -> transformers.PreTrainedModel:
    """Latent attention: keys and values of different sizes."""
    config = transformers.DeepseekV3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def assert_geometry_is_what_reaches_attention(model: transformers.PreTrainedModel) -> None:
    modules = find_attention_modules(model)
    with torch.no_grad(), record_states(list(modules.values())) as recording:
        model(draw_tokens())
    assert len(modules) == model.config.num_hidden_layers == len(recording)
    for module in modules.values():
        geometry, states = read_geometry(module), recording[module]
        assert states.keys.shape[1::2] == (geometry.num_key_value_heads, geometry.key_dim)
        assert states.values.shape[1::2] == (geometry.num_key_value_heads, geometry.value_dim)
        assert states.keys.device == geometry.device


@architectures
def test_geometry_is_what_reaches_the_attention_function(name):
    assert_geometry_is_what_reaches_attention(build_model(name))


def test_geometry_of_latent_attention_has_two_dimensions():
    model = build_latent_model()
    assert_geometry_is_what_reaches_attention(model)
    geometry = read_geometry(model.model.layers[0].self_attn)
    assert (geometry.key_dim, geometry.value_dim) == (12, 6)


def test_geometry_error_names_the_way_out():
    module = nn.Linear(2, 2)
    module.config = PreTrainedConfig()
    with pytest.raises(ValueError, match=r"Linear.*num_key_value_heads.*exclude_modules"):
        read_geometry(module)


@architectures
def test_attention_modules_have_equal_names_with_and_without_adapters(name):
    model = build_model(name)
    names, base_names = list(find_attention_modules(model)), [n for n, _ in iterate_base_modules(model)]
    modules = list(find_attention_modules(model).values())
    assert len(names) == model.config.num_hidden_layers
    add_prefix(model)
    assert list(find_attention_modules(model)) == names
    assert list(find_attention_modules(model).values()) == modules
    assert set(base_names) <= {n for n, _ in iterate_base_modules(model)}


def test_cross_attention_is_left_out():
    model = build_model("gpt2", add_cross_attention=True)
    names = list(find_attention_modules(model))
    assert names == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert is_cross_attention(model.transformer.h[0].crossattention)
    assert not is_cross_attention(model.transformer.h[0].attn)


def test_attention_call_is_found_in_parent_classes():
    class Child(LlamaAttention):
        pass

    assert find_attention_call(Child) is find_attention_call(LlamaAttention)
    assert find_attention_call(Child).__globals__["eager_attention_forward"].__module__ == LlamaAttention.__module__


def test_modules_without_the_interface_are_no_attention_modules():
    model = build_model("llama")
    assert find_attention_call(nn.Linear) is None
    assert not is_attention_module(nn.Linear(2, 2))
    assert not is_attention_module(model), "a whole model names the interface, but never calls it"
    assert not is_attention_module(model.model.layers[0])
    assert is_attention_module(model.model.layers[0].self_attn)


@architectures
def test_position_tables_are_found_where_positions_are_learned(name):
    model = build_model(name)
    tables = find_position_tables(model)
    assert bool(tables) is ARCHITECTURES[name].learned_positions
    assert all(count_positions(table) == MAX_POSITIONS for table in tables.values())
    assert not uses_sectioned_rotary(model)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_position_tables_have_equal_names_with_and_without_adapters(name):
    model = build_model(name)
    tables = find_position_tables(model)
    add_prefix(model)
    assert find_position_tables(model) == tables


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_last_position_that_is_counted_exists(name):
    model = build_model(name)
    model(draw_tokens(1, MAX_POSITIONS))
    with pytest.raises(IndexError):
        model(draw_tokens(1, MAX_POSITIONS + 1))


def test_sectioned_rotary_is_recognised():
    model = build_model("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "mrope_section": [1, 1, 2]}
    assert uses_sectioned_rotary(model)
