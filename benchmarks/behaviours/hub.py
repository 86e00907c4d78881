"""The Hugging Face Hub, from a server on loopback: pushing, loading, and what the Trainer uploads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed

from .behaviour import Check, behaviour
from .hub_client import OWNER, STRANGER_TOKEN, TOKEN, get_hub, in_client
from .methods import Method
from .subjects import (
    add_adapter,
    assert_close,
    assert_differ,
    compute_logits,
    draw_tokens,
    perturb,
    save_base_model,
)

BASE = f"{OWNER}/base"
PUSH: dict[str, Any] = {"token": TOKEN}


def _behaviour(check: Check) -> Check:
    """Register a behaviour of this group, which runs in the process that has a Hub."""
    register: Callable[[Check], Check] = behaviour("Hub")
    return register(in_client(check))


def _load_base(directory: Path) -> PreTrainedModel:
    """Load the Llama from the Hub, where it is put first."""
    hub = get_hub()
    if BASE not in hub.repositories:
        place = Path(save_base_model(directory / "base"))
        hub.put(BASE, {path.name: path.read_bytes() for path in place.iterdir()})
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


def _build_adapted(method: Method, directory: Path, seed: int = 2) -> PeftModel:
    model = method.apply(_load_base(directory))
    perturb(model, seed=seed)
    return model.eval()


def _name(method: Method, directory: Path) -> str:
    """A repository of the Hub that is not there yet."""
    repo_id = f"{OWNER}/{method.name}-{len(get_hub().repositories)}"
    assert repo_id not in get_hub().repositories
    return repo_id


def _assert_loads(method: Method, directory: Path, expected: torch.Tensor, repo_id: str, **kwargs: Any) -> None:
    """Fail unless an adapter of the Hub gives some logits, and others than the base model."""
    base = _load_base(directory)
    assert_differ(expected, compute_logits(base))
    assert_close(compute_logits(PeftModel.from_pretrained(base, repo_id, **kwargs)), expected)


@_behaviour
def push_and_load_from_the_hub(method: Method, directory: Path) -> None:
    """`push_to_hub`, then `PeftModel.from_pretrained("user/repository")`."""
    model, repo_id = _build_adapted(method, directory), _name(method, directory)
    model.push_to_hub(repo_id, **PUSH)
    names = set(get_hub().repositories[repo_id].files())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "adapter_model.bin" not in names and "model.safetensors" not in names
    _assert_loads(method, directory, compute_logits(model), repo_id)


@_behaviour
def load_a_revision_of_the_hub(method: Method, directory: Path) -> None:
    """Load an adapter by branch, tag and commit of the Hub."""
    model, repo_id = _build_adapted(method, directory), _name(method, directory)
    model.push_to_hub(repo_id, **PUSH)
    api = HfApi(token=TOKEN)
    api.create_tag(repo_id, tag="v1")
    first, sha = compute_logits(model), api.model_info(repo_id).sha
    perturb(model, seed=5)
    second = compute_logits(model)
    assert_differ(second, first)
    model.push_to_hub(repo_id, **PUSH)
    perturb(model, seed=6)
    model.push_to_hub(repo_id, revision="experiment", **PUSH)
    for revision, expected in {"v1": first, sha: first, "main": second, "experiment": compute_logits(model)}.items():
        _assert_loads(method, directory, expected, repo_id, revision=revision)


@_behaviour
def load_from_a_subfolder_of_the_hub(method: Method, directory: Path) -> None:
    """Push two adapters at once, and load the second by `subfolder=`."""
    model, repo_id = _build_adapted(method, directory), _name(method, directory)
    add_adapter(model, method, "second", size=4)
    first = compute_logits(model)
    model.push_to_hub(repo_id, **PUSH)
    model.set_adapter("second")
    second = compute_logits(model)
    assert_differ(second, first)
    _assert_loads(method, directory, first, repo_id)
    _assert_loads(method, directory, second, repo_id, subfolder="second")


@_behaviour
def load_a_second_adapter_from_the_hub(method: Method, directory: Path) -> None:
    """`model.load_adapter("user/repository", adapter_name=...)` of PEFT."""
    other, repo_id = _build_adapted(method, directory, seed=3), _name(method, directory)
    other.push_to_hub(repo_id, **PUSH)
    model = _build_adapted(method, directory)
    model.load_adapter(repo_id, adapter_name="second")
    assert_differ(compute_logits(model), compute_logits(other))
    model.set_adapter("second")
    assert_close(compute_logits(model), compute_logits(other))


@_behaviour
def keep_a_repository_private(method: Method, directory: Path) -> None:
    """A private repository needs the token of its owner."""
    model, repo_id = _build_adapted(method, directory), _name(method, directory)
    model.push_to_hub(repo_id, private=True, **PUSH)
    assert get_hub().repositories[repo_id].private
    for token in (None, STRANGER_TOKEN):
        is_refused = False
        try:
            PeftModel.from_pretrained(_load_base(directory), repo_id, token=token)
        except (ValueError, OSError):
            is_refused = True
        assert is_refused
    _assert_loads(method, directory, compute_logits(model), repo_id, token=TOKEN)


@_behaviour
def load_by_an_auto_class_of_peft_from_the_hub(method: Method, directory: Path) -> None:
    """`AutoPeftModelForCausalLM` loads the base model, too."""
    model, repo_id = _build_adapted(method, directory), _name(method, directory)
    model.push_to_hub(repo_id, **PUSH)
    loaded = AutoPeftModelForCausalLM.from_pretrained(repo_id)
    assert_differ(compute_logits(model), compute_logits(_load_base(directory)))
    assert_close(compute_logits(loaded), compute_logits(model))


@_behaviour
def load_by_transformers_from_the_hub(method: Method, directory: Path) -> None:
    """`AutoModelForCausalLM.from_pretrained` and `model.load_adapter` of transformers, without PEFT's classes."""
    model, repo_id = _build_adapted(method, directory), _name(method, directory)
    model.push_to_hub(repo_id, **PUSH)
    assert_differ(compute_logits(model), compute_logits(_load_base(directory)))
    assert_close(compute_logits(AutoModelForCausalLM.from_pretrained(repo_id)), compute_logits(model))
    base = _load_base(directory)
    base.load_adapter(repo_id)
    assert_close(compute_logits(base), compute_logits(model))


