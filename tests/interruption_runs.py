"""Training runs for `test_interruption.py`, in a module of their own that the server of new processes imports once."""

import gc
import os
from pathlib import Path

import torch
from helpers import INIT_TOKEN_IDS, draw_tokens
from peft import PeftModel, get_peft_model
from tiny_models import build_model
from transformers import Trainer, TrainingArguments

from peft_prefix_plus import PrefixPlusConfig

NUM_STEPS = 5
torch.set_num_threads(1)


def build_run(output_dir: Path, **settings: object) -> Trainer:
    """A run with everything that a checkpoint has to carry: schedule, dropout, a second adapter, a trained module."""
    config = {"task_type": "CAUSAL_LM", "prefix_init_token_ids": INIT_TOKEN_IDS, "prefix_dropout": 0.3}
    # Wide, so that saving takes a while.
    wide = PrefixPlusConfig(**config, projection_dim=512, modules_to_save=["lm_head"])
    # No adapter is called "default": before 5.23, transformers does not load that one from among several.
    model = get_peft_model(build_model("llama"), wide, adapter_name="first")
    model.add_adapter("other", PrefixPlusConfig(**config, projection="none"))
    arguments = {"max_steps": NUM_STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_steps": 1}
    arguments |= {"warmup_steps": 2, "lr_scheduler_type": "cosine", "logging_steps": 1}
    arguments |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    rows = [{"input_ids": row, "labels": row} for row in draw_tokens(16, 8)]
    return Trainer(model, TrainingArguments(str(output_dir), **(arguments | settings)), train_dataset=rows)


def get_trained(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(output_dir: Path, checkpoint: str | None, result: Path, settings: dict[str, object]) -> None:
    """Train in a process of its own, and leave the trained parameters behind."""
    # Collecting garbage among all that was imported would take longer than to train.
    gc.freeze()
    # Whoever waits for the process need not read its log.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    trainer = build_run(output_dir, **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    torch.save(get_trained(trainer.model), result)
