"""Prefix arithmetic: laws of sums of adapters, and of adapters one behind the other."""

import numpy as np
import pytest
import torch
from helpers import (
    INIT_TOKEN_IDS,
    Snapshot,
    add_prefix,
    add_second,
    both_kinds,
    draw_tokens,
    get_trainable,
    named_prefix_parameters,
    pad_rows,
    perturb,
    run,
)
from peft import PeftModel
from tiny_models import build_model
from torch.testing import assert_close
from zoo_models import build_zoo_model

from peft_prefix_plus import PrefixPlusLayer, prepare_model_for_compiled_hotswap

# Those of the same start as `default`, and others.
SAME = {"twin": {"prefix_init_token_ids": INIT_TOKEN_IDS, "projection": "linear"}}
OTHERS = {
    "short": {"prefix_init_token_ids": [3, 4, 6], "projection": "none"},
    "other": {"prefix_init_token_ids": [9, 8, 7, 33, 2], "projection": "none"},
}


def build(name: str, implementation: str = "sdpa", **others: dict) -> PeftModel:
    """A model with several adapters, each moved from its start."""
    model = add_prefix(build_model(name, implementation), projection_dim=8)
    for adapter, settings in (SAME | OTHERS | others).items():
        add_second(model, adapter, projection_dim=8, **settings)
    perturb(model)
    return model.eval()


def read(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """The finished keys and values of an adapter by layer, `[2, heads, P, dim]`."""
    states = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PrefixPlusLayer) and adapter in layer.list_adapters():
            keys, values, *_ = layer.get_encoder(adapter)()
            states[name] = torch.cat([keys, values]).detach()
    return states


def read_start(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PrefixPlusLayer)}
    encoders = {name: layer.get_encoder(adapter) for name, layer in layers.items()}
    return {name: torch.stack([encoder.anchor_keys, encoder.anchor_values]) for name, encoder in encoders.items()}


def assert_all_close(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in given.items():
        assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


def generate(model: PeftModel) -> torch.Tensor:
    ids, mask = pad_rows(draw_tokens(), [7, 4], "left")
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)


def reload(model: PeftModel, adapter: str, base, directory) -> PeftModel:
    model.save_pretrained(directory, selected_adapters=[adapter])
    return PeftModel.from_pretrained(base, directory / adapter).eval()


