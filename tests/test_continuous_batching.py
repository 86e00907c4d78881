"""Continuous batching: the requests of a batch stand in one row and one cache, and each equals `generate` alone."""

from typing import Any

import pytest
import torch
from flash_stand_in import FLASH_STAND_IN, flash_fixture  # noqa: F401
from helpers import add_prefix, draw_tokens, perturb
from test_laws import TOLERANCE
from tiny_models import build_model
from torch.testing import assert_close
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

NEW_TOKENS = 8
REQUESTS = [draw_tokens(1, length, seed=length)[0].tolist() for length in (5, 13, 3, 11)]
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa", FLASH_STAND_IN])


def build(name: str, implementation: str):
    model = add_prefix(build_model(name))
    perturb(model)
    model.set_attn_implementation(implementation)
    return model


def generate_alone(model, requests: list[list[int]], **settings) -> list[list[int]]:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | settings
    ids = [torch.tensor([request]) for request in requests]
    return [model.generate(input_ids=row, **settings)[0, row.shape[1] :].tolist() for row in ids]


def generate_together(model, requests: list[list[int]], **settings: Any) -> list[Any]:
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Small pages, a small cache and few tokens per step: requests wait, are cut into chunks, and share pages.
    settings = {"page_size": 4, "num_blocks": 24, "max_batch_tokens": 12, "auto_switch_to_flash": False} | settings
    outputs = model.generate_batch(
        requests,
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(**settings),
        progress_bar=False,
    )
    assert len(outputs) == len(requests)
    ordered = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[-1]))
    assert [output.prompt_ids for output in ordered] == requests
    return ordered


def get_tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.generated_tokens for output in outputs]


@implementations
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_batched_requests_equal_each_alone(name, implementation, flash):
    model = build(name, "sdpa")
    expected = generate_alone(model, REQUESTS)
    with model.disable_adapter():
        assert generate_alone(model, REQUESTS) != expected
    model.set_attn_implementation(implementation)
    outputs = generate_together(model, REQUESTS, return_logprobs=True)
    assert get_tokens(outputs) == expected
    assert flash.varlen > 0 or implementation != FLASH_STAND_IN
    assert model.config._attn_implementation == implementation
    model.set_attn_implementation("sdpa")
    for output in outputs:
        tokens = torch.tensor([output.prompt_ids + output.generated_tokens])
        scores = model(tokens, use_cache=False).logits[0, len(output.prompt_ids) - 1 : -1].log_softmax(-1)
        expected_scores = scores.gather(-1, torch.tensor(output.generated_tokens)[:, None])[:, 0]
        assert_close(torch.tensor(output.logprobs), expected_scores, **TOLERANCE[torch.float32])


@implementations
def test_requests_that_share_pages_equal_each_alone(implementation, flash):
    model, start = build("llama", implementation), REQUESTS[1][:9]
    requests = [start + tail for tail in ([7], [8, 9], [7], [5, 6, 7, 8])]
    expected = generate_alone(model, requests)
    assert expected[0] == expected[2] != expected[1]
    for sharing in (True, False):
        assert get_tokens(generate_together(model, requests, allow_block_sharing=sharing)) == expected


@implementations
def test_pages_do_not_outlive_their_adapter(implementation, flash):
    model = build("llama", implementation)
    expected, tokens = generate_alone(model, REQUESTS), get_tokens(generate_together(model, REQUESTS))
    with model.disable_adapter():
        assert get_tokens(generate_together(model, REQUESTS)) == generate_alone(model, REQUESTS) != expected
    assert get_tokens(generate_together(model, REQUESTS)) == tokens == expected
