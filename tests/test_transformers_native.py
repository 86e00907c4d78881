"""The adapter methods of transformers' own models: what they share with `PeftModel`, and where they refuse."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import both_kinds, draw_tokens, get_trainable
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import build_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer


def build_config(**settings: Any) -> PrefixPlusConfig:
    return PrefixPlusConfig(task_type="CAUSAL_LM", **{"num_virtual_tokens": 4, "projection_dim": 8} | settings)


@torch.no_grad()
def move(model: nn.Module, adapter: str = "default", seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if adapter in name.split("."):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=draw_tokens()).logits


def add(model: PreTrainedModel, adapter: str = "default", seed: int = 2, **settings: Any) -> PreTrainedModel:
    model.add_adapter(build_config(**settings), adapter_name=adapter)
    move(model, adapter, seed)
    return model


def save(directory: Path, name: str, **settings: Any) -> torch.Tensor:
    """Save an adapter with PEFT; the logits with it."""
    model = get_peft_model(build_model(name), build_config(**settings))
    move(model)
    model.save_pretrained(directory)
    return run(model)


@both_kinds
def test_an_added_adapter_equals_that_of_a_peft_model(name):
    """The same parameters by the same names, without PEFT's own prefix; the same outputs; the same file."""
    torch.manual_seed(1)
    wrapped = get_peft_model(build_model(name), build_config())
    torch.manual_seed(1)
    native = build_model(name)
    native.add_adapter(build_config())
    for model in (wrapped, native):
        move(model)
    theirs = {key.removeprefix("base_model.model."): p for key, p in wrapped.named_parameters() if p.requires_grad}
    assert set(theirs) == get_trainable(native)
    for key, parameter in native.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(theirs[key])
    assert torch.equal(run(native), run(wrapped))
    saved = get_peft_model_state_dict(wrapped)
    assert {f"base_model.model.{key}" for key in native.get_adapter_state_dict()} == set(saved)


@both_kinds
def test_a_saved_adapter_is_read_by_either(name, tmp_path):
    expected = save(tmp_path / "peft", name)
    native = build_model(name)
    native.load_adapter(str(tmp_path / "peft"))
    assert torch.equal(run(native), expected)
    native.save_pretrained(tmp_path / "native")
    first, second = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("peft", "native"))
    assert set(first) == set(second) and all(torch.equal(second[key], tensor) for key, tensor in first.items())
    assert torch.equal(run(PeftModel.from_pretrained(build_model(name), tmp_path / "native")), expected)


@both_kinds
def test_disabled_and_deleted_is_the_base_model(name):
    base = build_model(name)
    expected = run(base)
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = add(base)
    adapted = run(model)
    assert not torch.equal(adapted, expected)
    model.disable_adapters()
    assert torch.equal(run(model), expected)
    model.enable_adapters()
    assert torch.equal(run(model), adapted)
    model.delete_adapter("default")
    assert torch.equal(run(model), expected)
    assert not hasattr(model, "peft_config")
    tensors = {key.replace(".base_layer.", "."): tensor for key, tensor in model.state_dict().items()}
    assert set(tensors) == set(state) and all(torch.equal(tensors[key], tensor) for key, tensor in state.items())


@both_kinds
def test_adapters_in_different_layers_are_switched_together(name):
    model = build_model(name)
    expected = run(model)
    add(model, "first", layers_to_transform=[0])
    first = run(model)
    add(model, "second", seed=3, layers_to_transform=[1], projection="none")
    model.set_adapter("first")
    assert torch.equal(run(model), first)
    model.set_adapter(["second", "first"])
    assert model.active_adapters() == ["second", "first"]
    assert not torch.equal(run(model), first)
    model.disable_adapters()
    assert torch.equal(run(model), expected)
    model.enable_adapters()
    model.set_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(run(model), first)


@both_kinds
def test_generation_equals_recomputation(name):
    model = add(build_model(name))
    ids = draw_tokens()
    tokens = model.eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tokens.tolist() == ids.tolist()


def test_loading_does_not_initialize_and_freezes(tmp_path, monkeypatch):
    """A saved configuration says that its weights exist."""
    expected = save(tmp_path, "llama", prefix_init_token_ids=[3, 4, 5])
    forwards = []
    monkeypatch.setattr(nn.Module, "__call__", _count_calls(forwards))
    model = build_model("llama")
    model.load_adapter(str(tmp_path))
    assert not forwards
    monkeypatch.undo()
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, PrefixPlusLayer) for p in m.parameters())
    assert torch.equal(run(model), expected)


def _count_calls(calls: list[str]):
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return original(module, *args, **kwargs)

    return call


def test_a_trainable_adapter_is_the_only_thing_that_is_trained(tmp_path):
    save(tmp_path, "llama")
    model = build_model("llama").requires_grad_(False)
    model.load_adapter(str(tmp_path), is_trainable=True)
    ids = draw_tokens()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = get_trainable(model)
    assert trained == {key for key, p in model.named_parameters() if "default" in key.split(".")}
    assert all(p.grad is not None for key, p in model.named_parameters() if key in trained)


@both_kinds
def test_low_cpu_mem_usage_loads_the_same(name, tmp_path):
    expected = save(tmp_path, name)
    model = build_model(name)
    model.load_adapter(str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(run(model), expected)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_a_state_dict_needs_a_configuration_that_says_so():
    """Without files the weights come as a state dict; what starts from the configuration is then overwritten."""
    model = add(build_model("llama"))
    other = build_model("llama")
    other.load_adapter(adapter_state_dict=model.get_adapter_state_dict(), peft_config=build_config())
    assert torch.equal(run(other), run(model))


def test_a_copy_is_independent():
    model = add(build_model("llama"))
    expected = run(model)
    twin = copy.deepcopy(model)
    twin.delete_adapter("default")
    assert torch.equal(run(twin), run(build_model("llama")))
    assert torch.equal(run(model), expected)


def test_the_adapter_beside_its_base_model_is_loaded_with_it(tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    expected = save(tmp_path, "llama")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_the_adapter_finds_its_base_model(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), build_config())
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), run(model))


def test_hotswapping_is_refused_and_changes_nothing(tmp_path):
    """The argument of transformers is for LoRA; `peft_prefix_plus.hotswap` has its own function."""
    save(tmp_path, "llama")
    model = add(build_model("llama"))
    expected = run(model)
    with pytest.raises(ValueError, match="hotswap=False"):
        model.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model: model.add_adapter(build_config()), "already exists"),
        (lambda model: model.set_adapter("missing"), "missing"),
        (lambda model: model.delete_adapter("missing"), "missing"),
        (lambda model: model.add_adapter(build_config(target_modules=["nothing"]), adapter_name="new"), "nothing"),
    ],
)
def test_a_refusal_changes_nothing(wrong, message):
    model = add(build_model("llama"))
    expected, keys = run(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        wrong(model)
    assert torch.equal(run(model), expected)
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]


@both_kinds
def test_after_a_refusal_another_adapter_is_added(name):
    model = build_model(name)
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing"):
            model.add_adapter(build_config(target_modules=["nothing"]))
        with pytest.raises(ValueError, match="No adapter loaded"):
            model.set_adapter("default")
    expected = run(model)
    assert not torch.equal(run(add(model)), expected)
