"""Adapters on one model: adding, switching, mixing, deleting, taking out."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from torch import nn

from .behaviour import behaviour
from .methods import Method
from .subjects import (
    add_adapter,
    assert_close,
    assert_differ,
    assert_same_tokens,
    build_adapted,
    build_causal_lm,
    check_message,
    compute_logits,
    continue_greedily,
    draw_tokens,
    perturb,
)


def _describe(model: nn.Module) -> dict[str, Any]:
    """The modules, tensors and hooks of a model."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "parameters": [name for name, _ in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "hooks": {
            name: (len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        },
    }


@behaviour("Adapters")
def add_and_delete_a_second_adapter(method: Method, directory: Path) -> None:
    """Add a second adapter, switch to it, delete it."""
    model = method.apply(build_causal_lm())
    perturb(model)
    ids = draw_tokens()
    first = model(ids).logits
    model.add_adapter("second", method.build_config(size=6, task_type="CAUSAL_LM"))
    perturb(model, "second", seed=3)
    model.set_adapter("second")
    assert_differ(model.eval()(ids).logits, first)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert_close(model(ids).logits, first)
    assert not any("second" in name.split(".") for name, _ in model.named_parameters())


@behaviour("Adapters")
def hold_adapters_of_different_sizes(method: Method, directory: Path) -> None:
    """Three adapters of different sizes in one model, each as it is alone."""
    model = build_adapted(method, "first", size=4)
    add_adapter(model, method, "second", size=7, seed=3)
    add_adapter(model, method, "third", size=2, seed=4)
    for name, size in {"third": 2, "first": 4, "second": 7}.items():
        model.set_adapter(name)
        alone = build_adapted(method, name, size=size)
        set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name=name), adapter_name=name)
        assert_differ(compute_logits(model), compute_logits(build_causal_lm()))
        assert_close(compute_logits(model), compute_logits(alone))


@behaviour("Adapters")
def hold_adapters_in_different_layers(method: Method, directory: Path) -> None:
    """Adapters in different layers of one model (`layers_to_transform`)."""
    model = build_adapted(method, layers_to_transform=[0])
    first = compute_logits(model)
    add_adapter(model, method, "second", layers_to_transform=[1])
    assert torch.equal(compute_logits(model), first)
    model.set_adapter("second")
    alone = build_adapted(method, "second", size=6, layers_to_transform=[1])
    set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name="second"), adapter_name="second")
    assert_differ(compute_logits(model), first)
    assert_close(compute_logits(model), compute_logits(alone))


@behaviour("Adapters")
def activate_several_adapters_at_once(method: Method, directory: Path) -> None:
    """Several adapters active at once (`base_model.set_adapter([...])`)."""
    model = build_adapted(method)
    add_adapter(model, method, "second")
    first = compute_logits(model)
    model.set_adapter("second")
    second = compute_logits(model)
    model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]
    both = compute_logits(model)
    assert_differ(both, first)
    assert_differ(both, second)
    model.set_adapter("default")
    assert torch.equal(compute_logits(model), first)


@behaviour("Adapters")
def leave_nothing_behind_when_deleted(method: Method, directory: Path) -> None:
    """A deleted adapter leaves nothing behind: no module, parameter, buffer, hook, entry."""
    model = build_adapted(method)
    before, names = _describe(model), set(model.peft_config)
    for _ in range(2):
        add_adapter(model, method, "second")
        model.set_adapter("second")
        compute_logits(model)
        model.set_adapter("default")
        model.delete_adapter("second")
        assert set(model.peft_config) == names
        assert _describe(model) == before


@behaviour("Adapters")
def delete_the_active_adapter(method: Method, directory: Path) -> None:
    """Delete the active adapter; another one takes over."""
    model = build_adapted(method)
    first = compute_logits(model)
    add_adapter(model, method, "second")
    model.set_adapter("second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(compute_logits(model), first)


@behaviour("Adapters")
def use_names_that_contain_one_another(method: Method, directory: Path) -> None:
    """Adapter names that are parts of one another."""
    model = build_adapted(method, "light")
    expected = {"light": compute_logits(model)}
    for seed, name in enumerate(["highlight", "light_2", "l"], start=5):
        add_adapter(model, method, name, seed=seed)
        model.set_adapter(name)
        expected[name] = compute_logits(model)
    model.save_pretrained(directory)
    model.set_adapter("highlight")
    model.delete_adapter("light")
    for name in ("highlight", "light_2", "l"):
        model.set_adapter(name)
        assert torch.equal(compute_logits(model), expected[name])
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory / "l", adapter_name="l")
    for name in ("light", "highlight", "light_2"):
        loaded.load_adapter(directory / name, adapter_name=name)
    for name, logits in expected.items():
        loaded.set_adapter(name)
        assert_close(compute_logits(loaded), logits)


@behaviour("Adapters")
def disable_the_adapter(method: Method, directory: Path) -> None:
    """`disable_adapter()` is the base model."""
    base, ids = build_causal_lm(), draw_tokens()
    expected = base(ids).logits.clone()
    model = method.apply(base)
    perturb(model)
    assert_differ(model(ids).logits, expected)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


