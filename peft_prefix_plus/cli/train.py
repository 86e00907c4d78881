"""`prefix-plus train`: a prefix for your data, without a script."""

import os
from collections.abc import Sequence
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..base_models import load_base_model, locate_tokenizer
from ..config import PrefixPlusConfig
from ..demonstrations import choose_demonstrations, write_demonstrations
from ..examples import Example, load_examples, tokenize_examples
from ..interruption import find_checkpoint_damage, find_last_complete_checkpoint
from ..model_card import update_model_card
from .arguments import DataArguments, ModelArguments, PrefixArguments, build_config, parse_arguments

# What suits a prefix; the rest are the defaults of `TrainingArguments`.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-2,
    "warmup_steps": 0.2,
    "weight_decay": 0.0,
    "logging_steps": 10,
    "report_to": "none",
}


def build_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example] | None = None,
    max_length: int = 1024,
    **trainer_kwargs: Any,
) -> Trainer:
    """Build the `Trainer` that the commands use, with the loss on completions only.

    Args:
        model (`PeftModel`): with a trainable adapter.
        tokenizer (`PreTrainedTokenizerBase`): of the base model.
        arguments (`TrainingArguments`): all of them.
        train_examples (`Sequence[Example]`): to train on.
        eval_examples (`Sequence[Example]`, *optional*): for the evaluation loss.
        max_length (`int`): longest input in tokens.
        **trainer_kwargs: passed to `Trainer`.

    Returns:
        `Trainer`
    """
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=tokenize_examples(train_examples, tokenizer, max_length),
        eval_dataset=tokenize_examples(eval_examples, tokenizer, max_length) if eval_examples else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        **trainer_kwargs,
    )


def run(words: Sequence[str]) -> None:
    """Run the command."""
    model_arguments, data_arguments, prefix_arguments, training_arguments = parse_arguments(
        "train",
        "Train a prefix and save it to --output_dir.",
        (ModelArguments, DataArguments, PrefixArguments, TrainingArguments),
        words,
        # Left out, the directory would be one that the user has not named.
        DEFAULTS | {"output_dir": ""},
    )
    if data_arguments.train_file is None:
        raise ValueError("Name the data to train on with --train_file.")
    if not training_arguments.output_dir:
        raise ValueError("Name a directory for the adapter with --output_dir.")
    if training_arguments.hub_token is not None:
        raise ValueError(
            "--hub_token is not taken: the Trainer would write the token to training_args.bin, and upload that. Log "
            "in with `hf auth login`, or set the environment variable HF_TOKEN."
        )
    check_processes(training_arguments)
    set_seed(training_arguments.seed)
    # Before the model is loaded, which takes longer than to find a mistake.
    _check_start(build_config(prefix_arguments), data_arguments)
    model, tokenizer = _load(model_arguments)
    train_examples, eval_examples = _load_data(data_arguments, tokenizer)
    if data_arguments.num_init_examples:
        prefix_arguments.prefix_init_text = _write_start(
            model,
            tokenizer,
            train_examples,
            prefix_arguments.prefix_init_text or "",
            data_arguments,
            training_arguments,
        )
    config = build_config(prefix_arguments, task_type="CAUSAL_LM")
    peft_model = get_peft_model(
        model, _with_tokenizer(config, model_arguments), revision=model_arguments.model_revision
    )
    peft_model.print_trainable_parameters()
    trainer = build_trainer(
        peft_model, tokenizer, training_arguments, train_examples, eval_examples, data_arguments.max_length
    )
    checkpoint = _resolve_checkpoint(training_arguments)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    if eval_examples:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        trainer.log_metrics("eval", metrics)
        if trainer.is_world_process_zero():
            update_model_card(training_arguments.output_dir, metrics)
    print(f"saved the adapter to {training_arguments.output_dir}")


def check_processes(arguments: TrainingArguments) -> None:
    """Refuse processes that were launched together, but that would each train an adapter of its own."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != launched:
        raise ValueError(
            f"{launched} processes were launched, but each would train on its own. On a machine without GPUs, add "
            "--use_cpu; on one with GPUs, launch as many processes as there are GPUs."
        )


def _check_start(config: PrefixPlusConfig, arguments: DataArguments) -> None:
    """Refuse examples to start from beside another start, which one of both would silently replace."""
    if arguments.num_init_examples and config.prefix_init not in ("vocab", "text"):
        raise ValueError(
            f"--num_init_examples makes the prefix start from a text, but --prefix_init is {config.prefix_init!r}. "
            "Leave one of both out."
        )


def _write_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    text: str,
    arguments: DataArguments,
    training_arguments: TrainingArguments,
) -> str:
    """The text that the prefix starts from: training examples, and what the user gave."""
    count, seed = arguments.num_init_examples, training_arguments.seed
    if count > len(examples):
        raise ValueError(f"--num_init_examples is {count}, but --train_file has {len(examples)} examples.")
    if arguments.num_init_draws == 1:
        return write_demonstrations(examples, count, seed) + text
    # Where the `Trainer` will put it; many inputs go through it here.
    model.to(training_arguments.device)
    return choose_demonstrations(model, tokenizer, examples, count, text, arguments.num_init_draws, seed=seed)


def _load(arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_base_model(
        arguments.model_name_or_path, arguments.dtype, arguments.model_revision, arguments.attn_implementation
    )


def _load_data(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], list[Example] | None]:
    assert arguments.train_file is not None
    train_examples = load_examples(
        arguments.train_file, tokenizer, arguments.train_split, arguments.prompt_template, arguments.max_train_examples
    )
    if arguments.eval_file is None:
        return train_examples, None
    return train_examples, load_examples(
        arguments.eval_file, tokenizer, arguments.eval_split, arguments.prompt_template, arguments.max_eval_examples
    )


def _with_tokenizer(config: PrefixPlusConfig, arguments: ModelArguments) -> PrefixPlusConfig:
    """Tell the configuration where the tokenizer of the init text is, unless the user did."""
    if config.prefix_init == "text" and config.tokenizer_name_or_path is None:
        config.tokenizer_name_or_path, config.tokenizer_kwargs = locate_tokenizer(
            arguments.model_name_or_path, config.tokenizer_kwargs, arguments.model_revision
        )
    return config


def _resolve_checkpoint(arguments: TrainingArguments) -> str | None:
    """`--resume_from_checkpoint last` stands for the newest complete checkpoint in the output directory."""
    if arguments.resume_from_checkpoint is None:
        return None
    # From YAML, it may be a truth value.
    checkpoint = str(arguments.resume_from_checkpoint)
    if checkpoint in ("false", "False"):
        return None
    if checkpoint not in ("last", "true", "True"):
        problem = find_checkpoint_damage(checkpoint)
        if problem is not None:
            raise ValueError(
                f"Training cannot go on from {checkpoint}: {problem} Use --resume_from_checkpoint last for the newest "
                "complete checkpoint of --output_dir."
            )
        return checkpoint
    assert arguments.output_dir is not None
    last = find_last_complete_checkpoint(arguments.output_dir)
    if last is None:
        raise ValueError(f"There is no checkpoint in {arguments.output_dir} that is complete; start a new run.")
    return last
