"""Saving, loading, copying and training on."""

import copy
import io
import pickle
from pathlib import Path

import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from .behaviour import behaviour
from .methods import Method
from .subjects import (
    add_adapter,
    assert_close,
    assert_decreases,
    assert_differ,
    assert_same_tokens,
    build_adapted,
    build_causal_lm,
    build_classifier,
    build_seq2seq_lm,
    compute_logits,
    draw_tokens,
    perturb,
    save_base_model,
    take_steps,
)

GROUP = "Saving and loading"


@behaviour(GROUP)
def load_what_was_saved(method: Method, directory: Path) -> None:
    """A saved and loaded adapter is the same, bit for bit."""
    model = build_adapted(method)
    expected, state = compute_logits(model), get_peft_model_state_dict(model)
    model.save_pretrained(directory)
    assert {path.name for path in directory.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory)
    assert torch.equal(compute_logits(loaded), expected)
    loaded_state = get_peft_model_state_dict(loaded)
    assert list(loaded_state) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded_state.items())


@behaviour(GROUP)
def freeze_what_is_loaded(method: Method, directory: Path) -> None:
    """A loaded adapter is frozen, unless `is_trainable=True`."""
    build_adapted(method).save_pretrained(directory)
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.load_adapter(directory, adapter_name="second")
    loaded.set_adapter("second")
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "default" in name)


@behaviour(GROUP)
def save_again_what_was_loaded(method: Method, directory: Path) -> None:
    """An adapter that is loaded and saved again gives equal files."""
    build_adapted(method).save_pretrained(directory / "first")
    PeftModel.from_pretrained(build_causal_lm(), directory / "first").save_pretrained(directory / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (directory / "first" / name).read_bytes() == (directory / "second" / name).read_bytes()


@behaviour(GROUP)
def load_beside_another_adapter(method: Method, directory: Path) -> None:
    """`load_adapter` beside an adapter that is there."""
    saved = build_adapted(method, size=6, seed=4)
    saved.save_pretrained(directory)
    model = build_adapted(method)
    first = compute_logits(model)
    model.load_adapter(directory, adapter_name="loaded")
    assert torch.equal(compute_logits(model), first)
    model.set_adapter("loaded")
    assert torch.equal(compute_logits(model), compute_logits(saved))
    model.delete_adapter("loaded")
    assert set(model.peft_config) == {"default"}


@behaviour(GROUP)
def train_on_after_from_pretrained(method: Method, directory: Path) -> None:
    """Load with `PeftModel.from_pretrained(is_trainable=True)` and train on."""
    model = method.apply(build_causal_lm())
    losses = take_steps(model)
    assert_decreases(losses)
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory, is_trainable=True)
    assert_close(compute_logits(loaded), compute_logits(model))
    more = take_steps(loaded)
    assert more[0] < losses[-1]
    assert_decreases(more)
    expected = take_steps(model)
    assert_close(torch.tensor(more), torch.tensor(expected))


@behaviour(GROUP)
def train_on_after_load_adapter(method: Method, directory: Path) -> None:
    """Load with `load_adapter(is_trainable=True)` and train on; the other adapter stays as it is."""
    saved = build_adapted(method)
    saved.save_pretrained(directory)
    model = build_adapted(method, "other", size=6, seed=4)
    other = compute_logits(model)
    model.load_adapter(directory, adapter_name="loaded", is_trainable=True)
    model.set_adapter("loaded")
    assert_decreases(take_steps(model))
    assert_differ(compute_logits(model), compute_logits(saved))
    model.set_adapter("other")
    assert torch.equal(compute_logits(model), other)


@behaviour(GROUP)
def load_with_low_cpu_mem_usage(method: Method, directory: Path) -> None:
    """Load with `low_cpu_mem_usage=True`."""
    model = build_adapted(method)
    model.save_pretrained(directory)
    expected = compute_logits(model)
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory, low_cpu_mem_usage=True)
    assert torch.equal(compute_logits(loaded), expected)
    loaded.load_adapter(directory, adapter_name="second", low_cpu_mem_usage=True)
    loaded.set_adapter("second")
    assert torch.equal(compute_logits(loaded), expected)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


