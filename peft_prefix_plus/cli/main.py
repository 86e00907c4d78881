"""`prefix-plus COMMAND ...`: finds the command's module and runs it."""

import importlib
import os
import sys
from collections.abc import Sequence

import peft_prefix_plus

# Set this variable to see where an error came from.
TRACEBACK_VARIABLE = "PREFIX_PLUS_TRACEBACK"

COMMANDS = {
    "train": "train a prefix on your data",
    "evaluate": "loss and text scores on your data, with and without the adapter",
    "generate": "continue prompts",
    "fold": "replace an adapter's projection by its result",
    "demo": "train, evaluate and report on a small data set that ships with the package",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): without the program's name; `None`: those of the process.

    Returns:
        `int`: the exit status: 0, 1 for input that cannot be used, 2 for a command line that cannot be read.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_describe())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"prefix-plus {peft_prefix_plus.__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"prefix-plus: unknown command {words[0]!r}\n\n{_describe()}", file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(f"peft_prefix_plus.cli.{words[0]}")
    except ModuleNotFoundError as error:
        extra = "demo" if words[0] == "demo" else "train"
        remedy = f"pip install '.[{extra}]' in a clone of the repository"
        print(f"prefix-plus {words[0]} needs the package {error.name!r}: {remedy}", file=sys.stderr)
        return 1
    try:
        command.run(words[1:])
    except (ValueError, OSError, ImportError) as error:
        if TRACEBACK_VARIABLE in os.environ:
            raise
        print(f"prefix-plus {words[0]}: {error}", file=sys.stderr)
        return 1
    return 0


def _describe() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: prefix-plus COMMAND [options]",
            "",
            *lines,
            "",
            "`prefix-plus COMMAND --help` lists a command's options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
