"""transformers' own adapter methods, auto classes and pipelines."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from .behaviour import behaviour
from .methods import Method
from .subjects import (
    assert_close,
    assert_decreases,
    assert_differ,
    assert_same_tokens,
    build_adapted,
    build_causal_lm,
    build_classifier,
    build_tokenizer,
    compute_logits,
    continue_greedily,
    draw_tokens,
    perturb,
    save_base_model,
    take_steps,
)

GROUP = "transformers' own adapter methods"
PIPELINES = "Auto classes and pipelines"
TEXT = "The Fulmar leaves"


def _add(model: PreTrainedModel, method: Method, name: str = "default", size: int = 4, seed: int = 2) -> None:
    """Give a model an adapter as transformers does, with parameters that are not those of the start."""
    model.add_adapter(method.build_config(size=size, task_type="CAUSAL_LM"), adapter_name=name)
    perturb(model, name, seed=seed)
    model.eval()


def _build(method: Method) -> PreTrainedModel:
    model = build_causal_lm()
    _add(model, method)
    return model


@behaviour(GROUP)
def add_an_adapter(method: Method, directory: Path) -> None:
    """`model.add_adapter` on a model of transformers."""
    base = compute_logits(build_causal_lm())
    model = _build(method)
    assert model.active_adapters() == ["default"]
    assert_differ(compute_logits(model), base)
    assert_decreases(take_steps(model))


@behaviour(GROUP)
def generate_with_an_added_adapter(method: Method, directory: Path) -> None:
    """`generate` with an adapter of `model.add_adapter`."""
    model, ids = _build(method), draw_tokens()
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokens.tolist() != continue_greedily(build_causal_lm(), ids).tolist()
    assert_same_tokens(tokens, continue_greedily(model, ids))


@behaviour(GROUP)
def enable_and_disable(method: Method, directory: Path) -> None:
    """`disable_adapters` and `enable_adapters`."""
    base, model = compute_logits(build_causal_lm()), _build(method)
    adapted = compute_logits(model)
    model.disable_adapters()
    assert torch.equal(compute_logits(model), base)
    model.enable_adapters()
    assert torch.equal(compute_logits(model), adapted)
    assert_differ(adapted, base)


@behaviour(GROUP)
def switch_adapters(method: Method, directory: Path) -> None:
    """`set_adapter` with one name, and with several."""
    model = _build(method)
    first = compute_logits(model)
    _add(model, method, "second", size=6, seed=3)
    second = compute_logits(model)
    assert_differ(second, first)
    model.set_adapter("default")
    assert model.active_adapters() == ["default"]
    assert torch.equal(compute_logits(model), first)
    model.set_adapter(["default", "second"])
    assert model.active_adapters() == ["default", "second"]
    both = compute_logits(model)
    assert_differ(both, first)
    assert_differ(both, second)


@behaviour(GROUP)
def delete_adapters(method: Method, directory: Path) -> None:
    """`delete_adapter`, one and then the last."""
    base, model = compute_logits(build_causal_lm()), _build(method)
    first = compute_logits(model)
    _add(model, method, "second", size=6, seed=3)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(compute_logits(model), first)
    model.delete_adapter("default")
    assert torch.equal(compute_logits(model), base)
    names = {name for key, _ in model.named_parameters() for name in key.split(".")}
    assert not names & {"default", "second"}
    _add(model, method)
    assert_differ(compute_logits(model), base)


@behaviour(GROUP)
def save_and_load_an_adapter(method: Method, directory: Path) -> None:
    """`save_pretrained` writes the adapter, `load_adapter` reads it."""
    model = _build(method)
    model.save_pretrained(directory)
    assert {path.name for path in directory.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (directory / "model.safetensors").exists()
    loaded = build_causal_lm()
    loaded.load_adapter(str(directory))
    assert loaded.active_adapters() == ["default"]
    assert torch.equal(compute_logits(loaded), compute_logits(model))


@behaviour(GROUP)
def load_what_peft_saved(method: Method, directory: Path) -> None:
    """`load_adapter` of what a `PeftModel` saved, and the other way round."""
    model = build_adapted(method)
    model.save_pretrained(directory / "peft")
    expected = compute_logits(model)
    loaded = build_causal_lm()
    loaded.load_adapter(str(directory / "peft"), adapter_name="mine")
    assert torch.equal(compute_logits(loaded), expected)
    loaded.save_pretrained(directory / "native")
    again = PeftModel.from_pretrained(build_causal_lm(), directory / "native")
    assert torch.equal(compute_logits(again), expected)


@behaviour(GROUP)
def load_two_adapters(method: Method, directory: Path) -> None:
    """`load_adapter` twice under two names, one of them to train on."""
    for i, size in enumerate([4, 6]):
        build_adapted(method, size=size, seed=2 + i).save_pretrained(directory / str(i))
    model = build_causal_lm()
    model.load_adapter(str(directory / "0"), adapter_name="first")
    expected = compute_logits(model)
    model.load_adapter(str(directory / "1"), adapter_name="second", is_trainable=True)
    model.set_adapter("second")
    assert_close(compute_logits(model), compute_logits(build_adapted(method, size=6, seed=3)))
    model.train()
    assert_decreases(take_steps(model))
    model.set_adapter("first")
    assert torch.equal(compute_logits(model), expected)


@behaviour(GROUP)
def load_with_low_memory(method: Method, directory: Path) -> None:
    """`load_adapter(low_cpu_mem_usage=True)`."""
    model = build_adapted(method)
    model.save_pretrained(directory)
    loaded = build_causal_lm()
    loaded.load_adapter(str(directory), low_cpu_mem_usage=True)
    assert torch.equal(compute_logits(loaded), compute_logits(model))


@behaviour(GROUP)
def load_from_a_state_dict(method: Method, directory: Path) -> None:
    """`get_adapter_state_dict`, and `load_adapter` of a state dict and a configuration."""
    model = _build(method)
    state = model.get_adapter_state_dict()
    assert state and not any("default" in name.split(".") for name in state)
    loaded = build_causal_lm()
    loaded.load_adapter(
        adapter_state_dict=state, peft_config=method.build_config(size=4, task_type="CAUSAL_LM", inference_mode=True)
    )
    assert torch.equal(compute_logits(loaded), compute_logits(model))


@behaviour(GROUP)
def train_an_added_adapter(method: Method, directory: Path) -> None:
    """The `Trainer` on a model with an adapter of `model.add_adapter`; its checkpoints can be loaded."""
    data = [{"input_ids": row, "labels": row} for row in draw_tokens(batch_size=8)]
    model = build_causal_lm()
    model.add_adapter(method.build_config(size=4, task_type="CAUSAL_LM"))
    before = compute_logits(model)
    arguments = TrainingArguments(
        str(directory),
        max_steps=4,
        save_steps=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=data).train()
    assert_differ(compute_logits(model), before)
    loaded = build_causal_lm()
    loaded.load_adapter(str(directory / "checkpoint-4"))
    assert torch.equal(compute_logits(loaded), compute_logits(model))


@behaviour(GROUP)
def checkpoint_gradients_of_an_added_adapter(method: Method, directory: Path) -> None:
    """Gradient checkpointing with an adapter of `model.add_adapter`."""
    expected = take_steps(_build(method))
    model = _build(method)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(torch.tensor(take_steps(model)), torch.tensor(expected))


def _save_adapter(method: Method, directory: Path) -> tuple[str, PeftModel]:
    """A base model and an adapter in two directories; the adapter's, and the model."""
    base = AutoModelForCausalLM.from_pretrained(save_base_model(directory / "base"))
    base.generation_config.eos_token_id = None
    model = method.apply(base)
    perturb(model)
    model.save_pretrained(directory / "adapter")
    return str(directory / "adapter"), model.eval()


