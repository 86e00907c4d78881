"""Several sequences in one row: each sees the prefix once, and nothing of the others."""

import pytest
import torch
from flash_stand_in import FLASH_STAND_IN, flash_fixture  # noqa: F401
from helpers import add_prefix, draw_tokens, named_prefix_parameters, perturb
from test_laws import TOLERANCE
from tiny_models import ARCHITECTURES, build_model
from torch import Tensor
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening

# GPT-2 has no flash attention in float32, and transformers hides OPT's packed sequences from each other on flash only.
EXCEPTIONS = {("gpt2", FLASH_STAND_IN), ("opt", "eager"), ("opt", "sdpa")}
# The longest is longer than the sliding windows of 16.
LENGTHS = {"short": [5, 1, 7], "long": [20, 3, 18]}
lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
cases = pytest.mark.parametrize(
    ("name", "implementation"),
    [
        (name, implementation)
        for name in ARCHITECTURES
        for implementation in ("eager", "sdpa", FLASH_STAND_IN)
        if (name, implementation) not in EXCEPTIONS
    ],
)


def build(name: str, implementation: str, **settings):
    model = add_prefix(build_model(name), **settings)
    perturb(model)
    model.set_attn_implementation(implementation)
    return model


def flatten(rows: list[Tensor], **settings: object) -> dict[str, object]:
    """What the collator makes of the rows, without the labels."""
    collator = DataCollatorWithFlattening(return_tensors="pt", **settings)
    batch = collator([{"input_ids": row.tolist()} for row in rows])
    del batch["labels"]
    return batch


def draw_rows(lengths: list[int]) -> list[Tensor]:
    return [draw_tokens(1, length, seed=i)[0] for i, length in enumerate(lengths)]


@cases
@lengths
@pytest.mark.parametrize("has_offsets", [False, True], ids=["positions", "offsets"])
def test_packed_sequences_equal_each_alone(name, implementation, lengths, has_offsets, flash):
    model, rows = build(name, implementation), draw_rows(lengths)
    batch = flatten(rows, return_flash_attn_kwargs=has_offsets)
    assert ("cu_seq_lens_q" in batch) == has_offsets
    logits = model(**batch, use_cache=False).logits[0]
    for packed, row in zip(logits.split(lengths), rows, strict=True):
        assert_close(packed, model(row[None]).logits[0], **TOLERANCE[torch.float32])


@cases
def test_gradients_of_packed_sequences_are_the_sum_of_each_alone(name, implementation, flash):
    model, rows = build(name, implementation), draw_rows(LENGTHS["long"])
    gradients = []
    for batches in ([flatten(rows)], [{"input_ids": row[None]} for row in rows]):
        model.zero_grad()
        for batch in batches:
            model(**batch, use_cache=False).logits.square().sum().mul(1e-3).backward()
        gradients.append({key: value.grad.clone() for key, value in named_prefix_parameters(model).items()})
    for key, expected in gradients[1].items():
        assert_close(gradients[0][key], expected, atol=1e-3, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@lengths
def test_dropout_hides_the_same_virtual_tokens_from_all_sequences(name, lengths, flash):
    logits = []
    for implementation in ("eager", "sdpa", FLASH_STAND_IN):
        model = build(name, implementation, prefix_dropout=0.5).train()
        torch.manual_seed(3)
        logits.append(model(**flatten(draw_rows(lengths)), use_cache=False).logits)
    assert_close(logits[1], logits[0], **TOLERANCE[torch.float32])
    assert_close(logits[2], logits[0], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("has_offsets", [False, True], ids=["positions", "offsets"])
def test_flash_tells_packed_sequences_apart_while_it_fills_a_cache(has_offsets, flash):
    """The other implementations do not: transformers looks for packed sequences only where there is no cache."""
    model, rows = build("llama", FLASH_STAND_IN), draw_rows(LENGTHS["long"])
    logits = model(**flatten(rows, return_flash_attn_kwargs=has_offsets), use_cache=True).logits[0]
    for packed, row in zip(logits.split(LENGTHS["long"]), rows, strict=True):
        assert_close(packed, model(row[None]).logits[0], **TOLERANCE[torch.float32])
