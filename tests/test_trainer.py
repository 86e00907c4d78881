"""HF `Trainer` with a prefix: the script of the README, and what people switch on."""

from pathlib import Path

import pytest
import torch
from helpers import add_prefix, both_kinds, draw_tokens, named_prefix_parameters
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import build_model
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from peft_prefix_plus import PrefixPlusConfig


def build_rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in draw_tokens(count, 8)]


def build_trainer(model: torch.nn.Module, output_dir: Path, **settings: object) -> Trainer:
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05, "logging_steps": 1}
    defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(output_dir), **(defaults | settings))
    return Trainer(model=model, args=arguments, train_dataset=build_rows(), eval_dataset=build_rows(4))


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_lowers_the_loss_and_moves_only_the_prefix(tmp_path):
    model = add_prefix(build_model("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = build_trainer(model, tmp_path, max_steps=20)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(named_prefix_parameters(model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_and_accumulation_give_the_same_curve(tmp_path, name):
    curves = []
    for settings in (
        {},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ):
        # Dropout of the model itself would draw differently for other batches.
        trainer = build_trainer(add_prefix(build_model(name, **NO_DROPOUT[name])), tmp_path, **settings)
        trainer.train()
        curves.append(losses_of(trainer))
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert curves[2] == pytest.approx(curves[0], abs=1e-4)


NO_DROPOUT = {"llama": {}, "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = build_trainer(add_prefix(build_model("llama"), prefix_dropout=0.3), tmp_path / "whole", **settings)
    whole.train()
    resumed = build_trainer(add_prefix(build_model("llama"), prefix_dropout=0.3), tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = named_prefix_parameters(whole.model)
    for name, parameter in named_prefix_parameters(resumed.model).items():
        assert torch.equal(parameter, expected[name]), name


def test_a_checkpoint_is_an_adapter(tmp_path):
    trainer = build_trainer(add_prefix(build_model("llama")), tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path / "checkpoint-6")
    ids = draw_tokens()
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    # The highest loss counts as the best here, so that the best model is not the last.
    trainer = build_trainer(
        add_prefix(build_model("llama"), projection="none"),
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < max(losses) - 0.01
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-5)


def test_training_continues_from_a_saved_adapter(tmp_path):
    trainer = build_trainer(add_prefix(build_model("llama")), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = PeftModel.from_pretrained(build_model("llama"), tmp_path / "saved", is_trainable=True)
    assert all(parameter.requires_grad for parameter in named_prefix_parameters(model).values())
    again = build_trainer(model, tmp_path)
    again.train()
    assert losses_of(again)[-1] < losses_of(trainer)[0]


def test_weight_decay_pulls_to_the_anchor(tmp_path):
    model = add_prefix(build_model("llama"), projection="none")
    with torch.no_grad():
        for parameter in named_prefix_parameters(model).values():
            parameter.fill_(1.0)
    trainer = build_trainer(model, tmp_path, max_steps=30, learning_rate=0.1, weight_decay=1.0)
    # Without a gradient only the decay acts.
    trainer.compute_loss = lambda model, inputs, **_: sum(p.sum() * 0.0 for p in model.parameters() if p.requires_grad)
    trainer.train()
    for name, parameter in named_prefix_parameters(model).items():
        assert bool((parameter.abs() < 0.5).all()), name


def train(model: torch.nn.Module, output_dir: Path, **settings: object) -> Trainer:
    trainer = build_trainer(model, output_dir, **settings)
    trainer.train()
    return trainer


def copy_trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given and given.keys() == expected.keys()
    assert not [name for name in given if not torch.equal(given[name], expected[name])]


def build_with_two_adapters(**settings: object) -> PeftModel:
    """The second adapter is the one that is trained."""
    model = add_prefix(build_model("llama"), **settings)
    model.add_adapter("second", PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings))
    model.set_adapter("second")
    return model


RUNS = {
    "token dropout": lambda: add_prefix(build_model("llama"), prefix_dropout=0.3),
    "element dropout": lambda: add_prefix(build_model("llama"), prefix_dropout=0.3, prefix_dropout_mode="element"),
    "dropout of the model": lambda: add_prefix(build_model("gpt2"), prefix_dropout=0.3),
    "two adapters": lambda: build_with_two_adapters(prefix_dropout=0.3),
    "a trained module": lambda: add_prefix(build_model("llama"), modules_to_save=["lm_head"]),
    "frozen tokens": lambda: add_prefix(build_model("llama"), num_frozen_tokens=2, projection="none"),
    "bfloat16": lambda: add_prefix(build_model("llama", dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("build", RUNS.values(), ids=RUNS)
def test_resumed_equals_uninterrupted_in_every_kind_of_run(tmp_path, build):
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "weight_decay": 0.1}
    whole = train(build(), tmp_path, **settings)
    for step in (2, 4):
        resumed = build_trainer(build(), tmp_path, **(settings | {"save_strategy": "no"}))
        # What is not overwritten must not have been needed.
        with torch.no_grad():
            for parameter in named_prefix_parameters(resumed.model).values():
                parameter.add_(float("nan") if parameter.requires_grad else 0.0)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses_of(resumed) == losses_of(whole)
        assert_equal(copy_trained(resumed.model), copy_trained(whole.model))


def test_only_the_active_adapter_is_trained(tmp_path):
    model = build_with_two_adapters()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tmp_path)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in named_prefix_parameters(model) if ".second." in name}


def test_the_best_checkpoint_is_restored_tensor_by_tensor(tmp_path):
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    model = add_prefix(build_model("llama"), modules_to_save=["lm_head"])
    trainer = train(model, tmp_path, **steps, **best)
    assert trainer.state.best_global_step < trainer.state.max_steps
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    assert_equal(get_peft_model_state_dict(model), saved)
    last = load_file(tmp_path / f"checkpoint-{trainer.state.max_steps}" / "adapter_model.safetensors")
    assert any(not torch.equal(saved[name], last[name]) for name in saved)
    # Training can go on with it.
    assert set(copy_trained(model)) == set(named_prefix_parameters(model)) | {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


@both_kinds
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["recorded", "reentrant"])
def test_gradient_checkpointing_trains_the_same_adapter(tmp_path, name, use_reentrant):
    """Under dropout of the prefix and of the model: what is computed again has to draw the same numbers."""
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    # Without Adam, which makes a large step of a gradient that is zero but for rounding.
    settings = {"optim": "sgd", "learning_rate": 0.5}
    trained = []
    for checkpointing in ({}, kwargs):
        model = add_prefix(build_model(name), prefix_dropout=0.3)
        torch.manual_seed(0)
        trained.append(copy_trained(train(model, tmp_path, **settings, **checkpointing).model))
    for key, expected in trained[0].items():
        assert_close(trained[1][key], expected, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["mixed", "bfloat16"])
def test_half_precision_follows_the_curve_and_leaves_the_adapter_in_float32(tmp_path, dtype):
    full = train(add_prefix(build_model("llama")), tmp_path)
    model = add_prefix(build_model("llama", dtype=dtype))
    half = train(model, tmp_path, bf16=dtype == torch.float32)
    assert losses_of(half) == pytest.approx(losses_of(full), abs=0.05)
    assert losses_of(half) != losses_of(full)
    tensors = [tensor for key, tensor in model.state_dict().items() if ".prefix_plus_" in key]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_after_running_out_of_memory_training_is_that_of_the_smaller_batch(tmp_path):
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if len(rows) > 3:
            raise RuntimeError("CUDA out of memory.")
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    settings = {"auto_find_batch_size": True, "max_steps": 2}
    found = build_trainer(add_prefix(build_model("llama")), tmp_path, per_device_train_batch_size=4, **settings)
    found.data_collator = collate
    found.train()
    assert found.state.train_batch_size == 3
    given = train(add_prefix(build_model("llama")), tmp_path, per_device_train_batch_size=3, max_steps=2)
    assert_equal(copy_trained(found.model), copy_trained(given.model))