@pytest.mark.parametrize(
    "adapters", [["default", "short"], ["short", "default"], ["short", "twin", "other"], ["twin"]]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@both_kinds
def test_one_behind_the_other_equals_several_active_adapters(name, implementation, adapters, tmp_path):
    model = build(name, implementation)
    expected, tokens = run(model, adapters), generate(model)
    model.add_weighted_adapter(adapters, None, "joined", combination_type="cat")
    assert torch.equal(run(model, "joined"), expected)
    assert torch.equal(generate(model), tokens)
    loaded = reload(model, "joined", build_model(name, implementation), tmp_path)
    assert torch.equal(run(loaded), expected)
    assert torch.equal(generate(loaded), tokens)


def test_the_order_matters_to_nothing_but_the_order_of_the_keys():
    model = build("llama")
    model.add_weighted_adapter(["default", "short"], [1, 1.0], "one", "cat")
    model.add_weighted_adapter(["short", "default"], None, "two", "cat")
    for name, states in read(model, "one").items():
        assert torch.equal(states[:, :, 5:], read(model, "two")[name][:, :, :3])
    assert_close(run(model, "one"), run(model, "two"))


@both_kinds
def test_layers_may_have_prefixes_of_different_lengths(name, tmp_path):
    uneven = {"prefix_init_token_ids": [5, 6, 7, 8], "num_virtual_tokens_pattern": {r"1\.(self_attn|attn)": 2}}
    model = build(name, uneven=uneven, lower={"layers_to_transform": [0]})
    for i, adapters in enumerate((["uneven", "short"], ["lower", "default"], ["lower", "uneven"], ["uneven"])):
        expected = run(model, adapters)
        model.add_weighted_adapter(adapters, None, f"joined{i}", "cat")
        assert torch.equal(run(model, f"joined{i}"), expected)
        loaded = reload(model, f"joined{i}", build_model(name), tmp_path)
        assert torch.equal(run(loaded), expected)


def test_some_layers_may_have_the_prefix_of_one_adapter_only(tmp_path):
    model = build(
        "llama", lower={"layers_to_transform": [0], "num_frozen_tokens": 1}, upper={"layers_to_transform": 1}
    )
    expected = run(model, ["lower", "upper"])
    model.add_weighted_adapter(["lower", "upper"], None, "joined", "cat")
    assert torch.equal(run(model, "joined"), expected)
    assert torch.equal(run(reload(model, "joined", build_model("llama"), tmp_path)), expected)
    assert model.peft_config["joined"].num_frozen_tokens == 0
    model.add_weighted_adapter(["lower"], None, "alone", "cat")
    assert model.peft_config["alone"].num_frozen_tokens == 1
    assert set(read(model, "alone")) == set(read(model, "lower"))


@pytest.mark.parametrize("model_type", ["ctrl", "ministral3", "bloom", "opt", "bart", "gptj"])
@torch.no_grad()
def test_every_way_to_know_positions_allows_to_join(model_type, tmp_path):
    model = add_prefix(build_zoo_model("causal", model_type), projection_dim=8)
    add_second(model, "other")
    perturb(model)
    ids, mask = pad_rows(draw_tokens() % 60 + 3, [7, 4], "left")
    model.base_model.set_adapter(["other", "default"])
    expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    model.add_weighted_adapter(["other", "default"], None, "joined", "cat")
    model.set_adapter("joined")
    loaded = reload(model, "joined", build_zoo_model("causal", model_type), tmp_path)
    for given in (model, loaded):
        assert_close(given(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_encoder_decoders_are_joined_in_all_their_attention(tmp_path):
    model = add_prefix(build_zoo_model("seq2seq", "bart"), projection_dim=8)
    add_second(model, "other")
    perturb(model)
    ids = draw_tokens() % 60 + 3
    model.base_model.set_adapter(["default", "other"])
    expected = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
    model.add_weighted_adapter(["default", "other"], None, "joined", "cat")
    loaded = reload(model, "joined", build_zoo_model("seq2seq", "bart"), tmp_path)
    assert_close(loaded(input_ids=ids, decoder_input_ids=ids[:, :4]).logits, expected)


@both_kinds
@pytest.mark.parametrize("other", ["twin", "other"])
def test_a_weight_of_one_gives_the_adapter_itself(name, other):
    model = build(name)
    model.add_weighted_adapter(["default", other], [1, 0], "first", "linear")
    model.add_weighted_adapter([other], [1.0], "alone")
    assert_all_close(read(model, "first"), read(model, "default"))
    assert_close(run(model, "first"), run(model, "default"), atol=1e-5, rtol=1e-5)
    assert_all_close(read(model, "alone"), read(model, other))


@both_kinds
def test_what_training_has_changed_is_added_up(name, tmp_path):
    """With a common start the weights need not sum to 1: each says how far to go into one direction."""
    model = build(name)
    start, first, second = (read_start(model, "default"), read(model, "default"), read(model, "twin"))
    for i, (a, b) in enumerate([(1, 1), (0.3, -2.0), (0.5, 0.5), (0, 0)]):
        model.add_weighted_adapter(["default", "twin"], [a, b], f"sum{i}", "linear")
        expected = {n: s + a * (first[n] - s) + b * (second[n] - s) for n, s in start.items()}
        assert_all_close(read(model, f"sum{i}"), expected)
        loaded = reload(model, f"sum{i}", build_model(name), tmp_path)
        assert torch.equal(run(loaded), run(model, f"sum{i}"))
    untrained = add_prefix(build_model(name))
    assert_close(run(model, "sum3"), run(untrained), atol=1e-5, rtol=1e-5)


def test_a_sum_can_be_added_up_again():
    model = build("llama")
    model.add_weighted_adapter(["default", "twin"], [0.5, 0.5], "middle")
    model.add_weighted_adapter(["middle"], [2.0], "whole")
    model.add_weighted_adapter(["default", "twin"], [1, 1], "sum")
    assert_all_close(read(model, "whole"), read(model, "sum"))
    model.add_weighted_adapter(["default", "sum"], [-1, 1], "rest")
    assert_all_close(read(model, "rest"), read(model, "twin"))


@both_kinds
def test_adapters_with_different_starts_are_averaged(name, tmp_path):
    model = build(name)
    model.add_weighted_adapter(["default", "other", "twin"], [0.5, 0.75, -0.25], "mean")
    states = [read(model, adapter) for adapter in ("default", "other", "twin")]
    assert_all_close(
        read(model, "mean"), {n: 0.5 * states[0][n] + 0.75 * states[1][n] - 0.25 * states[2][n] for n in states[0]}
    )
    loaded = reload(model, "mean", build_model(name), tmp_path)
    assert torch.equal(run(loaded), run(model, "mean"))


def test_with_a_common_start_both_ways_to_average_agree():
    model = build("llama")
    model.add_weighted_adapter(["default", "twin"], [0.25, 0.75], "sum")
    model.base_model.fold_prefix(["default", "twin"])
    model.add_weighted_adapter(["default", "twin"], [0.25, 0.75], "mean")
    assert_all_close(read(model, "mean"), read(model, "sum"))


def test_frozen_tokens_stay_at_their_start():
    frozen = {
        name: {"prefix_init_token_ids": INIT_TOKEN_IDS, "num_frozen_tokens": n} for name, n in (("a", 2), ("b", 1))
    }
    model = build("llama", **frozen)
    model.add_weighted_adapter(["a", "b"], [1.5, 1.5], "sum")
    start, states = read_start(model, "default"), read(model, "sum")
    assert model.peft_config["sum"].num_frozen_tokens == 1
    for name in states:
        assert torch.equal(states[name][:, :, :1], start[name][:, :, :1])
        assert not torch.allclose(states[name][:, :, 1:], start[name][:, :, 1:], atol=1e-2)


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_slots_are_combined_without_their_hidden_tokens(combination_type):
    weights = [0.5, 0.5] if combination_type == "linear" else None
    model, prepared = build("llama"), build("llama")
    prepare_model_for_compiled_hotswap(prepared, num_virtual_tokens=12)
    for each in (model, prepared):
        each.add_weighted_adapter(["default", "other"], weights, "new", combination_type)
    assert_all_close(read(prepared, "new"), read(model, "new"))


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
@both_kinds
def test_the_result_is_trained_and_saved_like_any_other(name, combination_type, tmp_path):
    model = build(name)
    before, trainable = run(model, "default"), get_trainable(model)
    model.add_weighted_adapter(["default", "twin"], [1, 1], "new", combination_type)
    assert model.active_adapters == ["default"] and get_trainable(model) == trainable
    assert torch.equal(run(model), before)
    model.set_adapter("new")
    assert get_trainable(model) == {name for name in named_prefix_parameters(model) if ".new." in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = draw_tokens()
    losses = []
    for _ in range(3):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert torch.equal(run(reload(model, "new", build_model(name), tmp_path)), run(model, "new"))
    assert torch.equal(run(model, "default"), before)
    model.set_adapter("default")
    model.delete_adapter("new")
    assert torch.equal(run(model), before) and not read(model, "new")


def test_a_head_comes_along(tmp_path):
    model = add_prefix(build_model("llama"), modules_to_save=["norm"])
    add_second(model, "other")
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["default"].weight *= 3
    perturb(model)
    expected = run(model, ["other", "default"])
    model.set_adapter("default")
    add_second(model, "second", modules_to_save=["norm"])
    for weights, combination_type in ((None, "cat"), ([1, 0], "linear")):
        refuse(
            model,
            "default, second each have a LlamaRMSNorm of their own in `modules_to_save`",
            ["default", "second"],
            weights,
            "new",
            combination_type,
        )
    model.add_weighted_adapter(["other", "default"], None, "joined", "cat")
    assert_close(run(model, "joined"), expected)
    assert torch.equal(run(reload(model, "joined", build_model("llama"), tmp_path)), run(model, "joined"))


def refuse(model: PeftModel, match: str, *args, **kwargs) -> None:
    """A combination must fail, and leave everything as it was."""
    snapshot, configs = Snapshot(model), {name: config.to_dict() for name, config in model.peft_config.items()}
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(*args, **kwargs)
    snapshot.assert_unchanged(model)
    assert {name: config.to_dict() for name, config in model.peft_config.items()} == configs


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("no prefix 'nobody'; the model has default, twin", (["default", "nobody"], [1, 1], "new")),
        ("an adapter 'twin' already", (["default", "twin"], [1, 1], "twin")),
        ("2 adapters, but 1 weights", (["default", "twin"], [1], "new")),
        ("2 adapters, but 3 weights", (["default", "twin"], [1, 1, 1], "new", "cat")),
        ("at least one name, got \\[\\]", ([], [], "new")),
        ("at least one name, got 'twin'", ("twin", [1], "new")),
        ("one finite number for each adapter, got None", (["default"], None, "new")),
        ("one finite number for each adapter, got \\[nan\\]", (["default"], [float("nan")], "new")),
        ("a list of numbers, one for each adapter, got 0.5", (["default"], 0.5, "new")),
        ("a list of numbers, one for each adapter, got \\['x'\\]", (["default"], ["x"], "new")),
        ("a list of numbers, one for each adapter, got \\[True\\]", (["default"], [True], "new")),
        ("values in 'model.layers.0.self_attn' would be too large", (["default", "twin"], [1e39, 1], "new")),
        ("have no weights, got \\[1.0, 0.5\\]", (["default", "twin"], [1, 0.5], "new", "cat")),
        ("one of linear, cat, got 'svd'", (["default", "twin"], [1, 1], "new", "svd")),
        ("'a.b' cannot name an adapter", (["default"], [1], "a.b")),
        ("'' cannot name an adapter", (["default"], [1], "")),
        ("'half' cannot name an adapter", (["default"], [1], "half")),
        (
            r"'default' has 5 virtual tokens in 'model.layers.0.self_attn', 'short' has 3",
            (["default", "short"], [0.5, 0.5], "new"),
        ),
        (
            "weights \\[1.0, 1.0\\] sum to 2, but default, other have no common start",
            (["default", "other"], [1, 1], "new"),
        ),
        (
            "'default' and 'lower' have prefixes in different modules.*'model.layers.1.self_attn'",
            (["default", "lower"], [0.5, 0.5], "new"),
        ),
    ],
    ids=str,
)
def test_what_cannot_be_combined_is_refused(match, arguments):
    refuse(build("llama", lower={"layers_to_transform": [0]}), match, *arguments)


def test_shifts_that_no_adapter_could_repeat_are_refused():
    settings = {"random": {"prefix_init": "random", "prefix_init_token_ids": None, "num_virtual_tokens": 5}}
    settings["upper"] = {"prefix_init_token_ids": [5, 6, 7], "num_virtual_tokens_pattern": {r"0\.(self_attn|attn)": 2}}
    settings["lower"] = {"prefix_init_token_ids": [5, 6, 7], "num_virtual_tokens_pattern": {r"1\.(self_attn|attn)": 2}}
    for name in ("llama", "gpt2"):
        model = build(name, **settings)
        for adapters, weights, combination_type in (
            (["default", "random"], None, "cat"),
            (["default", "random"], [0.5, 0.5], "linear"),
            (["upper", "lower"], None, "cat"),
        ):
            if name == "gpt2":
                refuse(model, "move the input by", adapters, weights, "new", combination_type)
                continue
            model.add_weighted_adapter(adapters, weights, "new", combination_type)
            if combination_type == "cat":
                assert torch.equal(run(model, "new"), run(model, adapters))
            model.delete_adapter("new")


@pytest.mark.parametrize("build_weights", [torch.tensor, np.array, tuple], ids=["tensor", "array", "tuple"])
def test_weights_may_stand_in_a_tensor_or_an_array(build_weights):
    model = build("llama")
    model.add_weighted_adapter(["default", "twin"], [0.25, 0.5], "listed")
    model.add_weighted_adapter(["default", "twin"], build_weights([0.25, 0.5]), "built")
    assert torch.equal(run(model, "built"), run(model, "listed"))


def test_adapters_that_train_rows_of_embeddings_are_refused():
    model = add_prefix(build_model("llama"), trainable_token_indices=[11, 23])
    with pytest.raises(ValueError, match="trained rows of embeddings"):
        model.add_weighted_adapter(["default"], [1.0], "copy")
    assert list(model.peft_config) == ["default"]
