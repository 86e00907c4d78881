"""HF `Trainer` with a prefix: the script of the README, and what people switch on."""

from pathlib import Path

import pytest
import torch
from helpers import add_prefix, draw_tokens, named_prefix_parameters
from peft import PeftModel
from tiny_models import build_model
from transformers import Trainer, TrainingArguments

import peft_prefix_plus  # noqa: F401


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
