"""Loss and generation do not depend on how examples are batched."""

import math

import pytest
import torch
from accelerate import cpu_offload
from helpers import add_prefix, perturb
from peft import PromptTuningConfig, get_peft_model
from tiny_models import build_chat_tokenizer, build_model
from transformers import GenerationConfig

from peft_prefix_plus.evaluation import evaluate_model
from peft_prefix_plus.examples import Example, tokenize_examples, tokenize_prompts
from peft_prefix_plus.inference import compute_loss, generate_texts, measure_losses

EXAMPLES = [Example("ab", ("cd", "efg")), Example("a longer prompt", ("x",)), Example("", ("plain text",))]


@pytest.fixture(scope="module")
def tokenizer():
    return build_chat_tokenizer()


@pytest.fixture(params=[False, True], ids=["base", "prefix"])
def model(request, tokenizer):
    model = build_model("llama", vocab_size=len(tokenizer))
    if request.param:
        model = add_prefix(model)
        perturb(model)
    return model


def test_the_loss_is_the_mean_over_all_completion_tokens(model, tokenizer):
    total, count = 0.0, 0
    for row in tokenize_examples(EXAMPLES, tokenizer):
        labels = torch.tensor([row["labels"]])
        tokens = int((labels != -100).sum())
        total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss) * tokens
        count += tokens
    for batch_size in (1, 2, 16):
        assert compute_loss(model, tokenizer, EXAMPLES, batch_size) == pytest.approx(total / count, rel=1e-5)


def test_losses_are_those_of_each_example_alone_in_the_order_of_the_examples(model, tokenizer):
    losses = measure_losses(model, tokenizer, EXAMPLES, batch_size=2)
    assert [loss.total / loss.num_tokens for loss in losses] == pytest.approx(
        [compute_loss(model, tokenizer, [example]) for example in EXAMPLES], rel=1e-5
    )
    tokens = [len(reference) + 1 for example in EXAMPLES for reference in example.references]
    assert [loss.num_tokens for loss in losses] == [tokens[0] + tokens[1], *tokens[2:]]


def test_logits_of_virtual_tokens_in_the_input_do_not_count(tokenizer):
    model = build_model("llama", vocab_size=len(tokenizer))
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    (row,) = tokenize_examples(EXAMPLES[2:], tokenizer)
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    expected = float(prompted(input_ids=ids, labels=labels).loss)
    assert compute_loss(prompted, tokenizer, EXAMPLES[2:]) == pytest.approx(expected, rel=1e-5)


def test_generated_texts_keep_the_order_and_do_not_depend_on_the_batch(model, tokenizer):
    prompts = ["a longer prompt", "ab", "", "mid-size"]
    alone = [generate_texts(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert generate_texts(model, tokenizer, prompts, batch_size=3, max_new_tokens=8) == alone


def test_the_caller_decides_how_long_texts_become(model, tokenizer):
    texts = generate_texts(model, tokenizer, ["ab"], max_new_tokens=3)
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert generate_texts(model, tokenizer, ["ab"], generation_config=config) == texts
    length = len(tokenize_prompts(["ab"], tokenizer)[0]) + 3
    assert generate_texts(model, tokenizer, ["ab"], max_length=length) == texts


def test_arguments_of_generation_reach_it(model, tokenizer):
    whole = generate_texts(model, tokenizer, ["ab"], max_new_tokens=6, pad_token_id=0)[0]
    stopped = generate_texts(model, tokenizer, ["ab"], max_new_tokens=6, stop_strings=[whole[1]])[0]
    assert stopped == whole[: whole.index(whole[1]) + 1]
    with pytest.raises(ValueError, match="one text for each prompt"):
        generate_texts(model, tokenizer, ["ab"], do_sample=True, num_return_sequences=2)


@pytest.mark.parametrize("function", [compute_loss, generate_texts])
def test_a_batch_size_without_examples_is_refused(model, tokenizer, function):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got -1"):
        function(model, tokenizer, EXAMPLES, batch_size=-1)


def test_one_text_is_no_list_of_prompts(model, tokenizer):
    with pytest.raises(ValueError, match="must be a list of texts, got 'ab'"):
        generate_texts(model, tokenizer, "ab")


def test_an_offloaded_model_is_evaluated(model, tokenizer):
    losses = measure_losses(model, tokenizer, EXAMPLES)
    texts = generate_texts(model, tokenizer, ["ab"], max_new_tokens=3)
    cpu_offload(model, torch.device("cpu"))
    assert measure_losses(model, tokenizer, EXAMPLES) == losses
    assert generate_texts(model, tokenizer, ["ab"], max_new_tokens=3) == texts


def test_evaluation_leaves_the_mode_alone_and_reports_every_score(model, tokenizer):
    model.train()
    frozen = next(model.children()).eval()
    scores, texts = evaluate_model(model, tokenizer, EXAMPLES, max_new_tokens=4)
    assert model.training and not any(module.training for module in frozen.modules())
    assert len(texts) == len(EXAMPLES)
    assert list(scores) == ["loss", "perplexity", "bleu", "chrf", "rouge_l"]
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
