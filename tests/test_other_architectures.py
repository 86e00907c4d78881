"""Architectures beside those of the laws: encoders, encoders as decoders, and one that is refused."""

import pytest
import torch
from helpers import draw_tokens, named_prefix_parameters, pad_rows, perturb
from peft import PeftModel, get_peft_model
from tiny_models import MAX_POSITIONS, VOCAB_SIZE
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from peft_prefix_plus import PrefixPlusConfig

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
}
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def build_encoder_model(implementation: str = "sdpa", seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(**SIZES)
    model = BertForSequenceClassification(config).eval()
    model.set_attn_implementation(implementation)
    return model


def add_prefix(model: torch.nn.Module, **settings: object) -> PeftModel:
    config = PrefixPlusConfig(task_type="SEQ_CLS", prefix_init_token_ids=[4, 5, 6], **settings)
    return get_peft_model(model, config).eval()


@implementations
def test_disabled_equals_base(implementation):
    model, ids = build_encoder_model(implementation), draw_tokens()
    expected = model(ids).logits
    peft_model = add_prefix(model)
    assert not torch.allclose(peft_model(ids).logits, expected)
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(ids).logits, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_eager_equals_sdpa(dropout):
    ids, mask = pad_rows(draw_tokens(), [7, 4], "right")
    logits = []
    for implementation in ("eager", "sdpa"):
        model = add_prefix(build_encoder_model(implementation), prefix_dropout=dropout)
        perturb(model)
        for module in model.modules():
            module.training = type(module).__name__ == "PrefixDropout"
        for given in (None, mask):
            torch.manual_seed(3)
            logits.append(model(ids, attention_mask=given).logits)
    assert_close(logits[0], logits[2])
    assert_close(logits[1], logits[3])


@implementations
def test_right_padding_changes_nothing(implementation):
    model, rows = add_prefix(build_encoder_model(implementation)), draw_tokens()
    perturb(model)
    ids, mask = pad_rows(rows, [7, 4], "right")
    logits = model(ids, attention_mask=mask).logits
    assert_close(logits[1:], model(rows[1:, :4]).logits)


@implementations
def test_the_prefix_and_the_classifier_train_and_are_saved(implementation, tmp_path):
    model, ids = add_prefix(build_encoder_model(implementation)), draw_tokens()
    perturb(model)
    model(ids, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {name for name in trained if ".modules_to_save.default." in name}
    assert head
    assert trained == set(named_prefix_parameters(model)) | head
    assert all(bool(dict(model.named_parameters())[name].grad.abs().sum() > 0) for name in trained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_encoder_model(implementation), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_tokens_of_the_prefix_are_seen_from_every_position():
    model, ids = add_prefix(build_encoder_model()), draw_tokens()
    base = model.unload().bert(ids).last_hidden_state
    peft_model = add_prefix(build_encoder_model())
    changed = (peft_model.base_model.model.bert(ids).last_hidden_state - base).abs().amax(-1)
    assert bool((changed > 1e-3).all())


def test_an_encoder_as_a_decoder_starts_exactly_behind_its_reserved_positions():
    # The RoBERTa family counts positions from behind the row of the padding.
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, is_decoder=True)
    model, ids, init = RobertaForCausalLM(config).eval(), draw_tokens(), [4, 5, 6]
    expected = model(torch.cat([torch.tensor(init).expand(2, -1), ids], dim=1)).logits[:, 3:]
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=init)
    peft_model = get_peft_model(model, config).eval()
    assert_close(peft_model(ids).logits, expected, atol=2e-5, rtol=2e-4)
    fits = MAX_POSITIONS - config.num_virtual_tokens - (model.config.pad_token_id + 1)
    peft_model(draw_tokens(1, fits))
    with pytest.raises(ValueError, match=f"the input to at most {fits}"):
        peft_model(draw_tokens(1, fits + 1))


def test_a_module_that_attends_twice_is_refused():
    config = DiffLlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model, ids = DiffLlamaForCausalLM(config).eval(), draw_tokens()
    expected = model(ids).logits
    with pytest.raises(ValueError, match="more than once"):
        get_peft_model(model, PrefixPlusConfig(task_type="CAUSAL_LM"))
    assert torch.equal(model(ids).logits, expected)
