"""Modules whose indexer selects which tokens a query sees: the selection holds beside a prefix."""

import pytest
import torch
from helpers import add_prefix, draw_tokens, pad_rows
from torch import Tensor
from transformers import PreTrainedModel
from zoo_models import build_zoo_model

from peft_prefix_plus.architectures import find_attention_modules
from peft_prefix_plus.attention import record_states
from peft_prefix_plus.attention.routing import MaskContract
from peft_prefix_plus.attention.selection import hide_unselected

NUM_SELECTED, NUM_TOKENS = 3, 24
SIZES = ("index_topk", "topk_tokens", "topk_blocks", "local_blocks", "block_size")
TYPES = ["deepseek_v32", "glm_moe_dsa", "dots3_note_text", "axk2", "minimax_m3_vl_text"]
types = pytest.mark.parametrize("name", TYPES)


def build(name: str, implementation: str = "eager") -> PreTrainedModel:
    """A model that selects fewer tokens than its input has."""
    model = build_zoo_model("causal", name, implementation)
    for module in model.modules():
        for size in SIZES:
            if isinstance(getattr(module, size, None), int):
                setattr(module, size, min(NUM_SELECTED, getattr(module, size)))
    return model


def attend(model: torch.nn.Module, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [weights for weights in model(ids, output_attentions=True).attentions if weights is not None]


@types
def test_the_input_is_longer_than_what_is_selected(name):
    """Otherwise the other tests would say nothing."""
    hidden = [weights[..., -1, :] == 0 for weights in attend(build(name), draw_tokens(1, NUM_TOKENS))]
    assert any(bool(own.any()) for own in hidden)


@pytest.mark.parametrize(
    ("name", "implementation"),
    # HY V4 has sinks, which sdpa does not know.
    [*((name, implementation) for name in TYPES for implementation in ("eager", "sdpa")), ("hy_v4", "eager")],
)
def test_the_route_alone_changes_nothing(name, implementation):
    model, ids = build(name, implementation), draw_tokens(2, NUM_TOKENS)
    with torch.no_grad():
        expected = model(ids).logits
        with record_states(find_attention_modules(model).values()):
            assert torch.equal(model(ids).logits, expected)


@types
def test_every_query_sees_the_prefix_and_the_same_tokens_in_the_same_proportion(name):
    """In the first layer, whose input does not depend on the prefix."""
    ids = draw_tokens(2, NUM_TOKENS)
    expected = attend(build(name), ids)[0]
    model = add_prefix(build(name)).eval()
    prefix, tokens = attend(model, ids)[0].split([5, NUM_TOKENS], dim=-1)
    assert bool((prefix > 0).all())
    torch.testing.assert_close(tokens / tokens.sum(dim=-1, keepdim=True), expected, atol=1e-5, rtol=1e-5)


@types
def test_a_padded_row_without_a_prefix_equals_the_base_model(name):
    """Beside a row with one, where all tokens are selected: MiniMax M3 lets padding take part in the selection."""
    base = build_zoo_model("causal", name, "eager")
    ids, mask = pad_rows(draw_tokens(2, 9), [6, 6], "left")
    with torch.no_grad():
        expected = base(ids, attention_mask=mask).logits[1, 3:]
        logits = add_prefix(base)(ids, attention_mask=mask, adapter_names=["default", "__base__"]).logits[1, 3:]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@types
def test_sdpa_equals_eager(name):
    ids = draw_tokens(2, NUM_TOKENS)
    with torch.no_grad():
        logits = [add_prefix(build(name, own)).eval()(ids).logits for own in ("eager", "sdpa")]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("contract", [MaskContract.FLEX, MaskContract.FLASH])
@pytest.mark.parametrize("name", ["indices", "block_indices"])
def test_implementations_without_such_masks_are_refused(contract, name):
    with pytest.raises(ValueError, match="selects the tokens that a query sees"):
        hide_unselected(torch.nn.Identity(), torch.ones(1, 1, 4, 2), None, contract, {name: torch.zeros(1, 4, 2)})
