"""Prefixes on `flex_attention`, which has no backward pass on a CPU and compiles slowly: most tests run it eagerly."""

import gc

import pytest
import torch
import torch.nn.attention.flex_attention as flex_functions
from helpers import add_prefix, compute_logits_under_dropout, draw_tokens, named_prefix_parameters, pad_rows, perturb
from test_laws import TOLERANCE, greedy
from tiny_models import ARCHITECTURES, build_model
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.integrations.flex_attention import flex_attention_forward

from peft_prefix_plus import PrefixStates
from peft_prefix_plus.attention import flex as flex_module
from peft_prefix_plus.attention.flex import attend_flex

LENGTH = 24  # more than the sliding windows of 16
# transformers has no flex attention for GPT-2.
architectures = pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])


@pytest.fixture
def uncompiled():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def build_pair(name: str, **settings):
    """The same model with a prefix, on sdpa and on flex."""
    pair = []
    for implementation in ("sdpa", "flex_attention"):
        model = add_prefix(build_model(name), **settings)
        perturb(model)
        model.set_attn_implementation(implementation)
        pair.append(model)
    return pair


@torch.no_grad()
def compare(name: str, ids: Tensor, mask: Tensor) -> None:
    sdpa, flex = build_pair(name)
    assert_close(
        flex(ids, attention_mask=mask).logits[mask.bool()],
        sdpa(ids, attention_mask=mask).logits[mask.bool()],
        **TOLERANCE[torch.float32],
    )


@architectures
@pytest.mark.parametrize("length", [7, LENGTH], ids=["short", "long"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.usefixtures("uncompiled")
def test_flex_equals_sdpa(name, length, side):
    rows = draw_tokens(batch_size=3, length=length)
    compare(name, *(pad_rows(rows, [length, length - 3, 4], side) if side else (rows, torch.ones_like(rows))))


@pytest.mark.slow
def test_compiled_flex_equals_sdpa():
    compare("gemma3_text", *pad_rows(draw_tokens(3, LENGTH), [LENGTH, 19, 4], "left"))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
@pytest.mark.usefixtures("uncompiled")
def test_generation_equals_that_of_sdpa(name):
    ids, mask = pad_rows(draw_tokens(3), [7, 4, 7], "left")
    sdpa, flex = build_pair(name)
    expected = greedy(sdpa, ids, mask, max_new_tokens=12)
    assert torch.equal(greedy(flex, ids, mask, max_new_tokens=12), expected)


@pytest.mark.usefixtures("uncompiled")
def test_packed_sequences_equal_each_alone():
    _, model = build_pair("mistral")
    lengths = [20, 3, 18]
    rows = [draw_tokens(1, length, seed=i) for i, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        logits = model(torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits[0].split(lengths)
        for packed, row in zip(logits, rows, strict=True):
            assert_close(packed, model(row).logits[0], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", ["token", "element"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.usefixtures("uncompiled")
@torch.no_grad()
def test_dropout_is_honoured(mode, side):
    rows = draw_tokens(batch_size=3, length=LENGTH)
    ids, mask = pad_rows(rows, [LENGTH, 19, 4], side) if side else (rows, torch.ones_like(rows))
    logits = [
        compute_logits_under_dropout(model, ids, mask)
        for model in build_pair("mistral", prefix_dropout=0.5, prefix_dropout_mode=mode)
    ]
    assert_close(logits[1], logits[0], **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("uncompiled")
def test_there_is_no_backward_pass_on_a_cpu():
    _, model = build_pair("llama")
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        model(draw_tokens())


@pytest.mark.usefixtures("uncompiled")
def test_gradients_equal_those_of_sdpa(monkeypatch):
    """Through the reference implementation, which torch does not offer on a CPU."""
    monkeypatch.setattr(flex_functions, "_validate_device", lambda *args: None)
    ids, mask = pad_rows(draw_tokens(3, LENGTH), [LENGTH, 19, 4], "left")
    gradients = []
    for model in build_pair("mistral"):
        model(ids, attention_mask=mask).logits[mask.bool()].square().mean().backward()
        gradients.append({key: value.grad for key, value in named_prefix_parameters(model).items()})
    for key, expected in gradients[0].items():
        assert_close(gradients[1][key], expected, atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.usefixtures("uncompiled")
@torch.no_grad()
def test_the_layers_of_a_forward_share_one_mask(monkeypatch):
    built = []

    def count(*args, **kwargs):
        built.append(kwargs["KV_LEN"])
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(flex_module, "create_block_mask", count)
    _, model = build_pair("gemma3_text")
    for length in (7, 9):
        model(draw_tokens(length=length))
    assert built == [12, 12, 14, 14]  # one for the layers with a window, one for those without
    gc.collect()
    assert not flex_module._extended


class BareAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig()


def draw_problem(length: int = 3) -> tuple[Tensor, Tensor, Tensor, PrefixStates]:
    query, key, value = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 6, 16), torch.randn(2, 2, 6, 16)
    return query, key, value, PrefixStates(torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16))


def attend_by_hand(query: Tensor, key: Tensor, value: Tensor, prefix: PrefixStates, scores: Tensor) -> Tensor:
    """`scores` are added, `[batch or 1, heads or 1, queries, tokens]`; the prefix has its own mask and bias."""
    keys, values = (torch.cat(pair, 2) for pair in ((prefix.keys, key), (prefix.values, value)))
    columns = torch.zeros(2, 4, 5, prefix.num_virtual_tokens)
    if prefix.bias is not None:
        columns = columns + prefix.bias
    if prefix.mask is not None:
        columns = columns.masked_fill(~prefix.mask[:, None, None], -torch.inf)
    added = torch.cat([columns, scores.expand(2, 4, 5, 6)], dim=-1)
    keys, values = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    weights = (query @ keys.transpose(-1, -2) * 16**-0.5 + added).softmax(-1)
    return (weights @ values).transpose(1, 2)


@pytest.mark.parametrize("form", ["none", "block", "additive", "broadcast"])
@pytest.mark.parametrize("has_position_bias", [False, True], ids=["", "position-bias"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "prefix-bias"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "prefix-mask"])
@pytest.mark.usefixtures("uncompiled")
@torch.no_grad()
def test_attention_by_hand(form, has_position_bias, has_bias, masked):
    query, key, value, prefix = draw_problem()
    if masked:
        prefix = prefix._replace(mask=torch.tensor([[True, False, True], [False, False, True]]))
    if has_bias:
        prefix = prefix._replace(bias=torch.randn(1, 4, 1, 3))
    visible = torch.rand(2, 1, 5, 6) < 0.6
    scores, mask = torch.zeros(1, 1, 5, 6), None
    if form == "block":
        scores = torch.where(visible, 0.0, -torch.inf)
        mask = create_block_mask(lambda b, h, q, k: visible[b, 0, q, k], B=2, H=None, Q_LEN=5, KV_LEN=6, device="cpu")
    elif form != "none":
        scores = mask = torch.where(visible, torch.randn(visible.shape), torch.finfo(torch.float32).min)
    if form == "broadcast":
        scores = mask = mask[:1, :, :1]
    kwargs = {}
    if has_position_bias:
        kwargs["position_bias"] = torch.randn(1, 4, 5, 6)
        scores = scores + kwargs["position_bias"]
    output, _ = attend_flex(flex_attention_forward, BareAttention(), query, key, value, mask, prefix, **kwargs)
    assert_close(output, attend_by_hand(query, key, value, prefix, scores), **TOLERANCE[torch.float32])
