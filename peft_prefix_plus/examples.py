"""Rows of training data, and what a causal language model is trained on."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

try:
    from datasets import load_dataset
except ModuleNotFoundError:
    # Files are read without it.
    load_dataset = None

IGNORED_LABEL = -100
ROW_FORMATS = (
    "{'prompt': str, 'completion': str}",
    "{'messages': [{'role': ..., 'content': ...}, ...]}",
    "{'text': str}",
    "{'source': str, 'references': [str, ...]}",
)


@dataclass(frozen=True)
class Example:
    """One prompt with everything that would be a right answer.

    Attributes:
        prompt (`str`): what the model reads; no loss is taken on it.
        references (`tuple[str, ...]`): at least one completion. Training uses each, scores compare with all.

    Raises:
        ValueError: if the prompt is no string, or the references are not a list of strings that say something.
    """

    prompt: str
    references: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"the prompt must be a string, got {self.prompt!r}.")
        if not isinstance(self.references, list | tuple) or not self.references:
            raise ValueError(f"expected a list of at least one reference, got {self.references!r}.")
        for reference in self.references:
            if not isinstance(reference, str) or not reference.strip():
                raise ValueError(f"every completion must be a string that is not empty, got {reference!r}.")
        for text in (self.prompt, *self.references):
            _check_characters(text)
        object.__setattr__(self, "references", tuple(self.references))


def _check_characters(text: str) -> None:
    """Raise a `ValueError` if a text holds half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a character (a surrogate) stands at position {error.start} of {text!r:.200}."
        ) from error


def load_examples(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    split: str = "train",
    prompt_template: str = "{source}\n",
    limit: int | None = None,
) -> list[Example]:
    """Read examples from a file or from a data set of the Hugging Face Hub.

    Args:
        path (`str` or `os.PathLike`): a `.jsonl`, `.json` or `.csv` file, or the id or the directory of a data set for
            `datasets`.
        tokenizer (`PreTrainedTokenizerBase`): renders chat messages.
        split (`str`): split of such a data set.
        prompt_template (`str`): turns a `source` into a prompt.
        limit (`int`, *optional*): read only that many rows.

    Returns:
        `list[Example]`: one per row.

    Raises:
        ValueError: naming the file, the row and what it should hold, if a row cannot be used.
    """
    path = os.fspath(path)
    check_template(prompt_template)
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    rows = read_rows(path, split)
    examples: list[Example] = []
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(examples) == limit:
            break
        try:
            examples.append(parse_row(row, tokenizer, prompt_template))
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    if not examples:
        raise ValueError(f"{path} has no rows. Expected rows of one of: {'; '.join(ROW_FORMATS)}.")
    return examples


def check_template(prompt_template: str) -> None:
    """Raise a `ValueError` if a template has no place for what the prompt is about."""
    if "{source}" not in prompt_template:
        raise ValueError(f"The prompt template must contain '{{source}}', got {prompt_template!r}.")


def read_rows(path: str, split: str = "train") -> Iterable[Mapping[str, Any]]:
    """Yield the rows of a JSON lines or CSV file, or of a data set that the library `datasets` loads."""
    if os.path.isfile(path):
        return _read_csv(path) if path.lower().endswith(".csv") else _read_json_lines(path)
    if path.endswith((".jsonl", ".json", ".csv")):
        raise ValueError(f"There is no file {path!r}. Expected a .jsonl or .csv file, or the id of a data set.")
    if load_dataset is None:
        raise ValueError(
            f"{path!r} would be read by the package `datasets`, which is not installed: `pip install datasets`."
        )
    rows: Iterable[Mapping[str, Any]] = load_dataset(path, split=split)
    return rows