@behaviour(GROUP)
def save_selected_adapters(method: Method, directory: Path) -> None:
    """Save several adapters, or selected ones (`selected_adapters`)."""
    model = build_adapted(method)
    add_adapter(model, method, "second")
    add_adapter(model, method, "third", seed=4)
    model.save_pretrained(directory, selected_adapters=["third", "default"])
    assert not (directory / "second").exists()
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory)
    loaded.load_adapter(directory / "third", adapter_name="third")
    for name in ("default", "third"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(compute_logits(loaded), compute_logits(model))


@behaviour(GROUP)
def recognize_a_saved_adapter(method: Method, directory: Path) -> None:
    """`check_if_peft_model` and `PeftConfig.from_pretrained` know a saved adapter."""
    model = build_adapted(method)
    model.save_pretrained(directory)
    assert check_if_peft_model(str(directory))
    config = PeftConfig.from_pretrained(directory)
    assert type(config) is type(model.peft_config["default"])
    assert config.peft_type == model.peft_config["default"].peft_type


@behaviour(GROUP)
def load_by_the_auto_classes(method: Method, directory: Path) -> None:
    """`AutoPeftModelForCausalLM` finds the base model by the saved adapter."""
    base = AutoModelForCausalLM.from_pretrained(save_base_model(directory / "base"))
    model = method.apply(base)
    perturb(model)
    model.save_pretrained(directory / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(directory / "adapter")
    assert torch.equal(compute_logits(loaded), compute_logits(model))


@behaviour(GROUP)
def load_a_classifier_by_the_auto_class(method: Method, directory: Path) -> None:
    """`AutoPeftModelForSequenceClassification`, with the trained head."""
    _check_auto_class(method, directory, build_classifier(), "SEQ_CLS", AutoPeftModelForSequenceClassification)


@behaviour(GROUP)
def load_a_seq2seq_model_by_the_auto_class(method: Method, directory: Path) -> None:
    """`AutoPeftModelForSeq2SeqLM`."""
    _check_auto_class(method, directory, build_seq2seq_lm(), "SEQ_2_SEQ_LM", AutoPeftModelForSeq2SeqLM)


def _check_auto_class(
    method: Method, directory: Path, base: PreTrainedModel, task_type: str, auto_class: type
) -> None:
    base.save_pretrained(directory / "base")
    base = type(base).from_pretrained(directory / "base")
    settings = {"decoder_input_ids": draw_tokens(seed=2)} if task_type == "SEQ_2_SEQ_LM" else {}
    ids = draw_tokens()
    before = base.eval()(input_ids=ids, **settings).logits
    model = method.apply(base, task_type=task_type)
    perturb(model)
    expected = model.eval()(input_ids=ids, **settings).logits
    assert_differ(expected, before)
    model.save_pretrained(directory / "adapter")
    options = {"num_labels": 3} if task_type == "SEQ_CLS" else {}
    loaded = auto_class.from_pretrained(directory / "adapter", **options).eval()
    assert torch.equal(loaded(input_ids=ids, **settings).logits, expected)


@behaviour(GROUP)
def save_and_load_a_trained_head(method: Method, directory: Path) -> None:
    """A classification head is trained and saved with the adapter."""
    model = method.apply(build_classifier(), task_type="SEQ_CLS")
    head = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "score" in name}
    assert head
    _train_classifier(model)
    ids = draw_tokens()
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(build_classifier(), directory)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def _train_classifier(model: PeftModel) -> None:
    ids, labels = draw_tokens(), torch.tensor([0, 2])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert_decreases(losses)


@behaviour(GROUP)
def give_each_adapter_its_own_head(method: Method, directory: Path) -> None:
    """Two adapters with a classification head each."""
    model, ids = method.apply(build_classifier(), task_type="SEQ_CLS"), draw_tokens()
    _train_classifier(model)
    first = model.eval()(input_ids=ids).logits
    model.add_adapter("second", method.build_config(size=6, task_type="SEQ_CLS"))
    model.set_adapter("second")
    _train_classifier(model)
    assert_differ(model.eval()(input_ids=ids).logits, first)
    model.set_adapter("default")
    assert torch.equal(model.eval()(input_ids=ids).logits, first)
    model.delete_adapter("second")
    assert not any("second" in name.split(".") for name, _ in model.named_parameters())
    assert torch.equal(model.eval()(input_ids=ids).logits, first)


@behaviour(GROUP)
def train_and_save_other_modules(method: Method, directory: Path) -> None:
    """Train and save a module of the base model as a whole (`modules_to_save=["lm_head"]`)."""
    model = method.apply(build_causal_lm(), modules_to_save=["lm_head"])
    original = build_causal_lm().lm_head.weight
    take_steps(model)
    trained = [p for name, p in model.named_parameters() if "lm_head.modules_to_save.default" in name]
    assert len(trained) == 1
    assert_differ(trained[0], original)
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory)
    assert torch.equal(compute_logits(loaded), compute_logits(model))


