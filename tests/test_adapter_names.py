"""Adapter names that are parts of each other, of keys or of the method's own words: each adapter stays its own."""

import warnings

import pytest
import torch
from helpers import add_prefix, named_prefix_parameters, run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import build_model

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer, hotswap_adapter, prepare_model_for_compiled_hotswap

# Every group is on one model at the same time.
GROUPS = [
    ["a", "ab", "b", "aba"],
    ["default", "default2", "default_2", "fault"],
    ["prefix_plus", "prefix_plus_", "prefix_plus_encoder", "prefix_plus_dropout", "prefix_plus_shift"],
    ["anchor_keys", "scale_values", "delta_keys", "embedding", "output_weight", "visible"],
    ["weight", "bias", "base_layer", "base_model", "model", "modules_to_save", "active_adapter"],
    ["self_attn", "layers", "mlp", "attn", "q_proj"],
    ["0", "1", "10", "-1", "a-b", "a_b", "a b", "Ä", "a/b"],
    ["lora_A", "lora_", "cat", "linear", "adapter", "None"],
]
groups = pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
INVALID = ["a.b", "", "keys", "half", "forward", "pop"]


def build_config(number: int, **settings: object) -> PrefixPlusConfig:
    tokens = [3 + number, 4, 6 + number]
    return PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=tokens, projection_dim=8, **settings)


@torch.no_grad()
def build(names: list[str], base: str = "llama", **settings: object) -> PeftModel:
    """A model with an adapter for each name, no two alike."""
    with warnings.catch_warnings():
        # PEFT warns of names that are part of the method's prefix.
        warnings.simplefilter("ignore", UserWarning)
        model = get_peft_model(build_model(base), build_config(0, **settings), adapter_name=names[0])
        for number, name in enumerate(names[1:], start=1):
            model.add_adapter(name, build_config(number, **settings))
    generator = torch.Generator().manual_seed(2)
    for parameter in named_prefix_parameters(model).values():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def run_all(model: PeftModel) -> dict[str, torch.Tensor]:
    outputs = {name: run(model, name) for name in model.peft_config}
    assert len({output.sum().item() for output in outputs.values()}) == len(outputs)
    return outputs


def assert_equal(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given.keys() == expected.keys()
    assert [name for name in given if not torch.equal(given[name], expected[name])] == []


@groups
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_each_is_saved_and_loaded_as_itself(names, base, tmp_path):
    model = build(names, base)
    expected = run_all(model)
    for number, name in enumerate(names):
        model.save_pretrained(tmp_path / str(number), selected_adapters=[name])
        folder = tmp_path / str(number) if name == "default" else tmp_path / str(number) / name
        assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 8
        # Under every other name of the group as well.
        other = names[number - 1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loaded = PeftModel.from_pretrained(build_model(base), folder, adapter_name=other)
        assert torch.equal(run(loaded, other), expected[name])


def test_layers_do_not_lose_their_prefix_to_adapters_that_are_numbered_like_them(tmp_path):
    """PEFT leaves out keys with the names of other adapters in them; LoRA loses weights so."""
    names = ["0", "1", "10"]
    build(names).save_pretrained(tmp_path)
    assert {name: len(load_file(tmp_path / name / "adapter_model.safetensors")) for name in names} == dict.fromkeys(
        names, 16
    )


@groups
def test_each_is_deleted_alone(names):
    model = build(names)
    expected = run_all(model)
    for name in names[:-1]:
        model.set_adapter(names[-1])
        model.delete_adapter(name)
        del expected[name]
        assert_equal(run_all(model), expected)
        assert not any(
            name in module.list_adapters() for module in model.modules() if isinstance(module, PrefixPlusLayer)
        )


@groups
@pytest.mark.parametrize("is_prepared", [False, True], ids=["loaded", "prepared"])
def test_each_is_swapped_alone(names, is_prepared, tmp_path):
    add_prefix(build_model("llama"), prefix_init_token_ids=[50, 60]).save_pretrained(tmp_path)
    new = run(PeftModel.from_pretrained(build_model("llama"), tmp_path))
    model = build(names)
    if is_prepared:
        prepare_model_for_compiled_hotswap(model, num_virtual_tokens=4)
    expected = run_all(model)
    for name in names:
        before = expected[name]
        hotswap_adapter(model, str(tmp_path), name)
        expected[name] = run(model, name)
        torch.testing.assert_close(expected[name], new, atol=2e-5, rtol=1e-4)
        assert {n: torch.equal(run(model, n), expected[n]) for n in names} == dict.fromkeys(names, True)
        assert not torch.equal(expected[name], before)


@groups
def test_each_is_folded_and_combined_alone(names):
    model = build(names)
    expected = run_all(model)
    model.base_model.fold_prefix(names[0])
    assert [name for name in names if model.peft_config[name].projection == "none"] == [names[0]]
    expected[names[0]] = run(model, names[0])
    joined = run(model, names[:2])
    model.add_weighted_adapter(names[:2], None, "joined", combination_type="cat")
    assert torch.equal(run(model, "joined"), joined)
    model.set_adapter(names[0])
    model.delete_adapter("joined")
    assert_equal(run_all(model), expected)


@groups
@torch.no_grad()
def test_each_has_its_own_trained_module(names):
    model = build(names, modules_to_save=["norm"])
    wrapper = model.get_base_model().model.norm
    for number, name in enumerate(names, start=2):
        wrapper.modules_to_save[name].weight *= number
    expected = run_all(model)
    model.set_adapter(names[-1])
    model.delete_adapter(names[0])
    del expected[names[0]]
    assert_equal(run_all(model), expected)


@pytest.mark.parametrize("name", INVALID)
def test_a_name_that_torch_refuses_is_refused_for_lora_too_and_changes_nothing(name):
    lora = get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises((KeyError, ValueError)):
            lora.add_adapter(name, LoraConfig(target_modules=["q_proj"]))
        model = build(["default"])
        state, expected = set(model.state_dict()), run(model)
        with pytest.raises((KeyError, ValueError)):
            model.add_adapter(name, build_config(1))
        assert set(model.state_dict()) == state and list(model.peft_config) == ["default"]
        assert torch.equal(run(model), expected)
        base = build_model("llama")
        with pytest.raises((KeyError, ValueError)):
            get_peft_model(base, build_config(1), adapter_name=name)
        assert not any(isinstance(module, PrefixPlusLayer) for module in base.modules())