def _build_trainer(method: Method, directory: Path, repo_id: str, **settings: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in draw_tokens(4, 6)]
    base = _load_base(directory)
    set_seed(0)
    model = method.apply(base)
    arguments = TrainingArguments(
        str(directory / "output"),
        learning_rate=0.1,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        hub_model_id=repo_id,
        **{"max_steps": 2, "hub_token": TOKEN, **settings},
    )
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


@_behaviour
def push_from_the_trainer(method: Method, directory: Path) -> None:
    """`trainer.push_to_hub()` at the end."""
    repo_id = _name(method, directory)
    trainer = _build_trainer(method, directory, repo_id, save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    files = get_hub().repositories[repo_id].files()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= set(files)
    assert "model.safetensors" not in files
    assert b"library_name: peft" in files["README.md"]
    _assert_loads(method, directory, compute_logits(trainer.model), repo_id)


@_behaviour
def resume_from_a_checkpoint_of_the_hub(method: Method, directory: Path) -> None:
    """The Trainer pushes its checkpoints while it trains; training resumes from one that was downloaded."""
    repo_id = _name(method, directory)
    pushes = {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_always_push": True}
    trainer = _build_trainer(method, directory, repo_id, save_strategy="steps", save_steps=1, **pushes)
    trainer.train()
    trainer._finish_current_push()
    place = HfApi().snapshot_download(repo_id, allow_patterns="last-checkpoint/*", local_dir=directory / "downloaded")
    resumed, whole = (_build_trainer(method, directory, repo_id, max_steps=4, save_strategy="no") for _ in range(2))
    resumed.train(resume_from_checkpoint=f"{place}/last-checkpoint")
    whole.train()
    assert resumed.state.global_step == whole.state.global_step == 4
    assert_differ(compute_logits(whole.model), compute_logits(trainer.model))
    assert_close(compute_logits(resumed.model), compute_logits(whole.model))