@behaviour("Adapters")
def disable_the_adapter_in_generation(method: Method, directory: Path) -> None:
    """Generate with the base model under `disable_adapter()`, and with the adapter after it."""
    base, ids = build_causal_lm(), draw_tokens()
    expected = base.generate(ids, max_new_tokens=6, do_sample=False)
    model = build_adapted(method)
    with model.disable_adapter(), model.disable_adapter():
        assert_same_tokens(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), expected)
    own = continue_greedily(model, ids)
    assert own.tolist() != expected.tolist()
    assert_same_tokens(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), own)


@behaviour("Adapters")
def get_the_base_model_back(method: Method, directory: Path) -> None:
    """`unload()` gives the base model back, bit for bit."""
    base = build_causal_lm()
    expected, before = compute_logits(base), _describe(base)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = method.apply(base)
    perturb(model)
    assert_differ(compute_logits(model), expected)
    unloaded = model.unload()
    assert _describe(unloaded) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in unloaded.state_dict().items())
    assert torch.equal(compute_logits(unloaded), expected)


@behaviour("Adapters")
def adapt_an_unloaded_model_again(method: Method, directory: Path) -> None:
    """Give the model that `unload()` returned another adapter."""
    base = build_causal_lm()
    unloaded = method.apply(base).unload()
    expected = compute_logits(unloaded)
    model = method.apply(unloaded, size=6)
    perturb(model)
    assert_differ(compute_logits(model), expected)


@behaviour("Adapters")
def merge_or_say_what_to_do(method: Method, directory: Path) -> None:
    """Merge into the base model, or get an error that says what to do instead."""
    for merge in ("merge_and_unload", "merge_adapter"):
        model = build_adapted(method)
        expected = compute_logits(model)
        try:
            merged = getattr(model, merge)()
        except ValueError as error:
            check_message(error, "unload()")
            merged = None
        assert_close(compute_logits(merged or model), expected)


@behaviour("Adapters")
def rescale_or_say_why_not(method: Method, directory: Path) -> None:
    """Scale an adapter for a while (`rescale_adapter_scale`), or get an error."""
    model = build_adapted(method)
    expected, base = compute_logits(model), compute_logits(build_causal_lm())
    try:
        with rescale_adapter_scale(model, multiplier=0.0):
            assert_close(compute_logits(model), base)
    except ValueError as error:
        check_message(error, "scaling")
    assert torch.equal(compute_logits(model), expected)


@behaviour("Adapters")
def freeze_an_adapter(method: Method, directory: Path) -> None:
    """Freeze an adapter and thaw it (`set_requires_grad`)."""
    model = build_adapted(method)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    model.set_requires_grad("default", requires_grad=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad("default")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@behaviour("Adapters")
def read_the_status(method: Method, directory: Path) -> None:
    """`get_model_status()` and `get_layer_status()` tell the state of the adapters."""
    model = build_adapted(method)
    add_adapter(model, method, "second")
    status = model.get_model_status()
    assert status.active_adapters == ["default"] and status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.enabled is True and status.merged_adapters == []
    assert status.num_adapter_layers == len(model.get_layer_status()) > 0
    assert set(status.peft_types) == {"default", "second"}
    assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    assert 0 < status.trainable_params < status.total_params
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.set_adapter("second")
    assert all(layer.active_adapters == ["second"] for layer in model.get_layer_status())
    assert model.get_model_status().requires_grad == {"default": False, "second": True}


@behaviour("Adapters")
def count_parameters(method: Method, directory: Path) -> None:
    """`print_trainable_parameters()` counts what is trained."""
    base = build_causal_lm()
    total = base.num_parameters()
    model = method.apply(base)
    trained, everything = model.get_nb_trainable_parameters()
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert everything == sum(p.numel() for p in model.parameters()) == total + trained
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_trainable_parameters()
    assert f"{trained:,d}" in printed.getvalue()


@behaviour("Adapters")
def inject_without_peft_model(method: Method, directory: Path) -> None:
    """`inject_adapter_in_model` without a `PeftModel`, and its state dict into another one."""
    expected = compute_logits(build_causal_lm())
    config = method.build_config(size=4, task_type="CAUSAL_LM")
    model = inject_adapter_in_model(config, build_causal_lm())
    perturb(model)
    assert_differ(compute_logits(model), expected)
    assert all(".default." in name or name.endswith(".default") for name in _list_trained(model))
    other = inject_adapter_in_model(method.build_config(size=4, task_type="CAUSAL_LM"), build_causal_lm())
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(compute_logits(other), compute_logits(model))


def _list_trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@behaviour("Adapters")
def keep_float32_on_a_bfloat16_model(method: Method, directory: Path) -> None:
    """An adapter on a bfloat16 model, in float32 or not (`autocast_adapter_dtype`)."""
    for autocast in (True, False):
        base = build_causal_lm().to(torch.bfloat16)
        expected = compute_logits(base)
        model = PeftModel.from_pretrained(base, _save(method, directory), autocast_adapter_dtype=autocast)
        logits = compute_logits(model)
        assert logits.dtype == torch.bfloat16
        assert_differ(logits, expected)
        assert_close(logits.float(), compute_logits(build_adapted(method)), tolerance=0.3)
        parameters = [p for name, p in model.named_parameters() if "default" in name.split(".")]
        assert not autocast or all(parameter.dtype == torch.float32 for parameter in parameters)
        assert model.generate(input_ids=draw_tokens(), max_new_tokens=3).shape == (2, 10)


def _save(method: Method, directory: Path) -> Path:
    build_adapted(method).save_pretrained(directory)
    return directory