@behaviour(PIPELINES)
def load_a_model_by_its_adapter(method: Method, directory: Path) -> None:
    """`AutoModelForCausalLM.from_pretrained` of an adapter's directory loads the base model and the adapter."""
    path, model = _save_adapter(method, directory)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(compute_logits(loaded), compute_logits(model))


@behaviour(PIPELINES)
def load_an_adapter_beside_its_model(method: Method, directory: Path) -> None:
    """`AutoModelForCausalLM.from_pretrained` of a directory that holds the base model and the adapter."""
    model = build_adapted(method)
    expected = compute_logits(model)
    save_base_model(directory)
    model.save_pretrained(directory)
    assert torch.equal(compute_logits(AutoModelForCausalLM.from_pretrained(str(directory))), expected)


def _decode_expected(model: torch.nn.Module) -> str:
    tokenizer = build_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    base = tokenizer.decode(continue_greedily(build_causal_lm(), ids)[0], skip_special_tokens=True)
    expected = tokenizer.decode(continue_greedily(model, ids)[0], skip_special_tokens=True)
    if expected == base:
        raise AssertionError("The adapter has no effect.")
    return expected


@behaviour(PIPELINES)
def generate_text_in_a_pipeline(method: Method, directory: Path) -> None:
    """`pipeline("text-generation")` with a `PeftModel`."""
    model = build_adapted(method)
    generator = pipeline("text-generation", model=model, tokenizer=build_tokenizer(), device="cpu")
    assert generator(TEXT, max_new_tokens=6, do_sample=False)[0]["generated_text"] == _decode_expected(model)
    chat = generator([{"role": "user", "content": TEXT}], max_new_tokens=3, do_sample=False)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


