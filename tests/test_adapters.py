"""Several adapters in one model: independent of one another, gone when deleted, and cheap to switch."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from helpers import Snapshot, both_kinds, draw_tokens, get_trainable
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.functional import delete_adapter
from peft.helpers import rescale_adapter_scale
from tiny_models import build_model
from torch import nn

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer

# Different lengths, layers, projections and starts; `b` is everywhere.
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"num_virtual_tokens": 4, "projection": "none", "layers_to_transform": [0], "prefix_init": "random"},
    "b": {"num_virtual_tokens": 5, "projection": "mlp", "projection_dim": 8, "prefix_init_token_ids": [3, 4, 6]},
    "c": {"num_virtual_tokens": 6, "projection": "linear", "layers_to_transform": [1], "num_frozen_tokens": 2},
}
ORDERS = list(itertools.permutations(ADAPTERS))


def build_config(adapter: str) -> PrefixPlusConfig:
    return PrefixPlusConfig(task_type="CAUSAL_LM", **ADAPTERS[adapter])


@torch.no_grad()
def move(model: nn.Module, adapter: str) -> None:
    """Move the parameters of one adapter away from the start."""
    generator = torch.Generator().manual_seed(ord(adapter))
    for name, parameter in model.named_parameters():
        if adapter in name.split("."):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def add(model: PeftModel, adapter: str) -> None:
    model.add_adapter(adapter, build_config(adapter))
    move(model, adapter)


def build(name: str, *adapters: str) -> PeftModel:
    first, *others = adapters
    model = get_peft_model(build_model(name), build_config(first), adapter_name=first)
    move(model, first)
    for adapter in others:
        add(model, adapter)
    return model.eval()


@torch.no_grad()
def run(model: PeftModel) -> torch.Tensor:
    return model.base_model(input_ids=draw_tokens()).logits


@torch.no_grad()
def run_base(model: nn.Module) -> torch.Tensor:
    return model(input_ids=draw_tokens()).logits


def activate(model: PeftModel, *adapters: str) -> torch.Tensor:
    model.base_model.set_adapter(list(adapters))
    return run(model)


def describe(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that adding and deleting an adapter has to leave as it was."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: (id(module), type(module), module.training) for name, module in modules.items()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "configs": {name: id(vars(module)["config"]) for name, module in modules.items() if "config" in vars(module)},
        "hooks": {
            name: [list(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
            for name, module in modules.items()
        },
    }


@both_kinds
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_are_independent(name, order):
    """Each is what it is alone, bit for bit, in whatever order they come and go."""
    alone = {adapter: build(name, adapter) for adapter in ADAPTERS}
    expected = {adapter: run(model) for adapter, model in alone.items()}
    assert len({tuple(logits.flatten().tolist()) for logits in expected.values()}) == len(ADAPTERS)
    model = build(name, *order)
    for adapter in ADAPTERS:
        set_peft_model_state_dict(model, get_peft_model_state_dict(alone[adapter], adapter_name=adapter), adapter)
    for adapter, logits in expected.items():
        assert torch.equal(activate(model, adapter), logits)
    for gone in order[:2]:
        activate(model, order[2])
        model.delete_adapter(gone)
        for adapter in order[order.index(gone) + 1 :]:
            assert torch.equal(activate(model, adapter), expected[adapter])


@both_kinds
def test_adding_draws_the_same_start_beside_others(name):
    alone, model = build(name, "b"), build(name, "a", "b")
    anchors = {key: tensor for key, tensor in alone.state_dict().items() if "anchor" in key}
    assert anchors and all(torch.equal(model.state_dict()[key], tensor) for key, tensor in anchors.items())


@both_kinds
def test_several_active_adapters_are_concatenated_in_their_order(name):
    model = build(name, "a", "b", "c")
    layers = {key: module for key, module in model.named_modules() if isinstance(module, PrefixPlusLayer)}
    for order in ORDERS:
        activate(model, *order)
        assert model.active_adapters == list(order)
        for layer in layers.values():
            present = layer.list_effective_adapters()
            assert present == [adapter for adapter in order if adapter in layer.list_adapters()]
            states = layer.get_prefix_states(present, 1)
            parts = [layer.get_encoder(adapter)() for adapter in present]
            assert torch.equal(states.keys, torch.cat([part.keys for part in parts], dim=2))
            assert torch.equal(states.values, torch.cat([part.values for part in parts], dim=2))


def test_several_active_adapters_equal_one_of_all_their_tokens():
    """Put together by hand: the keys and values of three adapters as the anchor of a fourth."""
    model = build("llama", "a", "b", "c")
    together = get_peft_model(
        build_model("llama"),
        PrefixPlusConfig(
            projection="none", prefix_init="zero", num_virtual_tokens_pattern={"0.self_attn": 9, "1.self_attn": 11}
        ),
    ).eval()
    layers = [module for module in model.modules() if isinstance(module, PrefixPlusLayer)]
    for layer, whole in zip(layers, (m for m in together.modules() if isinstance(m, PrefixPlusLayer)), strict=True):
        states = layer.get_prefix_states(layer.list_adapters(), 1)
        with torch.no_grad():
            encoder = whole.get_encoder("default")
            encoder.delta_keys.copy_(states.keys[0])
            encoder.delta_values.copy_(states.values[0])
            encoder.scale_keys.fill_(1.0)
            encoder.scale_values.fill_(1.0)
    expected = run(together)
    for order in ORDERS:
        torch.testing.assert_close(activate(model, *order), expected, atol=1e-5, rtol=1e-5)


@both_kinds
@pytest.mark.parametrize("adapter", ["b", "c"])
@pytest.mark.parametrize("makes_active", [False, True])
def test_deleting_restores_the_module_tree(name, adapter, makes_active):
    model = build(name, "a")
    before, logits, state = describe(model), run(model), model.state_dict()
    for _ in range(3):
        add(model, adapter)
        if makes_active:
            activate(model, adapter)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.delete_adapter(adapter)
        else:
            model.delete_adapter(adapter)
        assert describe(model) == before
        assert model.active_adapters == ["a"] and list(model.peft_config) == ["a"]
        assert list(model.state_dict()) == list(state)
        assert torch.equal(run(model), logits)


@both_kinds
def test_deleting_the_last_adapter_leaves_the_base_model(name):
    base = build_model(name).eval()
    snapshot = Snapshot(base)
    model = get_peft_model(base, build_config("b"), adapter_name="b")
    move(model, "b")
    model.delete_adapter("b")
    snapshot.assert_unchanged(base)
    add(model, "a")
    assert not torch.equal(activate(model, "a"), snapshot.logits)
    snapshot.assert_unchanged(model.unload())


@both_kinds
def test_deletion_by_the_function_of_peft(name):
    """`peft.functional.delete_adapter`, which transformers calls, knows layers and no tuner."""
    model = build(name, "a", "b")
    expected = activate(model, "a")
    delete_adapter(model.base_model.model, "b", prefix="prefix_plus_")
    assert torch.equal(run(model), expected)
    assert not any("b" in key.split(".") for key in model.state_dict())


@both_kinds
@pytest.mark.parametrize("order", ORDERS)
def test_one_adapter_takes_over_in_all_layers(name, order):
    """The adapters are in different layers, and a layer cannot know what is active in the others."""
    model = build(name, *order)
    activate(model, order[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter(order[0])
    (new,) = model.active_adapters
    assert new in order[1:]
    assert model.get_model_status().active_adapters == [new]
    assert torch.equal(run(model), activate(model, new))


def test_deleting_one_of_several_active_adapters_keeps_the_others_active():
    model = build("llama", "a", "b", "c")
    expected = activate(model, "a", "c")
    activate(model, "a", "b", "c")
    model.delete_adapter("b")
    assert model.get_model_status().active_adapters == ["a", "c"]
    assert torch.equal(run(model), expected)


@both_kinds
def test_disabled_stays_disabled(name):
    """Switching and deleting within `disable_adapter()` leave the base model, and count afterwards."""
    base = build_model(name).eval()
    expected = run_base(base)
    model = get_peft_model(base, build_config("b"), adapter_name="b").eval()
    move(model, "b")
    add(model, "a")
    with model.disable_adapter():
        assert torch.equal(run(model), expected)
        assert torch.equal(activate(model, "a"), expected)
        model.delete_adapter("b")
        assert torch.equal(run(model), expected)
        with model.disable_adapter():
            assert torch.equal(run(model), expected)
        assert torch.equal(run(model), expected)
    logits = run(model)
    assert not torch.equal(logits, expected)
    assert torch.equal(activate(model, "a"), logits)


@both_kinds
def test_an_adapter_that_is_added_while_disabled_is_disabled(name):
    """In layers, too, that had no adapter before."""
    base = build_model(name).eval()
    expected = run_base(base)
    model = get_peft_model(base, build_config("a"), adapter_name="a").eval()
    with model.disable_adapter():
        add(model, "b")
        assert torch.equal(activate(model, "b"), expected)
        assert model.get_model_status().enabled is False
    assert not torch.equal(run(model), expected)
    assert model.get_model_status().enabled is True


def test_an_error_while_disabled_enables_again():
    model = build("llama", "a")
    expected = run(model)
    with pytest.raises(RuntimeError, match="stop"), model.disable_adapter():
        raise RuntimeError("stop")
    assert torch.equal(run(model), expected)


@both_kinds
def test_switching_copies_nothing(name):
    model = build(name, "a", "b", "c")
    pointers = {key: tensor.data_ptr() for key, tensor in model.state_dict(keep_vars=True).items()}
    versions = {key: tensor._version for key, tensor in model.state_dict(keep_vars=True).items()}
    for adapters in (*ORDERS, ("a",), ("b", "c"), ("c",)):
        activate(model, *adapters)
        with model.disable_adapter():
            run(model)
    tensors = model.state_dict(keep_vars=True)
    assert {key: tensor.data_ptr() for key, tensor in tensors.items()} == pointers
    assert {key: tensor._version for key, tensor in tensors.items()} == versions


def test_only_active_adapters_are_trained():
    model = build("llama", "a", "b", "c")
    own = {a: {key for key, _ in model.named_parameters() if a in key.split(".")} for a in ADAPTERS}
    for adapters in (["a"], ["c"], ["a", "b"], ["b", "c", "a"]):
        model.base_model.set_adapter(adapters)
        assert get_trainable(model) == set().union(*(own[adapter] for adapter in adapters))
    model.base_model.set_adapter(["a", "b"], inference_mode=True)
    assert get_trainable(model) == set()
    assert model.active_adapters == ["a", "b"]


def test_set_requires_grad_means_the_adapters_that_are_named():
    model = build("llama", "a", "b", "c")
    own = {a: {key for key, _ in model.named_parameters() if a in key.split(".")} for a in ADAPTERS}
    model.set_requires_grad(["b", "c"])
    assert get_trainable(model) == own["a"] | own["b"] | own["c"]
    model.set_requires_grad("a", requires_grad=False)
    assert get_trainable(model) == own["b"] | own["c"]
    assert model.active_adapters == ["a"]
    assert model.get_model_status().requires_grad == {"a": False, "b": True, "c": True}
    model.set_requires_grad(["a", "b", "c"], requires_grad=False)
    assert get_trainable(model) == set()


def test_a_frozen_adapter_gets_no_gradients_and_passes_them_on():
    model = build("llama", "a", "b").train()
    model.base_model.set_adapter(["a", "b"])
    model.set_requires_grad("a", requires_grad=False)
    ids = draw_tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == ("b" in key.split("."))


@both_kinds
def test_status_names_what_there_is(name):
    model = build(name, "a", "b", "c")
    by_name = {layer.name: layer for layer in model.get_layer_status() if layer.module_type == "PrefixPlusLayer"}
    assert [layer.available_adapters for layer in by_name.values()] == [["a", "b"], ["b", "c"]]
    assert all(layer.active_adapters == ["a"] and layer.enabled for layer in by_name.values())
    status = model.get_model_status()
    assert status.adapter_model_type == "PrefixPlusModel"
    assert status.peft_types == {"a": "PREFIX_PLUS", "b": "PREFIX_PLUS", "c": "PREFIX_PLUS"}
    assert (status.active_adapters, status.available_adapters) == (["a"], ["a", "b", "c"])
    assert status.requires_grad == {"a": True, "b": False, "c": False}
    assert (status.enabled, status.merged_adapters, status.quantization_backend) == (True, [], None)
    assert status.devices == {"a": ["cpu"], "b": ["cpu"], "c": ["cpu"]}
    assert status.trainable_params == sum(p.numel() for key, p in model.named_parameters() if p.requires_grad)
    model.base_model.set_adapter(["c", "a"])
    assert model.get_model_status().active_adapters == ["c", "a"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True


def test_rescaling_is_refused():
    model = build("llama", "a")
    expected = run(model)
    with pytest.raises(ValueError, match="scaling"), rescale_adapter_scale(model, multiplier=0.5):
        pass
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model: model.set_adapter("missing"),
        lambda model: model.delete_adapter("missing"),
        lambda model: model.add_adapter("a", build_config("b")),
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.fold_prefix("missing"),
    ],
)
def test_a_refusal_changes_nothing(wrong):
    model = build("llama", "a", "c")
    before, logits = describe(model), run(model)
    with pytest.raises(ValueError, match=r"missing|already exists|unload\(\)"):
        wrong(model)
    assert describe(model) == before
    assert torch.equal(run(model), logits)


def test_a_configuration_that_is_changed_and_used_again_gives_what_it_says():
    """The same object used again as it is makes a copy of the start, which TRL's reference needs."""
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=[11, 23, 5])
    model = get_peft_model(build_model("llama"), config).eval()
    config.prefix_init_token_ids = [60, 61, 62]
    model.add_adapter("other", config)
    model.set_adapter("other")
    expected = get_peft_model(
        build_model("llama"), PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=[60, 61, 62])
    )
    ids = draw_tokens()
    assert torch.equal(model(ids).logits, expected.eval()(ids).logits)
