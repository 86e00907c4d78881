"""Prefix dropout: what is drawn, how often, and when nothing is."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_prefix_plus.dropout import PrefixDropout, draw_visible_tokens
from peft_prefix_plus.states import PrefixStates

modes = pytest.mark.parametrize("mode", ["token", "element"])


def build_states(num_tokens: int = 5, mask: torch.Tensor | None = None) -> PrefixStates:
    return PrefixStates(torch.ones(1, 2, num_tokens, 3), torch.ones(1, 2, num_tokens, 4), mask)


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.0, 1.0, exclude_max=True), st.integers(0, 1000))
def test_a_token_is_always_left(batch_size, num_tokens, probability, seed):
    torch.manual_seed(seed)
    visible = draw_visible_tokens(batch_size, num_tokens, probability, torch.device("cpu"))
    assert visible.dtype == torch.bool and visible.shape == (batch_size, num_tokens)
    assert visible.any(dim=-1).all()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("num_tokens", [1, 2, 10])
def test_tokens_are_hidden_with_the_given_probability(probability, num_tokens):
    visible = draw_visible_tokens(20_000, num_tokens, probability, torch.device("cpu"))
    # Where all would be hidden (probability p ** P), one of the P stays.
    expected = probability - probability**num_tokens / num_tokens
    hidden = 1 - visible.float().mean(dim=0)
    assert_close(hidden, torch.full((num_tokens,), expected), atol=0.02, rtol=0)


def test_a_growing_probability_only_hides_more():
    drawn = []
    for probability in (0.0, 0.3, 0.6, 0.99):
        torch.manual_seed(3)
        drawn.append(draw_visible_tokens(50, 8, probability, torch.device("cpu")))
    assert drawn[0].all()
    for more, less in pairwise(drawn):
        assert not (less & ~more).any()


def test_token_mode_masks_and_leaves_the_states_alone():
    states = build_states()
    dropped = PrefixDropout(0.5, "token").train()(states, batch_size=8)
    assert dropped.keys is states.keys and dropped.values is states.values
    assert dropped.mask.shape == (8, 5)
    assert len({tuple(row) for row in dropped.mask.tolist()}) > 1, "every sample draws for itself"


def test_token_mode_keeps_what_was_hidden_before():
    before = torch.tensor([[True, False, True, True, False]])
    dropped = PrefixDropout(0.2, "token").train()(build_states(mask=before), batch_size=64)
    assert not (dropped.mask & ~before).any()


def test_element_mode_drops_and_rescales():
    states = build_states(num_tokens=50)
    dropped = PrefixDropout(0.25, "element").train()(states, batch_size=64)
    assert dropped.mask is None
    assert dropped.keys.shape == (64, 2, 50, 3) and dropped.values.shape == (64, 2, 50, 4)
    for tensor in (dropped.keys, dropped.values):
        assert_close(tensor[tensor != 0], torch.full_like(tensor[tensor != 0], 1 / 0.75))
        assert abs((tensor == 0).float().mean().item() - 0.25) < 0.02
    assert not torch.equal(dropped.keys[0], dropped.keys[1]), "every sample draws for itself"


@modes
def test_evaluation_is_the_identity(mode):
    states = build_states()
    assert PrefixDropout(0.9, mode).eval()(states, batch_size=4) is states


@modes
def test_probability_zero_is_the_identity(mode):
    states = build_states()
    assert PrefixDropout(0.0, mode).train()(states, batch_size=4) is states


@modes
def test_evaluation_and_probability_zero_draw_nothing(mode):
    state = torch.get_rng_state()
    PrefixDropout(0.9, mode).eval()(build_states(), batch_size=4)
    PrefixDropout(0.0, mode).train()(build_states(), batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)


@modes
def test_the_seed_decides(mode):
    dropout, drawn = PrefixDropout(0.5, mode).train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        dropped = dropout(build_states(num_tokens=20), batch_size=4)
        drawn.append(dropped.mask if mode == "token" else dropped.keys)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