@behaviour(PIPELINES)
def generate_batches_in_a_pipeline(method: Method, directory: Path) -> None:
    """`pipeline("text-generation")` with batches of texts of different lengths."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    generator = pipeline("text-generation", model=build_adapted(method), tokenizer=tokenizer, device="cpu")
    texts = [TEXT, "The Isolde"]
    together = generator(texts, max_new_tokens=6, do_sample=False, batch_size=2)
    alone = [generator(text, max_new_tokens=6, do_sample=False) for text in texts]
    assert together == alone


@behaviour(PIPELINES)
def generate_text_by_an_adapter_directory(method: Method, directory: Path) -> None:
    """`pipeline("text-generation")` with the directory of an adapter."""
    path, model = _save_adapter(method, directory)
    generator = pipeline("text-generation", model=path, device="cpu", tokenizer=build_tokenizer())
    generator.model.generation_config.eos_token_id = None
    assert generator(TEXT, max_new_tokens=6, do_sample=False)[0]["generated_text"] == _decode_expected(model)


@behaviour(PIPELINES)
def classify_text_in_a_pipeline(method: Method, directory: Path) -> None:
    """`pipeline("text-classification")` with a `PeftModel` that has a saved head."""
    model = method.apply(build_classifier(), task_type="SEQ_CLS")
    perturb(model, size=0.5)
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(build_classifier(), directory).eval()
    _check_classifier(loaded, model)


def _check_classifier(loaded: torch.nn.Module, model: PeftModel) -> None:
    tokenizer = build_tokenizer()
    classifier = pipeline("text-classification", model=loaded, tokenizer=tokenizer, device="cpu", top_k=None)
    scores = {entry["label"]: entry["score"] for entry in classifier([TEXT])[0]}
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = model.eval()(input_ids=ids).logits.softmax(-1)[0]
    assert_differ(expected, build_classifier()(ids).logits.softmax(-1)[0])
    assert_close(torch.tensor([scores[f"LABEL_{i}"] for i in range(3)]), expected)


@behaviour(PIPELINES)
def classify_text_by_an_adapter_directory(method: Method, directory: Path) -> None:
    """`pipeline("text-classification")` with the directory of an adapter that has a saved head."""
    base = build_classifier()
    base.save_pretrained(directory / "base")
    base = AutoModelForSequenceClassification.from_pretrained(str(directory / "base"))
    model = method.apply(base, task_type="SEQ_CLS")
    perturb(model, size=0.5)
    model.save_pretrained(directory / "adapter")
    _check_classifier(AutoModelForSequenceClassification.from_pretrained(str(directory / "adapter")), model)
    pipeline("text-classification", model=str(directory / "adapter"), tokenizer=build_tokenizer(), device="cpu")
