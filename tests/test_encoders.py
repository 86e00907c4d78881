"""The parameterisations of a prefix: where they start, what is trained, and what is not."""

import copy

import pytest
import torch
from torch.testing import assert_close

from peft_prefix_plus.architectures import AttentionGeometry
from peft_prefix_plus.encoders import (
    PROJECTIONS,
    DirectPrefix,
    LinearPrefix,
    PrefixEncoder,
    build_encoder,
    fold_encoder,
)
from peft_prefix_plus.states import PrefixStates

HEADS, KEY_DIM, VALUE_DIM, TOKENS, WIDTH = 2, 6, 4, 5, 3
GEOMETRY = AttentionGeometry(HEADS, KEY_DIM, VALUE_DIM, torch.device("cpu"))
projections = pytest.mark.parametrize("projection", PROJECTIONS)


def draw_anchor(num_tokens: int = TOKENS) -> PrefixStates:
    return PrefixStates(torch.randn(1, HEADS, num_tokens, KEY_DIM), torch.randn(1, HEADS, num_tokens, VALUE_DIM))


def draw_scale() -> PrefixStates:
    return PrefixStates(1 + torch.rand(1, HEADS, 1, 1), 1 + torch.rand(1, HEADS, 1, 1))


def build_initialized(projection: str, num_frozen_tokens: int = 0) -> tuple[PrefixEncoder, PrefixStates, PrefixStates]:
    encoder = build_encoder(projection, GEOMETRY, TOKENS, num_frozen_tokens, WIDTH)
    anchor, scale = draw_anchor(), draw_scale()
    encoder.initialize(anchor, scale)
    return encoder, anchor, scale


@torch.no_grad()
def perturb(encoder: PrefixEncoder) -> None:
    for parameter in encoder.parameters():
        parameter += torch.randn(parameter.shape)


@projections
@pytest.mark.parametrize("num_frozen_tokens", [0, 2])
def test_step_0_is_the_anchor_bit_for_bit(projection, num_frozen_tokens):
    encoder, anchor, _ = build_initialized(projection, num_frozen_tokens)
    states = encoder()
    assert torch.equal(states.keys, anchor.keys)
    assert torch.equal(states.values, anchor.values)
    assert states.mask is None and states.num_virtual_tokens == TOKENS


@projections
def test_states_are_the_anchor_plus_the_scaled_delta(projection):
    encoder, anchor, scale = build_initialized(projection, num_frozen_tokens=1)
    perturb(encoder)
    delta_keys, delta_values = encoder.compute_delta()
    assert delta_keys.shape == (HEADS, TOKENS - 1, KEY_DIM)
    assert delta_values.shape == (HEADS, TOKENS - 1, VALUE_DIM)
    states = encoder()
    assert_close(states.keys[0, :, 1:], anchor.keys[0, :, 1:] + scale.keys[0] * delta_keys)
    assert_close(states.values[0, :, 1:], anchor.values[0, :, 1:] + scale.values[0] * delta_values)


@projections
def test_frozen_tokens_never_move_and_give_no_gradient(projection):
    encoder, anchor, _ = build_initialized(projection, num_frozen_tokens=2)
    perturb(encoder)
    states = encoder()
    assert torch.equal(states.keys[..., :2, :], anchor.keys[..., :2, :])
    assert torch.equal(states.values[..., :2, :], anchor.values[..., :2, :])
    assert not torch.isclose(states.keys[..., 2:, :], anchor.keys[..., 2:, :]).any()
    (states.keys[..., :2, :].sum() + states.values[..., :2, :].sum()).backward()
    assert all(not parameter.grad.any() for parameter in encoder.parameters())


@projections
def test_training_moves_the_prefix_and_keeps_the_buffers(projection):
    encoder, anchor, _ = build_initialized(projection, num_frozen_tokens=1)
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    target = draw_anchor()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        states = encoder()
        loss = (states.keys - target.keys).square().mean() + (states.values - target.values).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(encoder().keys[..., :1, :], anchor.keys[..., :1, :])
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("embedding_step", [1.0, 2.0, 4.0])
def test_the_step_of_embeddings_changes_how_far_they_move_and_not_where_they_start(embedding_step):
    torch.manual_seed(0)
    encoder = LinearPrefix(GEOMETRY, TOKENS, projection_dim=WIDTH, embedding_step=embedding_step)
    encoder.initialize(draw_anchor(), draw_scale())
    torch.manual_seed(0)
    start = torch.randn(TOKENS, WIDTH)
    assert torch.equal(encoder.compute_features(), start)
    torch.nn.init.ones_(encoder.output_weight)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    encoder().keys.sum().backward()
    optimizer.step()
    assert_close(start - encoder.compute_features(), torch.full((TOKENS, WIDTH), 1e-3 * embedding_step))
    assert_close(
        1 - encoder.output_weight.view(HEADS, -1, WIDTH)[:, :KEY_DIM].abs(),
        1e-3 * start.sum(0).sign().expand(HEADS, KEY_DIM, WIDTH),
    )


