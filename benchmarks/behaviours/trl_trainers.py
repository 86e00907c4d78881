"""The trainers of TRL."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from .behaviour import behaviour
from .methods import Method
from .subjects import (
    assert_close,
    assert_differ,
    assert_same_tokens,
    build_causal_lm,
    build_tokenizer,
    compute_logits,
    draw_tokens,
    perturb,
    save_base_model,
)

# In float32 and without checkpointing, unless a behaviour asks for them: TRL has both on by default.
SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 0,
}
_WORDS = ["red fox", "blue jay", "old oak", "wet fog"]
_TEXTS = [{"text": f"the {word} is here"} for word in _WORDS]
COMPLETIONS = [{"prompt": f"see the {word}:", "completion": f" a {word}"} for word in _WORDS]
CHATS = [
    {"messages": [{"role": "user", "content": f"name a {word}"}, {"role": "assistant", "content": f"{word} it is"}]}
    for word in _WORDS
]
PREFERENCES = [{"prompt": f"see the {word}:", "chosen": f" a {word}", "rejected": " nothing"} for word in _WORDS]
_JUDGED = [
    {"prompt": f"see the {word}:", "completion": f" a {word}" if i % 2 else " nothing", "label": bool(i % 2)}
    for i, word in enumerate(_WORDS)
]


def _build_trainer(
    trainer_class: type[Trainer],
    config_class: Any,
    rows: list[dict[str, Any]],
    method: Method,
    directory: Path,
    model: nn.Module | str | None = None,
    task_type: str = "CAUSAL_LM",
    **settings: Any,
) -> Trainer:
    arguments = {name: settings.pop(name) for name in ("reward_funcs", "callbacks") if name in settings}
    return trainer_class(
        model=build_causal_lm() if model is None else model,
        args=config_class(output_dir=str(directory), **(SETTINGS | settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(),
        peft_config=method.build_config(task_type=task_type),
        **arguments,
    )


def _build_sft(rows: list[dict[str, Any]], method: Method, directory: Path, **settings: Any) -> SFTTrainer:
    return _build_trainer(SFTTrainer, SFTConfig, rows, method, directory, **settings)


def _train(trainer: Trainer) -> list[float]:
    """Train, and return the losses; only the adapter may change."""
    model = trainer.model
    assert isinstance(model, PeftModel)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    if not changed or not changed <= trainable:
        raise AssertionError(f"Training has changed {sorted(changed)[:2] or 'nothing'}.")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _assert_decreases(losses: list[float]) -> None:
    if not losses[-1] < losses[0] - 0.01:
        raise AssertionError(f"The loss goes from {losses[0]:.3f} to {losses[-1]:.3f}.")


def _list_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@behaviour("TRL")
def train_with_sft(method: Method, directory: Path) -> None:
    """`SFTTrainer` with a `peft_config`, with the defaults of TRL (gradient checkpointing, bfloat16)."""
    defaults = {"bf16": None, "gradient_checkpointing": True}
    _assert_decreases(_train(_build_sft(_TEXTS, method, directory, max_steps=8, **defaults)))


@behaviour("TRL")
def train_with_sft_in_float32(method: Method, directory: Path) -> None:
    """`SFTTrainer` without gradient checkpointing."""
    _assert_decreases(_train(_build_sft(_TEXTS, method, directory, max_steps=8)))


@behaviour("TRL")
def checkpoint_gradients_in_sft(method: Method, directory: Path) -> None:
    """`SFTTrainer`, gradient checkpointing: the same losses as without it."""
    expected = torch.tensor(_train(_build_sft(_TEXTS, method, directory)))
    for use_reentrant in (False, True):
        checkpointing = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        }
        assert_close(torch.tensor(_train(_build_sft(_TEXTS, method, directory, **checkpointing))), expected)


@behaviour("TRL")
def pack_sequences_in_sft(method: Method, directory: Path) -> None:
    """`SFTTrainer` with `packing`: the losses of the same texts in rows of their own."""
    rows = _TEXTS[:2] * 2
    # The texts of a batch fill one packed row.
    packed = {"packing": True, "max_length": 128, "per_device_train_batch_size": 1}
    assert_close(
        torch.tensor(_train(_build_sft(rows, method, directory, **packed))),
        torch.tensor(_train(_build_sft(rows, method, directory))),
    )


@behaviour("TRL")
def train_on_chats(method: Method, directory: Path) -> None:
    """`SFTTrainer` on chats."""
    _assert_decreases(_train(_build_sft(CHATS, method, directory, max_steps=8)))


def _check_loss_on_part(method: Method, directory: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    """The loss of the first step is that of the tokens that are trained on, computed by hand."""
    trainer = _build_sft(rows, method, directory, max_steps=8, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch.pop("labels")[:, 1:]
    if not (labels == -100).float().mean() > 0.3:
        raise AssertionError("All tokens are trained on.")
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, -batch["input_ids"].shape[1] : -1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    losses = _train(trainer)
    assert_close(torch.tensor(losses[0]), expected, tolerance=1e-3)
    _assert_decreases(losses)


@behaviour("TRL")
def train_on_completions(method: Method, directory: Path) -> None:
    """`SFTTrainer` on prompts and completions: the loss is that of the completions."""
    _check_loss_on_part(method, directory, COMPLETIONS)


@behaviour("TRL")
def train_on_the_answers_of_chats(method: Method, directory: Path) -> None:
    """`SFTTrainer` with `assistant_only_loss`: the loss is that of the answers."""
    _check_loss_on_part(method, directory, CHATS, assistant_only_loss=True)


@behaviour("TRL")
def resume_sft(method: Method, directory: Path) -> None:
    """Resume an `SFTTrainer`: equal to the uninterrupted run, bit for bit."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = _build_sft(COMPLETIONS, method, directory, **settings)
    _train(whole)
    resumed = _build_sft(COMPLETIONS, method, directory, **settings)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    expected = _list_trained(whole.model)
    if not all(torch.equal(given, expected[name]) for name, given in _list_trained(resumed.model).items()):
        raise AssertionError("The resumed run ends with other weights.")


