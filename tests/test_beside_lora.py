"""LoRA and a prefix in the same model: both are trained, saved and loaded.

LoRA comes first: PEFT puts no layers of one method into those of another, and a prefix wraps whole attention modules.
"""

import pytest
import torch
from helpers import INIT_TOKEN_IDS, draw_tokens
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import build_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from peft_prefix_plus import PrefixPlusConfig

ORDER = ("lora", "prefix")
architectures = pytest.mark.parametrize("name", ["llama", "gpt2"])


def build_config(kind: str):
    if kind == "lora":
        return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    return PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=INIT_TOKEN_IDS, projection_dim=8)


def add_both(name: str) -> dict[str, PeftModel]:
    """Wrap a model twice; both wrappers share it."""
    base = build_model(name)
    models = {}
    for kind in ORDER:
        models[kind] = get_peft_model(base, build_config(kind), adapter_name=kind).eval()
    for kind, model in models.items():
        model.set_requires_grad(kind)
    return models


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = draw_tokens()
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters_of(model: nn.Module, kind: str) -> dict[str, Tensor]:
    mark = {"lora": ".lora_", "prefix": ".prefix_plus_"}[kind]
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if mark in name}


@architectures
def test_both_are_trained_and_the_base_model_is_not(name):
    models = add_both(name)
    model = models["prefix"]
    before = {parameter_name: parameter.detach().clone() for parameter_name, parameter in model.named_parameters()}
    train(model)
    changed = {n for n, parameter in model.named_parameters() if not torch.equal(parameter, before[n])}
    assert changed == parameters_of(model, "lora").keys() | parameters_of(model, "prefix").keys()


@architectures
@pytest.mark.parametrize("saver", ORDER)
def test_saved_and_loaded_equals_before(name, saver, tmp_path):
    """Either of the wrappers saves both."""
    models = add_both(name)
    train(models["prefix"])
    ids = draw_tokens()
    expected = models["prefix"](ids).logits
    models[saver].save_pretrained(tmp_path)
    loaded = base = build_model(name)
    for kind in ORDER:
        loaded = PeftModel.from_pretrained(base, tmp_path / kind, adapter_name=kind)
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_lora_is_saved_as_it_is_without_the_prefix(tmp_path):
    models = add_both("llama")
    train(models["prefix"])
    models["lora"].save_pretrained(tmp_path)
    ids = draw_tokens()
    expected = models["prefix"].unload()(ids).logits
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path / "lora").eval()
    assert torch.equal(loaded(ids).logits, expected)


