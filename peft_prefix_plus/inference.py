"""What a causal language model makes of examples: its losses, and the texts that it generates."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .architectures import find_device
from .examples import IGNORED_LABEL, Example, tokenize_examples, tokenize_prompts


class ExampleLoss(NamedTuple):
    """The loss of one example, all its references counted.

    Attributes:
        total (`float`): cross-entropy, summed over the tokens of the completions, in nats.
        num_tokens (`int`): how many these are.
    """

    total: float
    num_tokens: int


def compute_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 16,
    max_length: int = 1024,
    show_progress: bool = False,
) -> float:
    """Mean cross-entropy per token of the completions, all references counted, in nats.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        examples (`Sequence[Example]`): at least one.
        batch_size (`int`): inputs per forward.
        max_length (`int`): longest input in tokens.
        show_progress (`bool`): show a progress bar.

    Returns:
        `float`: total loss over the total number of completion tokens, whatever the batches.
    """
    losses = measure_losses(model, tokenizer, examples, batch_size, max_length, show_progress)
    return sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)


@torch.no_grad()
def measure_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 16,
    max_length: int = 1024,
    show_progress: bool = False,
) -> list[ExampleLoss]:
    """The loss of every example by itself.

    Args:
        model, tokenizer, examples, batch_size, max_length, show_progress: see [`compute_loss`].

    Returns:
        `list[ExampleLoss]`: in the order of the examples.
    """
    _check_batch_size(batch_size)
    inputs = tokenize_examples(examples, tokenizer, max_length)
    owners = [index for index, example in enumerate(examples) for _ in example.references]
    totals, counts = [0.0] * len(examples), [0] * len(examples)
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]["input_ids"]))
    device = find_device(model)
    with _evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="loss", disable=not show_progress):
            indices = order[start : start + batch_size]
            rows = [inputs[index] for index in indices]
            batch = {
                "input_ids": _pad([row["input_ids"] for row in rows], tokenizer.pad_token_id or 0, left=False),
                "attention_mask": _pad([row["attention_mask"] for row in rows], 0, left=False),
            }
            labels = _pad([row["labels"] for row in rows], IGNORED_LABEL, left=False).to(device)
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            # Methods with virtual tokens in the input give logits for them, too.
            logits = logits[:, -labels.shape[1] :]
            losses = nn.functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED_LABEL, reduction="none"
            )
            num_tokens = (labels[:, 1:] != IGNORED_LABEL).sum(1).tolist()
            for index, loss, count in zip(indices, losses.sum(1).tolist(), num_tokens, strict=True):
                totals[owners[index]] += loss
                counts[owners[index]] += count
    return [ExampleLoss(total, count) for total, count in zip(totals, counts, strict=True)]


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int = 16,
    show_progress: bool = False,
    **generation_kwargs: object,
) -> list[str]:
    """Continue prompts, in batches padded on the left.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence[str]`): texts; an empty one starts at the beginning of a sequence.
        batch_size (`int`): prompts per batch.
        show_progress (`bool`): show a progress bar.
        **generation_kwargs: passed to `generate`; greedy search with 128 new tokens unless they, or a
            `generation_config` among them, say otherwise.

    Returns:
        `list[str]`: the continuations, in the order of the prompts, without special tokens.

    Raises:
        ValueError: if `prompts` is one text, `batch_size` is less than 1, or several texts a prompt are asked for.
    """
    _check_batch_size(batch_size)
    if isinstance(prompts, str):
        raise ValueError(f"`prompts` must be a list of texts, got {prompts!r:.200}.")
    config: Any = generation_kwargs.get("generation_config") or model.generation_config
    if (generation_kwargs.get("num_return_sequences") or config.num_return_sequences or 1) != 1:
        raise ValueError("`generate_texts` writes one text for each prompt; repeat the prompts for more of them.")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings: dict[str, object] = {
        "eos_token_id": _list_end_tokens(config, tokenizer),
        "pad_token_id": pad_id,
        **generation_kwargs,
    }
    if settings.get("generation_config") is None:
        lengths = {} if "max_length" in settings else {"max_new_tokens": 128}
        settings = {**lengths, "do_sample": False, **settings}
    ids = tokenize_prompts(prompts, tokenizer)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    texts = [""] * len(ids)
    device = find_device(model)
    with _evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=not show_progress):
            indices = order[start : start + batch_size]
            input_ids = _pad([ids[index] for index in indices], pad_id, left=True).to(device)
            mask = _pad([[1] * len(ids[index]) for index in indices], 0, left=True).to(device)
            output = model.generate(input_ids=input_ids, attention_mask=mask, tokenizer=tokenizer, **settings)
            continuations = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, continuations, strict=True):
                texts[index] = text.strip()
    return texts


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")


def _list_end_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text in generation, and the one that training puts behind every completion."""
    own = config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({token_id for token_id in (*listed, tokenizer.eos_token_id) if token_id is not None})


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool) -> Tensor:
    """Stack rows of different lengths to `[rows, longest]`."""
    longest = max(len(row) for row in rows)
    padding = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, padding, strict=True)])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    # A module that was frozen in its own mode goes back to that.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