@projections
def test_weight_decay_alone_pulls_to_the_anchor(projection):
    encoder, anchor, _ = build_initialized(projection)
    perturb(encoder)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(150):
        for parameter in encoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert_close(encoder().keys, anchor.keys, atol=1e-4, rtol=0)
    assert_close(encoder().values, anchor.values, atol=1e-4, rtol=0)


def count_parameters(projection: str, num_frozen_tokens: int) -> int:
    encoder = build_encoder(projection, GEOMETRY, TOKENS, num_frozen_tokens, WIDTH)
    return sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.parametrize("num_frozen_tokens", [0, 2])
def test_parameter_counts(num_frozen_tokens):
    trained, out_features = TOKENS - num_frozen_tokens, HEADS * (KEY_DIM + VALUE_DIM)
    linear = trained * WIDTH + out_features * (WIDTH + 1)
    assert count_parameters("none", num_frozen_tokens) == trained * out_features
    assert count_parameters("linear", num_frozen_tokens) == linear
    assert count_parameters("mlp", num_frozen_tokens) == linear + WIDTH * (WIDTH + 1)


def test_direct_prefix_of_square_heads_has_2_kv_p_d_parameters():
    geometry = AttentionGeometry(3, 8, 8, torch.device("cpu"))
    assert sum(p.numel() for p in build_encoder("none", geometry, 7).parameters()) == 2 * 3 * 7 * 8


@projections
def test_forward_before_initialization_raises(projection):
    encoder = build_encoder(projection, GEOMETRY, TOKENS)
    with pytest.raises(RuntimeError, match=r"no values yet.*from_pretrained.*prefix_is_initialized=False"):
        encoder()
    frozen = (buffer for name, buffer in encoder.named_buffers() if name != "embedding_step")
    assert all(buffer.isnan().all() for buffer in frozen)


@projections
def test_state_dict_initializes_another_encoder(projection):
    encoder, _, _ = build_initialized(projection, num_frozen_tokens=1)
    perturb(encoder)
    other = build_encoder(projection, GEOMETRY, TOKENS, 1, WIDTH)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other().keys, encoder().keys) and torch.equal(other().values, encoder().values)


@projections
def test_longer_anchors_are_cut_to_the_prefix(projection):
    anchor = draw_anchor(TOKENS + 3)
    encoder = build_encoder(projection, GEOMETRY, TOKENS)
    encoder.initialize(anchor, draw_scale())
    assert torch.equal(encoder().keys, anchor.keys[..., :TOKENS, :])


@projections
def test_all_parameters_get_gradients_after_one_step(projection):
    encoder, _, _ = build_initialized(projection)
    perturb(encoder)
    states = encoder()
    (states.keys.square().sum() + states.values.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@projections
def test_folding_keeps_the_states_bit_for_bit_and_the_encoder(projection):
    encoder, _, _ = build_initialized(projection, num_frozen_tokens=2)
    perturb(encoder)
    before = copy.deepcopy(encoder.state_dict())
    folded = fold_encoder(encoder)
    assert type(folded) is DirectPrefix
    assert folded.num_virtual_tokens == TOKENS and folded.num_trained_tokens == TOKENS - 2
    assert torch.equal(folded().keys, encoder().keys) and torch.equal(folded().values, encoder().values)
    assert torch.equal(folded.scale_keys, encoder.scale_keys) and torch.equal(
        folded.scale_values, encoder.scale_values
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_folding_keeps_trainability_and_mode(trainable, training):
    encoder, _, _ = build_initialized("mlp")
    encoder.requires_grad_(trainable).train(training)
    folded = fold_encoder(encoder)
    assert folded.training is training
    assert all(parameter.requires_grad is trainable for parameter in folded.parameters())


def test_folding_an_uninitialized_encoder_raises():
    with pytest.raises(RuntimeError, match="no values yet"):
        fold_encoder(build_encoder("mlp", GEOMETRY, TOKENS))
