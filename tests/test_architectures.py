"""What is read off models: heads, dimensions, attention modules, position tables."""

import re

import pytest
import torch
import transformers
from helpers import add_prefix, draw_tokens
from tiny_models import ARCHITECTURES, MAX_POSITIONS, build_model
from torch import nn
from torch.testing import assert_close
from transformers import GPTNeoConfig, PreTrainedConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo_models import build_inputs, build_zoo_model, draw_text

from peft_prefix_plus.architectures import (
    belongs_to_text,
    compute_key_bias,
    count_attention_calls,
    count_positions,
    explain_missing_attention,
    find_attention_call,
    find_attention_modules,
    find_first_position,
    find_input_shapes,
    find_numbered_stacks,
    find_owner,
    find_position_tables,
    find_stacks,
    is_attention_module,
    is_cross_attention,
    iterate_base_modules,
    read_batch_size,
    read_geometry,
    takes_tokens,
    uses_absolute_positions,
    uses_attention_interface,
    uses_sectioned_rotary,
)
from peft_prefix_plus.attention import record_states

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
    with torch.no_grad(), record_states(list(modules.values())) as recorder:
        model(draw_tokens())
    recording = recorder.get_states()
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


def test_cross_attention_is_found_and_told_apart_by_its_name():
    names = list(find_attention_modules(build_model("gpt2", add_cross_attention=True)))
    assert names == [f"transformer.h.{i}.{kind}" for i in range(2) for kind in ("attn", "crossattention")]
    assert [is_cross_attention(name) for name in names] == [False, True] * 2


@pytest.mark.parametrize(
    ("model_type", "cross"),
    [
        ("bart", "encoder_attn"),
        ("t5", "EncDecAttention"),
        ("prophetnet", "cross_attn"),
        ("blenderbot", "encoder_attn"),
    ],
)
def test_an_encoder_decoder_has_three_kinds_of_attention(model_type, cross):
    names = list(find_attention_modules(build_zoo_model("seq2seq", model_type)))
    crossing = [name for name in names if is_cross_attention(name)]
    assert crossing == [name for name in names if name.endswith(cross)] and len(crossing) == 2
    own = [name for name in names if name not in crossing]
    assert sum(".encoder." in f".{name}" for name in own) == sum(".decoder." in f".{name}" for name in own) == 2


def test_attention_call_is_found_in_parent_classes():
    class Child(LlamaAttention):
        pass

    assert find_attention_call(Child) is find_attention_call(LlamaAttention)
    assert find_attention_call(Child).__globals__["eager_attention_forward"].__module__ == LlamaAttention.__module__


def test_modules_that_compute_no_attention_are_no_attention_modules():
    model = build_model("llama")
    assert find_attention_call(nn.Linear) is None
    assert not is_attention_module(nn.Linear(2, 2))
    assert not is_attention_module(model), "a whole model names the interface, but never calls it"
    assert not is_attention_module(model.model.layers[0])
    assert is_attention_module(model.model.layers[0].self_attn)


def test_attention_without_the_interface_is_known_by_its_softmax():
    model = build_zoo_model("causal", "bloom")
    modules = find_attention_modules(model)
    assert list(modules) == ["transformer.h.0.self_attention", "transformer.h.1.self_attention"]
    assert all(is_attention_module(module) and not uses_attention_interface(module) for module in modules.values())
    assert not is_attention_module(model) and not is_attention_module(model.transformer.h[0].mlp)


@pytest.mark.parametrize(
    ("group", "model_type", "reason"),
    [
        ("causal", "mamba", "state-space"),
        ("causal", "rwkv", "state-space"),
        ("encoder", "nystromformer", "NystromformerSelfAttention.*no prefix"),
        ("encoder", "fnet", "no softmax attention"),
    ],
)
def test_what_has_no_attention_to_carry_a_prefix_is_said(group, model_type, reason):
    model = build_zoo_model(group, model_type)
    assert not find_attention_modules(model)
    assert re.search(reason, explain_missing_attention(model))