def test_the_trainer_saves_and_resumes_both(tmp_path):
    def build_trainer(output_dir):
        models = add_both("llama")
        rows = [{"input_ids": row, "labels": row} for row in draw_tokens(16, 8)]
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return models, Trainer(model=models["prefix"], args=arguments, train_dataset=rows)

    models, trainer = build_trainer(tmp_path / "whole")
    trainer.train()
    expected = {kind: parameters_of(model, kind) for kind, model in models.items()}
    models, trainer = build_trainer(tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for kind, model in models.items():
        given = parameters_of(model, kind)
        assert given.keys() == expected[kind].keys()
        assert all(torch.equal(given[n], tensor) for n, tensor in expected[kind].items()), kind


def test_a_name_that_lora_has_is_refused():
    lora = get_peft_model(build_model("llama"), build_config("lora"))
    with pytest.raises(ValueError, match="another adapter of the name 'default'"):
        get_peft_model(lora.base_model.model, build_config("prefix"))
    assert isinstance(lora.peft_config["default"], LoraConfig)


@architectures
def test_the_outputs_are_those_of_both(name):
    """Merging LoRA into the weights first, and giving the result a prefix, is the same model."""
    models = add_both(name)
    train(models["prefix"])
    ids = draw_tokens()
    both = models["prefix"](ids).logits
    models["lora"].merge_adapter()
    torch.testing.assert_close(models["prefix"](ids).logits, both, atol=2e-4, rtol=1e-4)
    models["lora"].unmerge_adapter()
    torch.testing.assert_close(models["prefix"](ids).logits, both, atol=2e-4, rtol=1e-4)


def test_disabling_switches_both_off():
    expected = build_model("llama")(draw_tokens()).logits
    models = add_both("llama")
    for model in models.values():
        with model.disable_adapter():
            assert torch.equal(model(draw_tokens()).logits, expected)


def test_lora_cannot_take_the_prefix_along():
    models = add_both("llama")
    ids = draw_tokens()
    both = models["prefix"](ids).logits
    for call in (models["lora"].merge_and_unload, models["lora"].unload):
        with pytest.raises(ValueError, match="Unload the prefix first"):
            call()
    assert torch.equal(models["prefix"](ids).logits, both)
    models["prefix"].unload()
    merged = models["lora"].merge_and_unload()
    assert not any("lora_" in name or "prefix_plus_" in name for name, _ in merged.named_parameters())


def test_unloading_the_prefix_leaves_lora():
    lora = get_peft_model(build_model("llama"), build_config("lora"), adapter_name="lora").eval()
    ids = draw_tokens()
    expected = lora(ids).logits
    prefix = get_peft_model(lora.base_model.model, build_config("prefix")).eval()
    assert not torch.allclose(prefix(ids).logits, expected)
    prefix.unload()
    assert torch.equal(lora(ids).logits, expected)


def test_mixed_batches_of_prefixes_beside_lora():
    models = add_both("llama")
    model, ids = models["prefix"], draw_tokens()
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.eval()
    mixed = model(ids, adapter_names=["other", "prefix"]).logits
    for row, adapter_name in enumerate(["other", "prefix"]):
        model.set_adapter(adapter_name)
        torch.testing.assert_close(mixed[row], model(ids).logits[row], atol=1e-4, rtol=1e-4)


def test_the_rows_of_a_mixed_batch_use_the_head_of_lora():
    lora = add_lora_with_head()
    ids = draw_tokens(batch_size=3)
    expected = [lora(ids[2:]).logits[0]]
    model = get_peft_model(lora.base_model.model, build_config("prefix"), adapter_name="prefix")
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    mixed = model.eval()(ids, adapter_names=["prefix", "other", "__base__"]).logits
    for row, adapter_name in ((1, "other"), (0, "prefix")):
        model.set_adapter(adapter_name)
        expected.insert(0, model(ids[row : row + 1]).logits[0])
    torch.testing.assert_close(mixed, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_what_is_for_prefixes_refuses_lora():
    models = add_both("llama")
    model = models["prefix"]
    expected = model(draw_tokens()).logits
    refused = [
        lambda: model.fold_prefix("lora"),
        lambda: model.add_weighted_adapter(["prefix", "lora"], None, "joined", "cat"),
        lambda: model(draw_tokens(), adapter_names=["prefix", "lora"]),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=r"lora.*the model has.* prefix"):
            call()
    model.fold_prefix()
    assert set(model.peft_config) == {"lora", "prefix"} and model.peft_config["prefix"].projection == "none"
    torch.testing.assert_close(model(draw_tokens()).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_table_of_positions_that_lora_trains_is_refused():
    config = build_config("lora")
    config.modules_to_save = ["wpe"]
    base = get_peft_model(build_model("gpt2"), config, adapter_name="lora").eval().base_model.model
    expected = base(draw_tokens()).logits
    with pytest.raises(ValueError, match=r"trains transformer\.wpe"):
        get_peft_model(base, build_config("prefix"), adapter_name="prefix")
    assert torch.equal(base(draw_tokens()).logits, expected)
    random = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init="random")
    get_peft_model(base, random, adapter_name="prefix")(draw_tokens())


@architectures
def test_the_adapter_methods_of_transformers_take_both(name, tmp_path):
    model, ids = build_model(name), draw_tokens()
    base = model(ids).logits.clone()
    model.add_adapter(build_config("lora"), "lora")
    with_lora = model(ids).logits
    model.add_adapter(build_config("prefix"), "prefix")
    model.set_adapter(["lora", "prefix"])
    train(model)
    both = model.eval()(ids).logits
    for kind in ORDER:
        model.set_adapter(kind)
        assert not torch.allclose(model(ids).logits, both, atol=1e-3)
        model.save_pretrained(tmp_path / kind)
    assert not torch.allclose(with_lora, base, atol=1e-3)
    loaded = build_model(name)
    for kind in ORDER:
        loaded.load_adapter(str(tmp_path / kind), adapter_name=kind)
    loaded.set_adapter(["lora", "prefix"])
    torch.testing.assert_close(loaded.eval()(ids).logits, both, atol=1e-5, rtol=1e-5)


def add_lora_with_head() -> PeftModel:
    """LoRA that has trained a head of its own."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    lora = get_peft_model(build_model("llama"), config, adapter_name="lora").eval()
    train(lora)
    return lora


def test_a_head_of_lora_stays_active_and_trained():
    lora = add_lora_with_head()
    head, states = lora.base_model.model.lm_head, torch.ones(1, 32)
    expected = head(states)
    prefix = get_peft_model(lora.base_model.model, build_config("prefix"), adapter_name="prefix")
    prefix.add_adapter("other", build_config("prefix"))
    for change in (
        lambda: None,
        lambda: prefix.set_adapter("other"),
        lambda: prefix.set_adapter("prefix"),
        lambda: prefix.delete_adapter("other"),
    ):
        change()
        assert head.active_adapters == ["lora"] and torch.equal(head(states), expected)
        assert all(parameter.requires_grad for parameter in head.modules_to_save["lora"].parameters())
    ids = draw_tokens()
    prefix(ids, labels=ids).loss.backward()
    assert head.modules_to_save["lora"].weight.grad.abs().sum() > 0


def test_a_frozen_head_of_lora_stays_frozen(tmp_path):
    add_lora_with_head().save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(build_model("llama"), tmp_path / "lora", adapter_name="lora")
    prefix = get_peft_model(lora.base_model.model, build_config("prefix"), adapter_name="prefix")
    prefix.set_adapter("prefix")
    head = lora.base_model.model.lm_head
    assert head.active_adapters == ["lora"]
    assert not any(parameter.requires_grad for parameter in head.parameters())


@pytest.mark.parametrize("prefix_heads", [None, ["norm"], ["lm_head"]], ids=["none", "another", "the same"])
def test_unloading_the_prefix_leaves_the_head_of_lora(prefix_heads, tmp_path):
    lora, ids = add_lora_with_head(), draw_tokens()
    expected = lora(ids).logits
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=prefix_heads)
    base = get_peft_model(lora.base_model.model, config, adapter_name="prefix").eval().unload()
    assert torch.equal(lora(ids).logits, expected)
    assert list(lora.peft_config) == list(base.peft_config) == ["lora"]
    lora.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["lora"]
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path / "lora").eval()
    assert torch.equal(loaded(ids).logits, expected)