@contextmanager
def _open_text(path: str) -> Iterator[TextIO]:
    """Open a file in UTF-8, with or without the mark that spreadsheets put in front."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}). Save it in that encoding.") from error


def _read_json_lines(path: str) -> Iterable[Mapping[str, Any]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}). Expected one object a line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} holds {type(row).__name__}; expected one JSON object a line.")
            yield row


def _read_csv(path: str) -> Iterable[Mapping[str, Any]]:
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{path}, line {reader.line_num} has more fields than the first line has columns. Put texts "
                        "that contain commas between double quotes."
                    )
                yield {key: value for key, value in row.items() if value is not None}
        except csv.Error as error:
            raise ValueError(
                f"{path} cannot be read as CSV behind line {reader.line_num} ({error}). Write JSON lines instead."
            ) from error


def parse_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, prompt_template: str) -> Example:
    """Turn a row into an example, by the columns that it has.

    Raises:
        ValueError: if the columns fit no format, or hold the wrong types.
    """
    if "messages" in row:
        return _parse_messages(row["messages"], tokenizer)
    if "prompt" in row and "completion" in row:
        return Example(row["prompt"], (row["completion"],))
    if "source" in row and ("references" in row or "reference" in row):
        references = row.get("references", row.get("reference"))
        references = (references,) if isinstance(references, str) else references
        if not isinstance(row["source"], str):
            raise ValueError(f"`source` must be a string, got {row['source']!r}.")
        return Example(prompt_template.replace("{source}", row["source"]), references)
    if "text" in row:
        return Example("", (row["text"],))
    raise ValueError(f"has the columns {sorted(row)}; expected one of: {'; '.join(ROW_FORMATS)}.")


def _parse_messages(messages: Any, tokenizer: PreTrainedTokenizerBase) -> Example:
    is_chat = isinstance(messages, list) and all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    )
    if not is_chat or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            "`messages` must be a list of at least two {'role', 'content'} objects that ends with the assistant's, "
            f"got {messages!r}."
        )
    if tokenizer.chat_template is None:
        raise ValueError("`messages` need a tokenizer with a chat template; use 'prompt' and 'completion' instead.")
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the `messages`: {error}") from error
    return Example(prompt, (messages[-1]["content"],))


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int = 1024
) -> list[dict[str, list[int]]]:
    """Turn examples into model inputs with the loss on the completion only.

    Every reference becomes one input: prompt, completion, end of sequence. The prompt has the tokens that the
    tokenizer puts in front of every text, such as a beginning of sequence; see [`tokenize_prompts`]. What is longer
    than `max_length` loses the start of its prompt, then the end of its completion.

    Args:
        examples (`Sequence[Example]`): the examples.
        tokenizer (`PreTrainedTokenizerBase`): the base model's.
        max_length (`int`): longest input in tokens.

    Returns:
        `list[dict[str, list[int]]]`: `input_ids`, `attention_mask` and `labels` (-100 on the prompt).
    """
    if max_length < 2:
        raise ValueError(f"`max_length` must be at least 2, a token to read and one to predict, got {max_length}.")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no token that ends a text, which completions need; set its `eos_token`.")
    prompts = tokenize_prompts([example.prompt for example in examples], tokenizer)
    return [
        _join_tokens(prompt_ids, reference, tokenizer, max_length)
        for example, prompt_ids in zip(examples, prompts, strict=True)
        for reference in example.references
    ]


def tokenize_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize what a model reads first, as `tokenizer(prompt)` does, but open at the end.

    The tokens that the tokenizer puts in front of every text are there, once: a prompt that begins with them, as chat
    templates write it, gets no second ones. Those that it puts behind a text are not.

    Args:
        prompts (`Sequence[str]`): texts; an empty one becomes the token that a sequence begins with, or else that it
            ends with, because a model predicts only behind a token.
        tokenizer (`PreTrainedTokenizerBase`): the base model's.

    Returns:
        `list[list[int]]`: at least one token of each.
    """
    first = _list_first_tokens(tokenizer)
    beginning = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokenized = []
    for prompt in prompts:
        token_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        if token_ids[: len(first)] != first:
            token_ids = first + token_ids
        tokenized.append(token_ids or [beginning])
    return tokenized


def _list_first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts in front of every text."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def _join_tokens(
    prompt_ids: list[int], completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    completion_ids = completion_ids[: max_length - 1]
    prompt_ids = prompt_ids[-(max_length - len(completion_ids)) :]
    input_ids = prompt_ids + completion_ids
    return {
        "input_ids": input_ids,
        "attention_mask": [1] * len(input_ids),
        "labels": [IGNORED_LABEL] * len(prompt_ids) + completion_ids,
    }
