"""`prefix-plus evaluate`: what an adapter changes, in figures."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedTokenizerBase

from ..base_models import choose_device, load_base_model
from ..config import PrefixPlusConfig
from ..evaluation import evaluate_model
from ..examples import load_examples
from .arguments import DEFAULT_TEMPLATE, check_minimum, parse_arguments, read_line_breaks


@dataclass
class EvaluateArguments:
    """Options of the command."""

    adapter: str = field(metadata={"help": "Directory or hub id of the adapter."})
    eval_file: str = field(metadata={"help": "JSON lines, CSV, or the hub id of a data set."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Base model; default: the adapter's own."})
    dtype: str = field(default="auto", metadata={"help": "Weights of the base model: auto, float32, bfloat16, ..."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a hub data set."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Use only that many rows."})
    prompt_template: str = field(
        default=DEFAULT_TEMPLATE, metadata={"help": "Turns the source of a row into a prompt."}
    )
    batch_size: int = field(default=16, metadata={"help": "Examples per batch."})
    max_length: int = field(default=1024, metadata={"help": "Longest input of the loss in tokens."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest generated text in tokens."})
    output_file: str | None = field(default=None, metadata={"help": "Also write scores and texts there, as JSON."})

    def __post_init__(self) -> None:
        check_minimum(self, 2, "max_length")
        check_minimum(self, 1, "max_eval_examples", "batch_size", "max_new_tokens")
        self.prompt_template = read_line_breaks(self.prompt_template)
        if self.output_file is not None:
            if os.path.isdir(self.output_file):
                raise ValueError(f"--output_file {self.output_file!r} is a directory; name a file in it.")
            if not os.path.isdir(os.path.dirname(self.output_file) or "."):
                raise ValueError(f"--output_file {self.output_file!r} is in a directory that does not exist.")


def load_adapter(adapter: str, model_name: str | None, dtype: str) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter onto its base model, or onto another one of the same shape, on the accelerator if there is one.

    Raises:
        ValueError: if there is no such adapter, or neither the caller nor the adapter names the base model.
    """
    if not os.path.isdir(adapter) and adapter.count("/") != 1:
        raise ValueError(f"There is no directory {adapter!r}, and it is not an id of the hub, `owner/name`, either.")
    weights = os.path.join(adapter, SAFETENSORS_WEIGHTS_NAME)
    if os.path.isdir(adapter) and not os.path.isfile(weights):
        raise ValueError(f"There is no {weights}; expected the directory of a saved adapter.")
    config = PrefixPlusConfig.from_pretrained(adapter)
    if not isinstance(config, PrefixPlusConfig):
        raise ValueError(f"{adapter!r} is an adapter of type {config.peft_type}, not of PrefixPlus.")
    # A revision is that of the adapter's own base model.
    name, revision = (model_name, None) if model_name else (config.base_model_name_or_path, config.revision)
    if not name:
        raise ValueError(f"The adapter {adapter!r} does not say what its base model is; use --model_name_or_path.")
    try:
        model, tokenizer = load_base_model(name, dtype, revision)
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"The base model {name!r} of the adapter {adapter!r} cannot be loaded: {error} If it has moved, name it "
            "with --model_name_or_path."
        ) from error
    return PeftModel.from_pretrained(model.to(choose_device()), adapter), tokenizer


def format_comparison(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Lay scores out side by side.

    Args:
        columns (`Mapping[str, Mapping[str, float]]`): scores by name, by the heading of their column.

    Returns:
        `str`: one line per score.
    """
    names = list(next(iter(columns.values())))
    lines = [f"{'':<12}" + "".join(f"{heading:>14}" for heading in columns)]
    for name in names:
        lines.append(f"{name:<12}" + "".join(f"{scores[name]:>14.3f}" for scores in columns.values()))
    return "\n".join(lines)


def run(words: Sequence[str]) -> None:
    """Run the command."""
    (arguments,) = parse_arguments(
        "evaluate", "Loss and text scores with and without an adapter.", (EvaluateArguments,), words
    )
    model, tokenizer = load_adapter(arguments.adapter, arguments.model_name_or_path, arguments.dtype)
    examples = load_examples(
        arguments.eval_file, tokenizer, arguments.eval_split, arguments.prompt_template, arguments.max_eval_examples
    )
    settings = {"max_length": arguments.max_length, "show_progress": True, "max_new_tokens": arguments.max_new_tokens}
    with model.disable_adapter():
        base_scores, base_texts = evaluate_model(model, tokenizer, examples, arguments.batch_size, **settings)
    scores, texts = evaluate_model(model, tokenizer, examples, arguments.batch_size, **settings)
    print(format_comparison({"base model": base_scores, "adapter": scores}))
    if arguments.output_file is not None:
        report = {"base_model": base_scores, "adapter": scores, "base_texts": base_texts, "texts": texts}
        with open(arguments.output_file, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1, ensure_ascii=False)
