"""`prefix-plus generate`: continue prompts with an adapter."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..examples import check_template
from ..inference import generate_texts
from .arguments import DEFAULT_TEMPLATE, check_minimum, parse_arguments, read_line_breaks
from .evaluate import load_adapter


@dataclass
class GenerateArguments:
    """Options of the command."""

    adapter: str = field(metadata={"help": "Directory or hub id of the adapter."})
    prompt: list[str] | None = field(
        default=None, metadata={"help": "One or more prompts; default: every line of the standard input."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Base model; default: the adapter's own."})
    dtype: str = field(default="auto", metadata={"help": "Weights of the base model: auto, float32, bfloat16, ..."})
    prompt_template: str = field(default=DEFAULT_TEMPLATE, metadata={"help": "Turns what you type into a prompt."})
    chat: bool = field(default=False, metadata={"help": "Use the chat template of the model instead."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest generated text in tokens."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of greedy search."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Of sampling."})
    num_beams: int = field(default=1, metadata={"help": "More than one: beam search."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per batch."})

    def __post_init__(self) -> None:
        check_minimum(self, 1, "batch_size", "max_new_tokens", "num_beams")
        self.prompt_template = read_line_breaks(self.prompt_template)
        check_template(self.prompt_template)
        if self.chat and self.prompt_template != read_line_breaks(DEFAULT_TEMPLATE):
            raise ValueError("--chat uses the chat template in place of --prompt_template; leave one of both out.")
        for name in ("temperature", "top_p"):
            if vars(self)[name] != 1.0 and not self.do_sample:
                raise ValueError(f"--{name} is {vars(self)[name]}, but the search is greedy; add --do_sample.")


def run(words: Sequence[str]) -> None:
    """Run the command."""
    (arguments,) = parse_arguments("generate", "Continue prompts with an adapter.", (GenerateArguments,), words)
    sources = arguments.prompt or [line.rstrip("\n") for line in sys.stdin]
    if not sources:
        raise ValueError("There is nothing to continue: give --prompt, or lines on the standard input.")
    model, tokenizer = load_adapter(arguments.adapter, arguments.model_name_or_path, arguments.dtype)
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p} if arguments.do_sample else {}
    texts = generate_texts(
        model,
        tokenizer,
        [_build_prompt(source, tokenizer, arguments) for source in sources],
        arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.do_sample,
        num_beams=arguments.num_beams,
        **sampling,
    )
    print("\n".join(texts))


def _build_prompt(source: str, tokenizer: PreTrainedTokenizerBase, arguments: GenerateArguments) -> str:
    if not arguments.chat:
        return arguments.prompt_template.replace("{source}", source)
    if tokenizer.chat_template is None:
        raise ValueError("The base model has no chat template; leave --chat out.")
    messages = [{"role": "user", "content": source}]
    prompt: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt
