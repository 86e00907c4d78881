"""The text, and its tokens, that a prefix or a prompt starts from."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_plus.demonstrations import choose_demonstrations, write_demonstrations
from peft_prefix_plus.examples import Example

INIT_TEXT = "$init_text"
FIELDS = {"text", "examples", "draws"}


def write_initial_text(
    init: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    init_text: str,
    examples: Sequence[Example] = (),
) -> str:
    """Write what an experiment file calls `init` or `prompt`.

    Args:
        init (`dict`): `text`, where `"$init_text"` stands for that of the task, and `examples` (default 0): how many
            training examples stand in front of it. With `draws`, they are drawn so many times, and those after which
            the model does best on other training examples are taken; see [`choose_demonstrations`].
        model (`PreTrainedModel`): the base model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        init_text (`str`): the task's.
        examples (`Sequence[Example]`): the training set.

    Returns:
        `str`: the prompt, the first reference and a line break of each example, then the text.
    """
    if set(init) - FIELDS or not init:
        raise ValueError(f"Expected the fields {sorted(FIELDS)}, got {init!r}.")
    text = init_text if init.get("text") == INIT_TEXT else init.get("text", "")
    count = init.get("examples", 0)
    if "draws" in init:
        return choose_demonstrations(model, tokenizer, examples, count, text, init["draws"])
    return write_demonstrations(examples, count) + text


def build_initial_tokens(
    init: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    init_text: str,
    examples: Sequence[Example] = (),
) -> list[int]:
    """Tokenize what an experiment file calls `init`, without special tokens.

    Args:
        init, model, tokenizer, init_text, examples: see [`write_initial_text`].

    Returns:
        `list[int]`: those of [`write_initial_text`].
    """
    text = write_initial_text(init, model, tokenizer, init_text, examples)
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not token_ids:
        raise ValueError(f"`init` is {init!r} and the task's text {init_text!r}: no token to start from.")
    return token_ids