@behaviour(GROUP)
def disable_other_modules(method: Method, directory: Path) -> None:
    """`disable_adapter()` is the base model with `modules_to_save`, too."""
    model = method.apply(build_causal_lm(), modules_to_save=["lm_head"])
    take_steps(model)
    with model.disable_adapter():
        assert torch.equal(compute_logits(model), compute_logits(build_causal_lm()))


@behaviour(GROUP)
def exchange_the_weights_in_place(method: Method, directory: Path) -> None:
    """`get_peft_model_state_dict` of one model into `set_peft_model_state_dict` of another."""
    model, other = build_adapted(method), build_adapted(method, seed=5)
    assert_differ(compute_logits(model), compute_logits(other))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(compute_logits(other), compute_logits(model))


@behaviour(GROUP)
def reload_a_whole_state_dict(method: Method, directory: Path) -> None:
    """`state_dict()` into `load_state_dict()` of a model that was built in the same way."""
    model, other = build_adapted(method), method.apply(build_causal_lm(seed=1))
    assert_differ(compute_logits(model), compute_logits(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(compute_logits(other), compute_logits(model))


@behaviour(GROUP)
def copy_a_model(method: Method, directory: Path) -> None:
    """`copy.deepcopy` of a model; the copies are independent."""
    model = build_adapted(method)
    expected = compute_logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(compute_logits(twin), expected)
    perturb(twin, seed=5)
    assert_differ(compute_logits(twin), expected)
    with twin.disable_adapter():
        assert torch.equal(compute_logits(twin), compute_logits(build_causal_lm()))
        assert torch.equal(compute_logits(model), expected)


@behaviour(GROUP)
def pickle_a_model(method: Method, directory: Path) -> None:
    """`pickle` and `torch.save` of a whole model."""
    model = build_adapted(method)
    expected = compute_logits(model)
    assert torch.equal(compute_logits(pickle.loads(pickle.dumps(model))), expected)
    torch.save(model, stream := io.BytesIO())
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert torch.equal(compute_logits(loaded), expected)
    tokens = loaded.generate(input_ids=draw_tokens(), max_new_tokens=4, do_sample=False)
    assert_same_tokens(tokens, model.generate(input_ids=draw_tokens(), max_new_tokens=4, do_sample=False))


@behaviour(GROUP)
def use_a_saved_configuration_again(method: Method, directory: Path) -> None:
    """The configuration of one model for another one; it stays as it was written."""
    config = method.build_config(size=4, task_type="CAUSAL_LM")
    models = [get_peft_model(build_causal_lm(), config) for _ in range(2)]
    perturb(models[0])
    assert_differ(compute_logits(models[0]), compute_logits(models[1]))
    models[1].save_pretrained(directory)
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory)
    assert torch.equal(compute_logits(loaded), compute_logits(models[1]))


@behaviour(GROUP)
def train_and_save_new_tokens(method: Method, directory: Path) -> None:
    """Train the embeddings of some tokens with the adapter (`trainable_token_indices`)."""
    model = method.apply(build_causal_lm(), trainable_token_indices=[11, 12])
    before = compute_logits(model, torch.tensor([[5, 11, 6]]))
    ids = torch.tensor([[5, 11, 6, 12, 7], [12, 8, 9, 11, 5]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    embeddings = [name for name, p in model.named_parameters() if "trainable_tokens" in name and p.requires_grad]
    assert embeddings
    for _ in range(3):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_differ(compute_logits(model, torch.tensor([[5, 11, 6]])), before)
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory)
    assert torch.equal(compute_logits(loaded, ids), compute_logits(model, ids))
    with model.disable_adapter():
        assert torch.equal(compute_logits(model, ids), compute_logits(build_causal_lm(), ids))
