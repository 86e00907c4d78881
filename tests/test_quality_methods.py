"""The methods of the quality benchmark start and learn as they should, and leave the base model as it was."""

import pytest
import torch
from helpers import draw_tokens
from quality_settings import INIT_TEXT, SETTINGS
from tiny_models import build_chat_tokenizer, build_model
from transformers import DataCollatorForSeq2Seq

from benchmarks.quality.initial_tokens import build_initial_tokens
from benchmarks.quality.methods import build_method, remove_method
from benchmarks.quality.segment_scores import score_records
from benchmarks.quality.tasks import GenerationTask
from peft_prefix_plus.demonstrations import choose_demonstrations
from peft_prefix_plus.examples import Example
from peft_prefix_plus.inference import compute_loss, generate_texts
from peft_prefix_plus.metrics import compute_text_metrics

every_method = pytest.mark.parametrize("name", SETTINGS)
EXAMPLES = [Example(f"a: {'x' * i}\n", (f"b{i}.", "It is c.")) for i in range(6)]


def apply_method(name, model, tokenizer):
    peft_type, settings = SETTINGS[name]
    torch.manual_seed(0)
    return build_method(peft_type, settings, model, tokenizer, INIT_TEXT, EXAMPLES)


def build_task(model, tokenizer, **generation):
    """A task around a given model, without files."""
    task = GenerationTask.__new__(GenerationTask)
    task.model, task.tokenizer, task._generation = model, tokenizer, generation
    task.collator = DataCollatorForSeq2Seq(tokenizer)
    task._evaluations, task._counts_exact = {"dev": EXAMPLES}, False
    return task


def take_steps(method, ids):
    """Train for two steps, far enough that everything has moved."""
    optimizer = torch.optim.SGD(method.trainable.values(), lr=0.5)
    method.model.train()
    for _ in range(2):
        optimizer.zero_grad()
        method.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    method.model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_method
def test_a_method_is_trained_and_leaves_nothing_behind(name, dtype):
    tokenizer = build_chat_tokenizer()
    model, ids = build_model("llama", vocab_size=len(tokenizer), dtype=dtype), draw_tokens()
    expected = model(ids).logits
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    method = apply_method(name, model, tokenizer)
    before = {key: parameter.detach().clone() for key, parameter in method.trainable.items()}
    assert method.count_parameters() == sum(parameter.numel() for parameter in before.values()) > 0
    assert method.measure_bytes() > 0
    take_steps(method, ids)
    assert not torch.equal(method.model(input_ids=ids).logits[:, -1], expected[:, -1])
    assert any(not torch.equal(parameter, before[key]) for key, parameter in method.trainable.items())
    base = remove_method(method)
    assert base is model and type(base).__name__ == "LlamaForCausalLM"
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.state_dict().items())
    assert {parameter.dtype for parameter in base.parameters()} == {dtype}
    assert torch.equal(base(ids).logits, expected)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("name", ["prefix", "cartridge text", "peft prefix text", "prompt text"])
def test_a_method_that_starts_from_a_text_is_that_text(name):
    tokenizer = build_chat_tokenizer()
    model, ids = build_model("llama", vocab_size=len(tokenizer)), draw_tokens()
    text = torch.tensor([tokenizer(INIT_TEXT, add_special_tokens=False)["input_ids"][:4]] * len(ids))
    with torch.no_grad():
        expected = model(torch.cat([text, ids], dim=1)).logits[:, 4:]
        method = apply_method(name, model, tokenizer)
        found = method.model.eval()(input_ids=ids).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@every_method
def test_kept_parameters_give_the_trained_model_again(name, tmp_path):
    tokenizer = build_chat_tokenizer()
    model, ids = build_model("llama", vocab_size=len(tokenizer)), draw_tokens()
    method = apply_method(name, model, tokenizer)
    take_steps(method, ids)
    expected = method.model(input_ids=ids).logits
    method.save_trainable(tmp_path / "kept.pt")
    method = apply_method(name, remove_method(method), tokenizer)
    method.load_trainable(tmp_path / "kept.pt")
    assert torch.equal(method.model.eval()(input_ids=ids).logits, expected)


@every_method
def test_batches_change_neither_losses_nor_texts(name, monkeypatch):
    tokenizer = build_chat_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight *= 5  # no near ties
    method = apply_method(name, model, tokenizer)
    task = build_task(model, tokenizer, batch_size=6, max_new_tokens=8)
    records, _ = task.evaluate(method.model, "dev")
    texts = task._generate(method.model, [example.prompt for example in EXAMPLES])
    assert texts == [task._generate(method.model, [example.prompt])[0] for example in EXAMPLES]
    monkeypatch.setattr("benchmarks.quality.tasks.BATCH_SIZE", 1)
    alone, _ = task.evaluate(method.model, "dev")
    assert alone["tokens"] == records["tokens"]
    assert alone["loss"] == pytest.approx(records["loss"], abs=2e-3)