@behaviour("TRL")
def load_what_sft_saved(method: Method, directory: Path) -> None:
    """Load what an `SFTTrainer` has saved with `AutoPeftModelForCausalLM`."""
    base = save_base_model(directory / "base")
    trainer = _build_sft(COMPLETIONS, method, directory / "adapter", model=base, learning_rate=0.1)
    _train(trainer)
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(directory / "adapter")
    assert_differ(compute_logits(loaded), compute_logits(build_causal_lm()))
    assert_close(compute_logits(loaded), compute_logits(trainer.model), tolerance=1e-6)
    lengths = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    assert_same_tokens(loaded.generate(draw_tokens(), **lengths), trainer.model.generate(draw_tokens(), **lengths))


def sum_log_probs(model: nn.Module, prompt: str, completion: str) -> torch.Tensor:
    """Log-probability of a completion and the token that ends it."""
    tokenizer = build_tokenizer()
    start, rest = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([start + rest])
    with torch.no_grad():
        log_probs = model(ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, ids[0, len(start) :, None]).sum()


@behaviour("TRL")
def train_with_dpo(method: Method, directory: Path) -> None:
    """`DPOTrainer`: the model without the adapter is the reference, and preferences are learned."""
    trainer = _build_trainer(DPOTrainer, DPOConfig, PREFERENCES, method, directory, max_steps=8, beta=0.5)
    perturb(trainer.model)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    base = build_causal_lm()
    expected = sorted(float(sum_log_probs(base, row["prompt"], row["chosen"])) for row in PREFERENCES)
    assert_close(torch.tensor(sorted(chosen.tolist())), torch.tensor(expected), tolerance=1e-3)
    expected = sorted(float(sum_log_probs(base, row["prompt"], row["rejected"])) for row in PREFERENCES)
    assert_close(torch.tensor(sorted(rejected.tolist())), torch.tensor(expected), tolerance=1e-3)
    _assert_decreases(_train(trainer))
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0], "The margin does not grow."


@behaviour("TRL")
def start_dpo_at_the_reference(method: Method, directory: Path) -> None:
    """`DPOTrainer` on a model that is trained already: the adapter as it was is the reference."""
    model = method.apply(build_causal_lm())
    perturb(model)
    model.save_pretrained(directory / "adapter")
    expected = compute_logits(model)
    model = PeftModel.from_pretrained(build_causal_lm(), directory / "adapter", is_trainable=True)
    settings = SETTINGS | {"max_steps": 4, "beta": 0.5}
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(directory), **settings),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=build_tokenizer(),
    )
    losses = _train(trainer)
    # The loss of a model that equals its reference.
    assert_close(torch.tensor(losses[0]), torch.tensor(2.0).log())
    _assert_decreases(losses)
    model.set_adapter("ref")
    assert_close(compute_logits(model), expected)


@behaviour("TRL")
def train_with_kto(method: Method, directory: Path) -> None:
    """`KTOTrainer`."""
    _assert_decreases(_train(_build_trainer(KTOTrainer, KTOConfig, _JUDGED, method, directory, max_steps=8, beta=0.5)))


@behaviour("TRL")
def train_with_grpo(method: Method, directory: Path) -> None:
    """`GRPOTrainer`: generates with the adapter, and the loss compares with the model without it."""

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(sum(map(ord, completion)) % 7) for completion in completions]

    prompts = [{"prompt": row["prompt"]} for row in PREFERENCES]
    settings = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "max_steps": 2}
    trainer = _build_trainer(GRPOTrainer, GRPOConfig, prompts, method, directory, reward_funcs=reward, **settings)
    perturb(trainer.model)
    _train(trainer)
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences and min(divergences) > 1e-3, "The model equals its reference."


def _build_reward_model() -> PreTrainedModel:
    config = build_causal_lm().config
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).eval()


@behaviour("TRL")
def train_a_reward_model(method: Method, directory: Path) -> None:
    """`RewardTrainer`: the head is trained, saved and loaded with the adapter."""
    rows = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PREFERENCES
    ]
    settings = {"model": _build_reward_model(), "task_type": "SEQ_CLS", "max_steps": 8}
    trainer = _build_trainer(RewardTrainer, RewardConfig, rows, method, directory, **settings)
    _assert_decreases(_train(trainer))
    trainer.save_model()
    loaded = PeftModel.from_pretrained(_build_reward_model(), directory)
    assert_differ(compute_logits(loaded), compute_logits(_build_reward_model()))
    assert_close(compute_logits(loaded), compute_logits(trainer.model), tolerance=1e-6)
