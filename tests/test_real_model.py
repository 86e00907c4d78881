"""SmolLM2-135M-Instruct out of its wheel: what holds for tiny random models holds for a pretrained one."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.base_models import WHEEL_MODEL, load_base_model, locate_tokenizer
from peft_prefix_plus.inference import generate_texts

INIT_TEXT = "Answer the question in one short sentence.\n"
PROMPTS = ["What is the capital of France?", "Name a colour.", "Why is the sky blue during the day?"]


@pytest.fixture(scope="module")
def loaded():
    return load_base_model(WHEEL_MODEL, dtype="float32")


@pytest.mark.slow
def test_init_text_equals_prompting_with_and_without_padding(loaded):
    model, tokenizer = loaded
    init = tokenizer(INIT_TEXT, add_special_tokens=False)["input_ids"]
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    alone = tokenizer(PROMPTS[:1], return_tensors="pt")
    with torch.no_grad():
        prompted = [
            model(torch.tensor([init + tokenizer(prompt)["input_ids"]])).logits[0, len(init) :] for prompt in PROMPTS
        ]
    expected_texts = generate_texts(model, tokenizer, [INIT_TEXT + prompt for prompt in PROMPTS], max_new_tokens=24)

    name, tokenizer_kwargs = locate_tokenizer(WHEEL_MODEL)
    config = PrefixPlusConfig(
        task_type="CAUSAL_LM",
        prefix_init_text=INIT_TEXT,
        tokenizer_name_or_path=name,
        tokenizer_kwargs=tokenizer_kwargs,
    )
    peft_model = get_peft_model(model, config).eval()
    assert peft_model.active_peft_config.num_virtual_tokens == len(init)
    with torch.no_grad():
        assert_close(peft_model(**alone).logits[0], prompted[0], atol=1e-3, rtol=0)
        logits = peft_model(**batch).logits
    for row, mask, expected in zip(logits, batch["attention_mask"], prompted, strict=True):
        assert_close(row[mask.bool()], expected, atol=1e-3, rtol=0)
    assert generate_texts(peft_model, tokenizer, PROMPTS, max_new_tokens=24) == expected_texts
    peft_model.unload()
