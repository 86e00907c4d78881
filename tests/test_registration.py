"""What PEFT and transformers know after the import, and that registering again changes nothing."""

import pytest
import torch
from helpers import add_prefix, draw_tokens
from peft import LoraConfig, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from tiny_models import build_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusModel
from peft_prefix_plus.attention import ROUTE_NAME, prefix_attention_forward, refuse_mask
from peft_prefix_plus.peft_type import PREFIX_PLUS
from peft_prefix_plus.registration import register

MAPPINGS = (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)


def test_peft_knows_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PREFIX_PLUS] is PrefixPlusConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PREFIX_PLUS] is PrefixPlusModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PREFIX_PLUS] == PrefixPlusModel.prefix == "prefix_plus_"


def test_the_plain_string_finds_the_same():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["PREFIX_PLUS"] is PrefixPlusConfig


def test_transformers_knows_the_attention_and_refuses_its_mask():
    assert ALL_ATTENTION_FUNCTIONS[ROUTE_NAME] is prefix_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS[ROUTE_NAME] is refuse_mask
    assert AttentionInterface()[ROUTE_NAME] is prefix_attention_forward
    assert AttentionMaskInterface()[ROUTE_NAME] is refuse_mask


def test_a_model_of_transformers_that_names_the_route_gets_no_silent_mask():
    model = build_model("llama")
    model.set_attn_implementation(ROUTE_NAME)
    with pytest.raises(RuntimeError, match="is not an attention implementation for models"):
        model(draw_tokens())


def test_registering_again_changes_nothing():
    before = [dict(mapping) for mapping in MAPPINGS]
    register()
    register()
    assert [dict(mapping) for mapping in MAPPINGS] == before
    assert ALL_ATTENTION_FUNCTIONS[ROUTE_NAME] is prefix_attention_forward


def test_models_from_before_and_after_registering_again_work():
    ids = draw_tokens()
    model = add_prefix(build_model("llama"))
    expected = model(ids).logits
    register()
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(add_prefix(build_model("llama"))(ids).logits, expected)


def test_other_methods_of_peft_still_work():
    base, ids = build_model("llama"), draw_tokens()
    expected = base(ids).logits
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(model(ids).logits, expected)