@pytest.mark.parametrize(
    ("group", "model_type", "settings"),
    [
        ("causal", "jetmoe", {}),
        ("causal", "doge", {}),
        ("causal", "diffllama", {}),
        ("causal", "bloom", {}),
        ("causal", "mpt", {}),
        ("causal", "gptj", {}),
        ("causal", "gpt_neo", {}),
        ("causal", "openai-gpt", {}),
        ("causal", "xlm", {}),
        ("causal", "xlnet", {}),
        ("causal", "falcon", {}),
        ("causal", "falcon", {"multi_query": False}),
        ("causal", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("encoder", "deberta-v2", {}),
        ("encoder", "bert", {}),
    ],
    ids=str,
)
def test_geometry_is_what_reaches_the_products(group, model_type, settings):
    model = build_zoo_model(group, model_type, **settings)
    modules = find_attention_modules(model)
    with torch.no_grad(), record_states(list(modules.values())) as recorder:
        model(draw_text(batch_size=1))
    assert len(modules) == len(recorder.get_states()) == 2
    for module, states in recorder.get_states().items():
        geometry = read_geometry(module)
        assert states.keys.shape == (1, geometry.num_key_value_heads, 7, geometry.key_dim)
        assert states.values.shape == (1, geometry.num_key_value_heads, 7, geometry.value_dim)


def test_the_batch_is_read_off_whatever_the_module_gets_first():
    llama, xlnet = (
        next(iter(find_attention_modules(model).values()))
        for model in (build_model("llama"), build_zoo_model("causal", "xlnet"))
    )
    hidden_states = torch.zeros(3, 5, 32)
    assert read_batch_size(llama, (hidden_states,), {}) == 3
    assert read_batch_size(llama, (), {"attention_mask": None, "hidden_states": hidden_states}) == 3
    assert read_batch_size(llama, (hidden_states[0],), {}) == 1, "texts in a row share one prefix"
    assert read_batch_size(xlnet, (hidden_states,), {}) == 5


def test_only_diffllama_calls_its_attention_function_twice():
    for model_type, calls in (("diffllama", 2), ("llama", 1), ("bloom", 1)):
        modules = find_attention_modules(build_zoo_model("causal", model_type))
        assert {count_attention_calls(module) for module in modules.values()} == {calls}


def test_the_bias_of_a_key_is_that_of_the_model():
    module = next(iter(find_attention_modules(build_zoo_model("causal", "doge")).values()))
    with torch.no_grad():
        module.A.uniform_(0.5, 1.5)
    geometry = read_geometry(module)
    values = torch.randn(1, geometry.num_key_value_heads, 5, geometry.value_dim)
    bias = compute_key_bias(module, values)
    assert bias.shape == (1, module.config.num_attention_heads, 1, 5)
    steps = module.dt_proj(values.transpose(1, 2).reshape(1, 5, -1))
    dynamic = torch.exp(module.A * nn.functional.softplus(steps)).transpose(-1, -2)
    # Five keys are fewer than the model keeps, so its mask is the bias itself.
    expected = module.prepare_dynamic_mask(torch.zeros(1, 5, 8), dynamic, module.keep_window_size)
    assert_close(bias.expand(-1, -1, 5, -1)[:, :: module.num_key_value_groups], expected)
    assert compute_key_bias(build_model("llama").model.layers[0].self_attn, values) is None


def test_the_models_around_a_module_are_listed_from_the_outside():
    model = build_zoo_model("multimodal", "llava")
    text = "model.language_model.layers.0.self_attn"
    image = "model.vision_tower.encoder.layers.0.self_attn"
    assert find_stacks(model, text) == ["", "model", "model.language_model"]
    assert (find_owner(model, text), find_owner(model, image)) == ("model.language_model", "model.vision_tower")
    assert belongs_to_text(model, text) and not belongs_to_text(model, image)
    assert takes_tokens(model) and not takes_tokens(model.model.vision_tower)
    assert find_numbered_stacks(model)[0] is model


def test_the_shapes_of_images_and_sound_are_those_that_the_models_take():
    for group, model_type in (("vision", "vit"), ("vision", "clip_vision_model")):
        model = build_zoo_model(group, model_type)
        (shape,) = find_input_shapes(model).values()
        assert shape == (1, *build_inputs(group, model)["pixel_values"].shape[1:])
    whisper = build_zoo_model("seq2seq", "whisper")
    (shape,) = find_input_shapes(whisper).values()
    assert shape == (1, *build_inputs("seq2seq", whisper)["input_features"].shape[1:])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*'input_ids' is not known.*exclude_modules"):
        find_input_shapes(build_model("llama"))


@pytest.mark.parametrize(
    ("model_type", "is_absolute"),
    [("ctrl", True), ("ministral3", True), ("llama", False), ("bloom", False), ("gptj", True), ("codegen", True)],
)
def test_models_without_a_table_may_depend_on_where_a_text_starts(model_type, is_absolute):
    model = build_zoo_model("causal", model_type)
    assert not find_position_tables(model)
    assert uses_absolute_positions(model) is is_absolute


@pytest.mark.parametrize(("group", "model_type", "first"), [("causal", "gpt2", 0), ("encoder", "roberta", 1)])
def test_the_first_position_is_the_row_that_the_first_token_takes(group, model_type, first):
    model = build_zoo_model(group, model_type)
    (table,) = find_position_tables(model).values()
    rows = []
    table.register_forward_hook(lambda module, args, output: rows.append(output[0, 0]))
    model(draw_text())
    assert find_first_position(table) == first
    assert torch.equal(rows[0], table.weight[first])


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


def test_attention_classes_that_call_flash_kernels_by_themselves_are_refused_with_the_remedy():
    class ToyFlashAttention2(GPTNeoSelfAttention):
        pass

    model = nn.Module()
    model.attention = ToyFlashAttention2(GPTNeoConfig(hidden_size=8, num_heads=2), "global", layer_id=0)
    assert not find_attention_modules(model)
    assert "attn_implementation='sdpa'" in explain_missing_attention(model)
