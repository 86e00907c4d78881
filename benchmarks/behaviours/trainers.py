"""The Trainer of transformers."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from .behaviour import behaviour
from .methods import Method
from .subjects import (
    assert_close,
    assert_differ,
    build_causal_lm,
    build_classifier,
    build_seq2seq_lm,
    draw_tokens,
    perturb,
)


def _build_rows(count: int = 8) -> list[dict[str, Any]]:
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in draw_tokens(count, 6)]


def _build_trainer(model: nn.Module, directory: Path, collator: Any = None, **settings: Any) -> Trainer:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1}
    defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(directory), **(defaults | settings))
    return Trainer(model, arguments, data_collator=collator, train_dataset=_build_rows(), eval_dataset=_build_rows(4))


def _start(method: Method, base: PreTrainedModel | None = None) -> PeftModel:
    """A new adapter, the same one every time."""
    base = build_causal_lm() if base is None else base
    set_seed(0)
    return method.apply(base)


def _train(method: Method, directory: Path, base: PreTrainedModel | None = None, **settings: Any) -> Trainer:
    """Train a new adapter; equal settings start from equal weights."""
    trainer = _build_trainer(_start(method, base), directory, **settings)
    trainer.train()
    return trainer


def _list_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _copy_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _assert_equal(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given and given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in given)


def _assert_same_losses(trainer: Trainer, expected: Trainer) -> None:
    assert_close(torch.tensor(_list_losses(trainer)), torch.tensor(_list_losses(expected)))


@behaviour("Trainer")
def train_with_the_trainer(method: Method, directory: Path) -> None:
    """Train: the loss goes down, and only the adapter changes."""
    model = method.apply(build_causal_lm())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = _build_trainer(model, directory, max_steps=15)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss - 0.01
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(_copy_trained(model)) and changed


@behaviour("Trainer")
def resume_the_trainer(method: Method, directory: Path) -> None:
    """Resume from a checkpoint: equal to the uninterrupted run, bit for bit."""
    whole = _train(method, directory, save_strategy="steps", save_steps=2)
    resumed = _build_trainer(method.apply(build_causal_lm()), directory)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    assert resumed.state.global_step == 4
    _assert_equal(_copy_trained(resumed.model), _copy_trained(whole.model))


@behaviour("Trainer")
def load_the_best_model_at_the_end(method: Method, directory: Path) -> None:
    """`load_best_model_at_end`."""
    # The highest loss counts as the best, so that the best checkpoint is not the last.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = _train(method, directory, max_steps=6, learning_rate=0.03, **best, **steps)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1] + 0.01
    assert_close(torch.tensor(trainer.evaluate()["eval_loss"]), torch.tensor(max(losses)))


def _check_gradient_checkpointing(method: Method, directory: Path, use_reentrant: bool) -> None:
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    trainer = _train(method, directory, **checkpointing)
    assert trainer.model.get_base_model().is_gradient_checkpointing
    _assert_same_losses(trainer, _train(method, directory))


@behaviour("Trainer")
def checkpoint_gradients_in_the_trainer(method: Method, directory: Path) -> None:
    """Gradient checkpointing: the same losses as without it."""
    _check_gradient_checkpointing(method, directory, use_reentrant=False)


@behaviour("Trainer")
def checkpoint_gradients_reentrantly_in_the_trainer(method: Method, directory: Path) -> None:
    """Gradient checkpointing, reentrant: the same losses as without it."""
    _check_gradient_checkpointing(method, directory, use_reentrant=True)


@behaviour("Trainer")
def accumulate_gradients_in_the_trainer(method: Method, directory: Path) -> None:
    """Gradient accumulation: the same losses as with the larger batch."""
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    _assert_same_losses(_train(method, directory, **halves), _train(method, directory))


@behaviour("Trainer")
def smooth_the_labels(method: Method, directory: Path) -> None:
    """Label smoothing."""
    model = method.apply(build_causal_lm())
    perturb(model)
    trainer = _build_trainer(model, directory, label_smoothing_factor=0.1)
    rows = torch.stack([row["input_ids"] for row in _build_rows(4)])
    with torch.no_grad():
        log_probs = model(rows).logits[:, :-1].log_softmax(-1)
    likelihood = log_probs.gather(-1, rows[:, 1:, None]).mean()
    expected = -(0.9 * likelihood + 0.1 * log_probs.mean())
    assert_close(torch.tensor(trainer.evaluate()["eval_loss"]), expected)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < expected


@behaviour("Trainer")
def predict_with_generate(method: Method, directory: Path) -> None:
    """`Seq2SeqTrainer` with `predict_with_generate`."""
    base, rows = build_seq2seq_lm(), _build_rows(4)
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
    without = base.generate(**inputs, max_new_tokens=6)
    model = method.apply(base, task_type="SEQ_2_SEQ_LM")
    perturb(model, size=1.0)
    settings = {"max_steps": 2, "learning_rate": 0.01, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = Seq2SeqTrainingArguments(
        str(directory), save_strategy="no", predict_with_generate=True, generation_max_length=7, **settings
    )
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    predicted = torch.from_numpy(trainer.predict(rows).predictions)
    expected = model.eval().generate(**inputs, max_new_tokens=6)
    assert torch.equal(predicted[:, : expected.shape[1]], expected)
    assert predicted.shape != without.shape or not torch.equal(predicted, without)


class _GenerateAtEvaluation(TrainerCallback):
    def __init__(self) -> None:
        self.generated: list[torch.Tensor] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # Of one length, to compare them.
        lengths = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
        self.generated.append(model.eval().generate(input_ids=draw_tokens(), **lengths))


@behaviour("Trainer")
def generate_at_each_evaluation(method: Method, directory: Path) -> None:
    """Generate in a callback at each evaluation; training is not disturbed."""
    callback = _GenerateAtEvaluation()
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.1, "max_steps": 6}
    trainer = _build_trainer(_start(method), directory, **settings)
    trainer.add_callback(callback)
    trainer.train()
    assert len(callback.generated) == 3
    assert any(not torch.equal(callback.generated[0], later) for later in callback.generated[1:])
    callback.on_evaluate(None, None, None, trainer.model)
    assert torch.equal(callback.generated[-1], callback.generated[-2])
    _assert_same_losses(trainer, _train(method, directory, **settings))


@behaviour("Trainer")
def compute_metrics_of_the_logits(method: Method, directory: Path) -> None:
    """`compute_metrics` on the logits of an evaluation."""
    model = method.apply(build_causal_lm())
    perturb(model)
    trainer = _build_trainer(model, directory)
    trainer.compute_metrics = lambda prediction: {"first": float(prediction.predictions[0, 0, 0])}
    rows = torch.stack([row["input_ids"] for row in _build_rows(4)])
    with torch.no_grad():
        expected = model.eval()(rows).logits[0, 0, 0]
    assert_close(torch.tensor(trainer.evaluate()["eval_first"]), expected)


@behaviour("Trainer")
def find_the_batch_size(method: Method, directory: Path) -> None:
    """`auto_find_batch_size` after running out of memory."""

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if len(rows) == 8:
            raise RuntimeError("CUDA out of memory.")
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    settings = {"per_device_train_batch_size": 8, "auto_find_batch_size": True, "max_steps": 3}
    trainer = _train(method, directory, collator=collate, **settings)
    assert trainer.state.train_batch_size < 8 and trainer.state.global_step == 3
    before, after = _copy_trained(_start(method)), _copy_trained(trainer.model)
    assert any(not torch.equal(after[name], before[name]) for name in before)


@behaviour("Trainer")
def train_in_mixed_precision_with_the_trainer(method: Method, directory: Path) -> None:
    """`bf16=True`: the losses of float32, roughly; the weights stay float32."""
    trainer, full = _train(method, directory, bf16=True), _train(method, directory)
    assert_close(torch.tensor(_list_losses(trainer)), torch.tensor(_list_losses(full)), tolerance=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@behaviour("Trainer")
def train_on_a_bfloat16_model_with_the_trainer(method: Method, directory: Path) -> None:
    """A base model in bfloat16: the loss goes down, and small steps are not lost."""
    trainer = _train(method, directory, build_causal_lm().bfloat16(), max_steps=15)
    losses = _list_losses(trainer)
    assert losses[-1] < losses[0] - 0.01
    # A step of 1e-4 on a weight near 1 is below the precision of bfloat16.
    before = _copy_trained(trainer.model)
    tiny = _build_trainer(trainer.model, directory, learning_rate=1e-5, max_steps=1)
    tiny.train()
    after = _copy_trained(trainer.model)
    moved = torch.cat([(after[name] != before[name]).flatten() for name in before])
    assert moved.float().mean() > 0.9


@behaviour("Trainer")
def load_a_checkpoint_as_an_adapter(method: Method, directory: Path) -> None:
    """A checkpoint of the Trainer is an adapter that `PeftModel.from_pretrained` loads."""
    trainer = _train(method, directory, save_strategy="steps", save_steps=4)
    base, ids = build_causal_lm(), draw_tokens()
    expected = base(ids).logits
    loaded = PeftModel.from_pretrained(base, directory / "checkpoint-4")
    logits = loaded(ids).logits
    assert_differ(logits, expected)
    assert torch.equal(logits, trainer.model.eval()(ids).logits)


@behaviour("Trainer")
def train_a_classifier_with_the_trainer(method: Method, directory: Path) -> None:
    """Sequence classification: the new head is trained, saved and loaded with the adapter."""
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 3}
        for i, row in enumerate(draw_tokens(6, 6))
    ]
    base = build_classifier()
    head = base.score.weight.clone()
    model = method.apply(base, task_type="SEQ_CLS")
    trainer = _build_trainer(model, directory, max_steps=10, save_strategy="steps", save_steps=10)
    trainer.train_dataset = rows
    trainer.train()
    assert _list_losses(trainer)[-1] < _list_losses(trainer)[0]
    loaded = PeftModel.from_pretrained(build_classifier(), directory / "checkpoint-10")
    trained = next(p for name, p in loaded.named_parameters() if "score.modules_to_save.default" in name)
    assert_differ(trained, head)
    ids = draw_tokens()
    logits = loaded(ids).logits
    assert_differ(logits, build_classifier()(ids).logits)
    assert torch.equal(logits, model.eval()(ids).logits)


@behaviour("Trainer")
def limit_the_number_of_checkpoints(method: Method, directory: Path) -> None:
    """`save_total_limit`: old checkpoints go, and the last one resumes."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    _train(method, directory, **settings)
    assert [path.name for path in directory.glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = _build_trainer(method.apply(build_causal_lm()), directory, max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert len(_list_losses(resumed)) == 6


@behaviour("Trainer")
def compile_in_the_trainer(method: Method, directory: Path) -> None:
    """`torch_compile=True`: the same losses as without it."""
    # This backend traces forward and backward and generates no code, which would take half a minute.
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    _assert_same_losses(_train(method, directory, **compiled), _train(method, directory, max_steps=2))
    torch.compiler.reset()
