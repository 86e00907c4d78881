"""The trainers of TRL with a prefix, where doing it (benchmarks/behaviours) is not yet proof that it is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from behaviours.subjects import build_causal_lm, build_tokenizer
from behaviours.trl_trainers import CHATS, COMPLETIONS, PREFERENCES, SETTINGS, sum_log_probs
from datasets import Dataset
from flash_stand_in import FLASH_STAND_IN, flash_fixture  # noqa: F401
from helpers import named_prefix_parameters, perturb
from packaging.version import Version
from peft import PeftModel, get_peft_model
from tiny_models import build_model
from torch.testing import assert_close
from transformers import PreTrainedModel, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer


def build_prefix(**settings: Any) -> PrefixPlusConfig:
    return PrefixPlusConfig(**({"task_type": "CAUSAL_LM", "num_virtual_tokens": 4} | settings))


def build_trainer(kind: str, model: PreTrainedModel, rows: list[dict], directory: Path, **settings: Any) -> Trainer:
    trainer_class, config_class = {
        "sft": (SFTTrainer, SFTConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "kto": (KTOTrainer, KTOConfig),
        "grpo": (GRPOTrainer, GRPOConfig),
    }[kind]
    arguments = {key: settings.pop(key) for key in ("peft_config", "reward_funcs") if key in settings}
    return trainer_class(
        model=model,
        args=config_class(output_dir=str(directory), **(SETTINGS | settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(),
        **arguments,
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def copy_trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def copy_states(model: PeftModel, adapter_name: str) -> list[torch.Tensor]:
    """The finished keys and values of an adapter."""
    layers = [module for module in model.modules() if isinstance(module, PrefixPlusLayer)]
    states = [layer.get_prefix_states([adapter_name], 1) for layer in layers]
    return [tensor.detach().clone() for state in states for tensor in (state.keys, state.values)]


# Packed sequences

# Of unequal length, and one longer than the sliding windows of 16.
WORDS = ["an owl", "the old fox", "a very long sentence about a red bird", "it"]
PACKED = {"packing": True, "max_length": 128, "per_device_train_batch_size": 1}


def train_on_texts(name: str, implementation: str, directory: Path, **settings: Any) -> Trainer:
    model = get_peft_model(build_model(name, vocab_size=259, **POSITIONS.get(name, {})), build_prefix())
    perturb(model)
    model.set_attn_implementation(implementation)
    # Without Adam, which makes a large step of a gradient that is zero but for rounding.
    settings = {"optim": "sgd", "learning_rate": 0.1} | settings
    # With a prompt, as the first token of a text is counted by some architectures, but never predicted.
    rows = [{"prompt": text[:2], "completion": text[2:] + "."} for text in WORDS]
    trainer = build_trainer("sft", model, rows, directory, **settings)
    trainer.train()
    return trainer


# Rows are longer than in other tests, and dropout of the model would draw differently for other rows.
POSITIONS = {"gpt2": {"n_positions": 256, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}


UNPADDED = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize(
    ("name", "implementation", "settings"),
    [
        ("llama", "sdpa", PACKED),
        ("llama", "sdpa", UNPADDED),
        ("llama", "sdpa", PACKED | {"gradient_checkpointing": True}),
        ("llama", "eager", PACKED),
        ("llama", FLASH_STAND_IN, PACKED),
        ("mistral", "sdpa", PACKED),
        ("mistral", FLASH_STAND_IN, UNPADDED),
        ("gemma3_text", "sdpa", PACKED),
        ("gpt2", "sdpa", PACKED),
    ],
)
def test_packed_texts_train_the_adapter_that_they_train_in_rows_of_their_own(
    tmp_path, name, implementation, settings, flash
):
    """Each text sees the prefix once and none of its neighbours, or the losses would differ."""
    packed = train_on_texts(name, implementation, tmp_path, **settings)
    batch = next(iter(packed.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() == len(WORDS)
    padded = train_on_texts(name, implementation, tmp_path)
    assert losses_of(packed) == pytest.approx(losses_of(padded), abs=1e-4)
    expected = copy_trained(padded.model)
    for key, parameter in copy_trained(packed.model).items():
        assert_close(parameter, expected[key], atol=1e-4, rtol=1e-3, msg=key)


# References

STARTS = {
    "vocabulary": {},
    "tokens": {"prefix_init_token_ids": [5, 9, 6, 200]},
    "random": {"prefix_init": "random"},
    "flat": {"projection": "none"},
    "frozen": {"num_frozen_tokens": 2},
}
JUDGED = [
    {"prompt": row["prompt"], "completion": row[("rejected", "chosen")[i % 2]], "label": bool(i % 2)}
    for i, row in enumerate(PREFERENCES)
]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}])
@pytest.mark.parametrize("kind", ["given as a configuration", "wrapped"])
def test_the_reference_of_dpo_is_what_it_claims(tmp_path, settings, kind):
    """The base model; or, for a model that has an adapter already, that adapter as it was."""
    model, reference, adapter = build_causal_lm(), build_causal_lm(), {"peft_config": build_prefix()}
    if kind == "wrapped":
        model, reference, adapter = (
            get_peft_model(model, build_prefix()),
            get_peft_model(reference, build_prefix()),
            {},
        )
        perturb(model)
        reference.load_state_dict(model.state_dict())
    trainer = build_trainer("dpo", model, PREFERENCES, tmp_path, learning_rate=0.1, **adapter, **settings)
    before = copy_trained(trainer.model)
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in copy_trained(trainer.model).items())
    batch = next(iter(trainer.get_train_dataloader()))
    if "precompute_ref_log_probs" in settings:
        log_probs = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    else:
        log_probs = trainer.compute_ref_log_probs(trainer.model, batch)
    for given, name in zip(log_probs, ("chosen", "rejected"), strict=True):
        expected = sorted(float(sum_log_probs(reference.eval(), row["prompt"], row[name])) for row in PREFERENCES)
        assert sorted(given.tolist()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "origin", "start"),
    [
        *(("dpo", "loaded", start) for start in STARTS),
        *(("dpo", origin, "vocabulary") for origin in ("new", "folded", "loaded and folded")),
        ("kto", "loaded", "vocabulary"),
    ],
)
def test_the_adapter_that_is_trained_on_starts_at_its_reference(tmp_path, kind, origin, start):
    model = get_peft_model(build_causal_lm(), build_prefix(**STARTS[start]))
    perturb(model)
    expected = copy_states(model, "default")
    if "loaded" in origin:
        model.save_pretrained(tmp_path / "saved")
        model = PeftModel.from_pretrained(build_causal_lm(), tmp_path / "saved", is_trainable=True)
    if "folded" in origin:
        model.fold_prefix()
    trainer = build_trainer(kind, model, PREFERENCES if kind == "dpo" else JUDGED, tmp_path, max_steps=2)
    assert model.active_adapters == ["default"]
    assert all(".default." in name for name in copy_trained(model))
    for given, state in zip(copy_states(model, "ref"), expected, strict=True):
        assert torch.equal(given, state)
    trainer.train()
    for given, state in zip(copy_states(model, "ref"), expected, strict=True):
        assert torch.equal(given, state)
    assert any(
        not torch.equal(given, state) for given, state in zip(copy_states(model, "default"), expected, strict=True)
    )
    trainer.save_model(tmp_path / "result")
    loaded = PeftModel.from_pretrained(build_causal_lm(), tmp_path / "result")
    loaded.load_adapter(tmp_path / "result" / "ref", "ref")
    for name in ("default", "ref"):
        for given, state in zip(copy_states(loaded, name), copy_states(model, name), strict=True):
            assert torch.equal(given, state)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the Trainer does not load the adapter `default` of a checkpoint with several",
)
def test_dpo_with_its_reference_resumes_bit_for_bit(tmp_path):
    def build() -> Trainer:
        model = get_peft_model(build_causal_lm(), build_prefix(prefix_dropout=0.3))
        perturb(model)
        model.save_pretrained(tmp_path / "saved")
        model = PeftModel.from_pretrained(build_causal_lm(), tmp_path / "saved", is_trainable=True)
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return build_trainer("dpo", model, PREFERENCES, tmp_path, **settings)

    whole, resumed = build(), build()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(whole)
    expected = copy_trained(whole.model)
    given = copy_trained(resumed.model)
    assert given.keys() == expected.keys() == named_prefix_parameters(whole.model).keys() & given.keys()
    assert all(torch.equal(given[name], expected[name]) for name in given)


# Generation inside of a trainer


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_grpo_generates_with_the_prefix_and_measures_the_distance_from_the_base_model(tmp_path, settings):
    seen: dict[str, str] = {}

    def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        seen.update(zip(prompts, completions, strict=True))
        return [float(i) for i in range(len(prompts))]

    model = build_causal_lm()
    prompts = [{"prompt": row["prompt"]} for row in PREFERENCES]
    settings = settings | {"num_generations": 2, "max_completion_length": 6, "max_steps": 1, "beta": 0.1, "top_k": 1}
    trainer = build_trainer(
        "grpo", model, prompts, tmp_path, peft_config=build_prefix(), reward_funcs=reward, **settings
    )
    perturb(trainer.model)
    adapted = get_peft_model(build_causal_lm(), build_prefix())
    adapted.load_state_dict(trainer.model.state_dict())
    trainer.train()
    tokenizer, base, distances = build_tokenizer(), build_causal_lm(), []
    assert seen
    for prompt, completion in seen.items():
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        generated = adapted.eval().generate(ids, max_new_tokens=6, do_sample=False)
        assert completion == tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        with torch.no_grad():
            log_probs = [m(generated).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1) for m in (adapted, base)]
        chosen = [value.gather(-1, generated[0, ids.shape[1] :, None]) for value in log_probs]
        difference = chosen[1] - chosen[0]
        distances.append((difference.exp() - difference - 1).mean())
    (logged,) = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logged == pytest.approx(float(torch.stack(distances).mean()), rel=1e-2)


# Supervised fine-tuning


@pytest.mark.parametrize("rows", [COMPLETIONS, CHATS], ids=["completions", "chats"])
def test_the_prefix_of_a_text_starts_sft_at_the_loss_of_the_prompted_model(tmp_path, rows):
    """The fused head of TRL, its masks and the prefix, against the base model with the text in front."""
    text = "answer briefly: "
    tokenizer = build_tokenizer()
    ids = tokenizer(text)["input_ids"]
    settings = {"assistant_only_loss": True} if rows is CHATS else {}
    trainer = build_trainer(
        "sft",
        build_causal_lm(),
        rows,
        tmp_path,
        peft_config=PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=ids),
        max_steps=1,
        **settings,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    total, count, base = 0.0, 0, build_causal_lm()
    for row, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        row, labels = row[mask.bool()], labels[mask.bool()]
        with torch.no_grad():
            logits = base(torch.cat([torch.tensor(ids), row])[None]).logits[0, len(ids) :]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    assert losses_of(trainer)[0] == pytest.approx(total / count, abs=1e-4)


# Tokens that a chat template brings along


def test_sft_trains_the_embeddings_of_the_new_tokens_of_a_chat_template(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "template")
    base = build_causal_lm()
    settings = {"chat_template_path": str(tmp_path / "template"), "peft_config": build_prefix()}
    trainer = build_trainer("sft", base, CHATS, tmp_path / "sft", **settings)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    fresh = build_causal_lm()
    fresh.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    ids = torch.tensor([[259, 70, 71, 260]])
    assert any(name.endswith("trainable_tokens_delta.default") for name in loaded.state_dict())
    # The rows of the head are not tied to them, and are drawn anew.
    given, expected = (model.eval()(ids).logits[..., :259] for model in (loaded, trainer.model))
    assert_close(given, expected, atol=1e-5, rtol=1e-5)