@pytest.mark.parametrize("name", ["prefix", "cartridge text", "peft prefix text", "prompt text"])
def test_losses_of_a_start_from_a_text_are_those_of_prompts_with_the_text(name):
    tokenizer = build_chat_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight *= 5  # no near ties
    task = build_task(model, tokenizer, max_new_tokens=4)
    expected, texts = task.prompted(INIT_TEXT[:4]).evaluate(model, "dev")
    found, own_texts = task.evaluate(apply_method(name, model, tokenizer).model, "dev")
    assert own_texts == texts
    assert found["tokens"] == expected["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-3)


def test_losses_and_scores_are_those_of_the_package():
    tokenizer = build_chat_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer))
    task = build_task(model, tokenizer, max_new_tokens=8)
    records, samples = task.evaluate(model, "dev")
    texts = generate_texts(model, tokenizer, [example.prompt for example in EXAMPLES], max_new_tokens=8)
    expected = compute_text_metrics(texts, [example.references for example in EXAMPLES])
    expected["loss"] = compute_loss(model, tokenizer, EXAMPLES)
    assert score_records(records) == pytest.approx(expected, abs=1e-4)
    assert samples == texts[:3]
    task._counts_exact = True
    task._evaluations["dev"] = [Example(EXAMPLES[0].prompt, ("no", texts[0])), *EXAMPLES[1:]]
    assert score_records(task.evaluate(model, "dev")[0])["exact_match"] == pytest.approx(100 / 6)


def test_initial_tokens_are_the_same_examples_in_front_of_the_text():
    tokenizer = build_chat_tokenizer()
    base = build_model("llama", vocab_size=len(tokenizer)), tokenizer
    ids = build_initial_tokens({"text": "$init_text", "examples": 2}, *base, INIT_TEXT, EXAMPLES)
    text = tokenizer.decode(ids)
    shown = [example for example in EXAMPLES if f"{example.prompt}{example.references[0]}\n" in text]
    assert text.endswith(INIT_TEXT) and len(shown) == 2
    assert ids == build_initial_tokens({"text": INIT_TEXT, "examples": 2}, *base, "", EXAMPLES)
    chosen = build_initial_tokens({"text": INIT_TEXT, "examples": 2, "draws": 3}, *base, "", EXAMPLES)
    assert tokenizer.decode(chosen) == choose_demonstrations(*base, EXAMPLES, 2, INIT_TEXT, 3)
    with pytest.raises(ValueError, match="6 examples there are, got 7"):
        build_initial_tokens({"examples": 7}, *base, INIT_TEXT, EXAMPLES)
    with pytest.raises(ValueError, match="'draws', 'examples', 'text'"):
        build_initial_tokens({"texts": INIT_TEXT}, *base, INIT_TEXT)


def test_a_prefix_of_examples_trains_its_last_tokens_only():
    tokenizer = build_chat_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    config = {"projection": "none", "init": {"text": "$init_text", "examples": 2}, "num_trained_tokens": 5}
    method = build_method("PREFIX_PLUS", config, model, tokenizer, INIT_TEXT, EXAMPLES)
    flat = {"projection": "none", "num_virtual_tokens": 5, "init": {"text": "$init_text"}}
    settings = method.model.active_peft_config
    assert settings.num_virtual_tokens == len(settings.prefix_init_token_ids) == settings.num_frozen_tokens + 5
    count = method.count_parameters()
    assert count == build_method("PREFIX_PLUS", flat, remove_method(method), tokenizer, INIT_TEXT).count_parameters()


@pytest.mark.parametrize(("peft_type", "word"), [("LORA", "remove `init`"), ("NONE", "use one of"), ("HEAD", "only")])
def test_a_method_that_cannot_be_built_is_named(peft_type, word):
    tokenizer = build_chat_tokenizer()
    with pytest.raises(ValueError, match=word):
        build_method(peft_type, {"init": {"text": "a"}}, build_model("llama"), tokenizer)


@pytest.mark.parametrize("settings", [{"num_virtual_tokens": 4}, {}])
def test_a_prefix_cannot_train_more_tokens_than_it_has(settings):
    with pytest.raises(ValueError, match="`num_trained_tokens` is 5, of"):
        build_method("PREFIX_PLUS", {**settings, "num_trained_tokens": 5}, build_model("llama"), None)
