"""Linear position biases: those of a prefix continue those of the tokens."""

import pytest
import torch
from tiny_models import build_model
from torch.testing import assert_close
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from zoo_models import build_zoo_model

from peft_prefix_plus.architectures import AlibiSlopes, find_attention_modules, read_alibi_slopes

# Powers of two and others follow different rules; MPT knows those of at least two heads.
heads = pytest.mark.parametrize("num_heads", [2, 3, 4, 6, 8, 12])
P = 5


def read_slopes(model_type: str, **settings: object) -> AlibiSlopes | None:
    modules = find_attention_modules(build_zoo_model("causal", model_type, **settings)).values()
    return read_alibi_slopes(next(iter(modules)))


@heads
@pytest.mark.parametrize("batch_size", [1, 2])
def test_biases_of_bloom_grow_from_the_prefix_through_the_tokens(num_heads, batch_size):
    slopes = read_slopes("bloom", n_head=num_heads, hidden_size=8 * num_heads)
    bias = build_alibi_tensor(torch.ones(batch_size, 4), num_heads, torch.float32)
    whole = build_alibi_tensor(torch.ones(batch_size, P + 4), num_heads, torch.float32)
    joint = torch.cat([slopes.continue_bias(bias, P), bias], dim=-1)
    assert joint.shape == whole.shape == (batch_size * num_heads, 1, P + 4)
    # A number that all keys share is lost in the softmax.
    assert_close(joint - joint[..., :1], whole - whole[..., :1])
    assert slopes.mask_scale is None and not slopes.counts_from_end


@heads
def test_biases_of_mpt_grow_from_the_prefix_through_the_tokens(num_heads):
    slopes = read_slopes("mpt", n_heads=num_heads, d_model=8 * num_heads)
    bias = build_mpt_alibi_tensor(num_heads, 4)
    joint = torch.cat([slopes.continue_bias(bias, P), bias], dim=-1)
    assert_close(joint, build_mpt_alibi_tensor(num_heads, P + 4), msg="the last key has the bias 0 with and without")
    assert slopes.mask_scale is None and slopes.counts_from_end


def test_biases_of_falcon_are_those_of_bloom_in_the_mask():
    slopes = read_slopes("falcon", alibi=True)
    assert_close(slopes.slopes, read_slopes("bloom").slopes)
    assert slopes.mask_scale == 8**-0.5, "the model divides the scores, and with them the biases, by sqrt(head_dim)"


def test_other_modules_have_none():
    assert read_slopes("falcon", alibi=False) is None
    assert read_slopes("gptj") is None
    assert read_alibi_slopes(build_model("llama").model.layers[0].self_attn) is None


def test_biases_fall_with_the_distance():
    spread = AlibiSlopes(torch.tensor([0.5, 0.25])).spread(3, torch.device("cpu"), torch.float64)
    assert spread.dtype == torch.float64
    assert spread.tolist() == [[[-1.5, -1.0, -0.5]], [[-0.75, -0.5, -0.25]]]


def test_the_prefix_stands_right_before_the_first_token_of_every_row():
    slopes = AlibiSlopes(torch.tensor([0.5, 0.25]), counts_from_end=True)
    hidden = torch.tensor([[True, True, False, False], [False, False, False, True], [False, True, False, False]])
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    skipped = slopes.skip_padding(hidden[:, None, None, :] | causal, torch.float32)
    # Left padding counts, right padding and holes do not.
    assert skipped.shape == (3, 2, 1, 1)
    assert skipped.flatten(1).tolist() == [[1.0, 0.5], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_biases_have_the_dtype_of_the_scores(dtype):
    slopes = AlibiSlopes(torch.tensor([0.5, 0.25]))
    assert slopes.continue_bias(torch.zeros(2, 1, 4, dtype=dtype), P).dtype == dtype
    assert slopes.skip_padding(torch.zeros(1, 1, 4, 4, dtype=torch.bool), dtype).dtype == dtype
