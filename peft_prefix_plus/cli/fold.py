"""`prefix-plus fold`: replace an adapter's projection by its result."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..folding import fold_adapter
from .arguments import parse_arguments


@dataclass
class FoldArguments:
    """Options of the command."""

    adapter: str = field(metadata={"help": "Directory of the adapter."})
    output_dir: str = field(metadata={"help": "Directory for the folded adapter."})


def run(words: Sequence[str]) -> None:
    """Run the command."""
    (arguments,) = parse_arguments("fold", "Replace an adapter's projection by its result.", (FoldArguments,), words)
    path = fold_adapter(arguments.adapter, arguments.output_dir)
    print(f"folded {arguments.adapter} into {path} ({os.path.getsize(path) // 1024} KB)")
