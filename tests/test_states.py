"""Laws of concatenating prefixes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_prefix_plus.states import PrefixStates, concatenate_states

HEADS, KEY_DIM, VALUE_DIM = 2, 3, 4


def build_states(batch: int, length: int, seed: int, masked: bool = False, mask_batch: int | None = None):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, HEADS, length, KEY_DIM, generator=generator)
    values = torch.randn(batch, HEADS, length, VALUE_DIM, generator=generator)
    mask = torch.rand(mask_batch or batch, length, generator=generator) < 0.5 if masked else None
    return PrefixStates(keys, values, mask)


def assert_same(one: PrefixStates, other: PrefixStates) -> None:
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)
    if one.mask is None or other.mask is None:
        assert one.mask is other.mask
    else:
        assert torch.equal(one.mask, other.mask)


def row(tensor: Tensor, i: int) -> Tensor:
    return tensor[i if tensor.shape[0] > 1 else 0]


parts = st.lists(
    st.tuples(st.sampled_from([1, 3]), st.integers(1, 4), st.booleans(), st.sampled_from([1, 3])),
    min_size=1,
    max_size=4,
)


@given(parts)
def test_every_row_is_the_concatenation_of_its_parts(shapes):
    states = [
        build_states(batch, length, seed, masked, mask_batch)
        for seed, (batch, length, masked, mask_batch) in enumerate(shapes)
    ]
    whole = concatenate_states(states)
    assert whole.num_virtual_tokens == sum(state.num_virtual_tokens for state in states)
    for i in range(whole.keys.shape[0]):
        assert torch.equal(whole.keys[i], torch.cat([row(state.keys, i) for state in states], dim=1))
        assert torch.equal(whole.values[i], torch.cat([row(state.values, i) for state in states], dim=1))
    if all(state.mask is None for state in states):
        assert whole.mask is None
        return
    visible = [
        torch.ones(1, state.num_virtual_tokens).bool() if state.mask is None else state.mask for state in states
    ]
    assert whole.mask.dtype == torch.bool
    for i in range(whole.mask.shape[0]):
        assert torch.equal(whole.mask[i], torch.cat([row(mask, i) for mask in visible]))


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_concatenation_is_associative(masked):
    a, b, c = (build_states(2, length, length, hide) for length, hide in zip((1, 3, 2), masked, strict=True))
    left = concatenate_states([concatenate_states([a, b]), c])
    right = concatenate_states([a, concatenate_states([b, c])])
    # `[1, P]` and `[2, P]` masks that say the same are equal for every reader.
    flat = concatenate_states([a, b, c])
    for states in (left, right):
        assert torch.equal(states.keys, flat.keys) and torch.equal(states.values, flat.values)
        if flat.mask is not None:
            assert torch.equal(*torch.broadcast_tensors(states.mask, flat.mask))


def test_one_prefix_stays_itself():
    states = build_states(2, 3, 0, masked=True)
    assert_same(concatenate_states([states]), states)


def test_an_unmasked_prefix_counts_as_visible():
    hidden = build_states(1, 2, 0)._replace(mask=torch.zeros(1, 2, dtype=torch.bool))
    whole = concatenate_states([build_states(1, 3, 1), hidden])
    assert whole.mask.tolist() == [[True, True, True, False, False]]


def test_gradients_reach_every_part():
    states = [build_states(1, length, length) for length in (2, 3)]
    for state in states:
        state.keys.requires_grad_()
        state.values.requires_grad_()
    whole = concatenate_states([states[0], states[1]._replace(mask=torch.ones(4, 3, dtype=torch.bool))])
    (whole.keys.sum() + 2 * whole.values.sum()).backward()
    for state in states:
        assert torch.equal(state.keys.grad, torch.ones_like(state.keys))
        assert torch.equal(state.values.grad, torch.full_like(state.values, 2))
