"""Loading: what fits is loaded as it was saved, what does not leaves the model as it was."""

import json
import os
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    Snapshot,
    add_foreign,
    add_prefix,
    both_kinds,
    draw_tokens,
    get_trainable,
    lose_all,
    lose_one,
    make_integers,
    misshape,
    named_prefix_parameters,
    perturb,
    put_infinity,
    put_nan,
    rewrite_weights,
    run,
    save,
)
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import build_model

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.folding import fold_adapter

DAMAGES = [lose_one, lose_all, add_foreign, misshape, put_nan, put_infinity, make_integers]
damages = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@both_kinds
@damages
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_weights_that_do_not_fit_raise_and_leave_the_base_model_alone(name, damage, low_cpu_mem_usage, tmp_path):
    save(tmp_path, name)
    rewrite_weights(tmp_path, damage)
    base = build_model(name)
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match="The weights do not fit adapter 'default'"):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    snapshot.assert_unchanged(base)


@both_kinds
def test_a_base_model_can_be_used_again_after_a_failure(name, tmp_path):
    expected = run(save(tmp_path / "good", name))
    save(tmp_path / "bad", name)
    rewrite_weights(tmp_path / "bad", put_nan)
    base = build_model(name)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base, tmp_path / "bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base, tmp_path / "good")
    assert torch.equal(run(loaded), expected)


def test_a_head_that_was_to_be_saved_is_given_back_after_a_failure(tmp_path):
    save(tmp_path, modules_to_save=["norm"])
    rewrite_weights(tmp_path, put_nan)
    base = build_model("llama")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base, tmp_path)
    snapshot.assert_unchanged(base)


@both_kinds
@damages
def test_a_second_adapter_that_does_not_fit_leaves_the_first_alone(name, damage, tmp_path):
    model = save(tmp_path, name)
    rewrite_weights(tmp_path, damage)
    expected, keys = run(model), list(model.state_dict())
    with pytest.raises(ValueError, match="The weights do not fit adapter 'other'"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == keys
    assert torch.equal(run(model), expected)


@both_kinds
def test_weights_that_do_not_fit_an_adapter_in_use_leave_it_alone(name, tmp_path):
    model = save(tmp_path, name)
    rewrite_weights(tmp_path, put_nan)
    expected, keys = run(model), list(model.state_dict())
    with pytest.raises(ValueError, match="The weights do not fit adapter 'default'"):
        model.load_adapter(tmp_path, "default")
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]
    assert torch.equal(run(model), expected)


def test_an_adapter_of_another_model_raises_and_names_both(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/right-one"}))
    base = build_model("llama", num_key_value_heads=4)
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match=r"has shape \(.*but the model needs \(.*org/right-one"):
        PeftModel.from_pretrained(base, tmp_path)
    snapshot.assert_unchanged(base)


@both_kinds
@pytest.mark.parametrize("settings", [{}, {"prefix_init": "vocab"}, {"prefix_init": "random"}], ids=str)
def test_loading_never_runs_the_initialization(name, settings, tmp_path):
    expected = run(save(tmp_path, name, **settings))
    base = build_model(name)
    hook = base.register_forward_pre_hook(lambda *args: pytest.fail("the base model ran"))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    loaded.load_adapter(tmp_path, "other")
    hook.remove()
    assert torch.equal(run(loaded), expected) and torch.equal(run(loaded, "other"), expected)


def lose_steps(weights: dict) -> None:
    for name in [name for name in weights if name.endswith("embedding_step")]:
        del weights[name]


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_adapters_from_before_embeddings_had_a_step_keep_what_they_compute(projection, tmp_path):
    expected = run(save(tmp_path, projection=projection, embedding_step=1.0))
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    del written["embedding_step"]
    path.write_text(json.dumps(written))
    rewrite_weights(tmp_path, lose_steps)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert torch.equal(run(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["embedding_step"] == 1.0
    assert torch.equal(run(PeftModel.from_pretrained(build_model("llama"), tmp_path / "again")), expected)


@pytest.mark.parametrize("loses_steps", [False, True])
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_weights_bring_the_step_of_their_embeddings(projection, loses_steps, tmp_path):
    """As when a `Trainer` resumes: the configuration stays that of the model."""
    expected = run(save(tmp_path, projection=projection, embedding_step=1.0))
    if loses_steps:
        rewrite_weights(tmp_path, lose_steps)
    model = add_prefix(build_model("llama"), projection=projection)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(run(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(run(PeftModel.from_pretrained(build_model("llama"), tmp_path / "again")), expected)


def test_loading_needs_no_tokenizer(tmp_path):
    save(tmp_path)
    path = tmp_path / "adapter_config.json"
    text = {"prefix_init": "text", "prefix_init_text": "a", "prefix_init_token_ids": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | text | {"tokenizer_name_or_path": "no/where"}))
    PeftModel.from_pretrained(build_model("llama"), tmp_path)


def test_a_saved_configuration_alone_is_no_adapter(tmp_path):
    save(tmp_path)
    model = get_peft_model(build_model("llama"), PrefixPlusConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(RuntimeError, match=r"no values yet.*from_pretrained.*prefix_is_initialized=False"):
        model(draw_tokens())


def test_loading_for_training_and_for_inference(tmp_path):
    save(tmp_path)
    frozen = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert not get_trainable(frozen) and frozen.active_peft_config.inference_mode
    model = PeftModel.from_pretrained(build_model("llama"), tmp_path, is_trainable=True)
    assert get_trainable(model) == set(named_prefix_parameters(model)) != set()
    frozen.load_adapter(tmp_path, "other", is_trainable=True)
    assert get_trainable(frozen) == {name for name in named_prefix_parameters(frozen) if ".other." in name} != set()


def test_training_goes_on_after_loading(tmp_path):
    model = save(tmp_path, num_frozen_tokens=1)
    loaded, ids = PeftModel.from_pretrained(build_model("llama"), tmp_path, is_trainable=True), draw_tokens()
    for twin in (model, loaded):
        optimizer = torch.optim.AdamW(named_prefix_parameters(twin).values(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            twin(ids, labels=ids).loss.backward()
            optimizer.step()
    assert torch.equal(run(loaded), run(model))


@both_kinds
@pytest.mark.parametrize("projection", ["none", "linear", "mlp"])
def test_low_cpu_mem_usage_loads_the_same(name, projection, tmp_path):
    model = save(tmp_path, name, projection=projection)
    loaded = PeftModel.from_pretrained(build_model(name), tmp_path, low_cpu_mem_usage=True)
    assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())
    assert torch.equal(run(loaded), run(model))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert torch.equal(run(loaded, "other"), run(model))


def test_inference_mode_freezes_a_new_adapter():
    model = add_prefix(build_model("llama"), inference_mode=True)
    assert not get_trainable(model) and run(model).isfinite().all()


def test_saving_writes_the_prefix_and_nothing_else(tmp_path):
    model = save(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    own = {key.replace(".default.", ".") for key in model.state_dict() if ".prefix_plus_encoder.default." in key}
    assert set(weights) == own
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_PLUS"


@pytest.mark.parametrize("adapter_name", ["keys", "embedding", "anchor_keys", "self_attn", "layers"])
def test_adapter_names_that_occur_in_other_names(adapter_name, tmp_path):
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if adapter_name == "keys":
        # A method of `ModuleDict`, which every tuner of PEFT keeps its adapters in.
        base = build_model("llama")
        snapshot = Snapshot(base)
        with pytest.raises(ValueError, match="'keys' cannot name an adapter"):
            get_peft_model(base, config, adapter_name)
        snapshot.assert_unchanged(base)
        return
    model = get_peft_model(build_model("llama"), config, adapter_name).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path / adapter_name, "default")
    assert torch.equal(run(loaded), run(model))


def test_an_adapter_without_values_is_not_saved(tmp_path):
    save(tmp_path / "whole")
    config = PrefixPlusConfig.from_pretrained(tmp_path / "whole")
    model = get_peft_model(build_model("llama"), config)
    with pytest.raises(RuntimeError, match="no values yet"):
        model.save_pretrained(tmp_path / "empty")
    assert not (tmp_path / "empty" / "adapter_model.safetensors").exists()


def rewrite_config(directory: Path, **settings) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def load_bare(base, directory):
    return PeftModel.from_pretrained(base, directory)


def load_lean(base, directory):
    return PeftModel.from_pretrained(base, directory, low_cpu_mem_usage=True)


def load_by_configuration(base, directory):
    return PeftModel.from_pretrained(base, directory, config=PeftConfig.from_pretrained(directory))


def load_natively(base, directory):
    base.load_adapter(str(directory))
    return base


ROUTES = [load_bare, load_lean, load_by_configuration, load_natively]
routes = pytest.mark.parametrize("load", ROUTES, ids=lambda load: load.__name__)
FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
ENCODER = "model.layers.0.self_attn.prefix_plus_encoder."
AGAIN = "Download or copy the adapter once more."
NORM = "base_model.model.model.norm.weight"
MISFIT = "The weights do not fit adapter 'default' of this model: In @/adapter_model.safetensors, "


class Exploit:
    """Runs code when it is unpickled by a loader that lets it."""

    def __reduce__(self):
        return exec, ("import os; os.environ['PREFIX_PLUS_EXPLOITED'] = '1'",)


def on_weights(change) -> Callable[[Path], None]:
    return lambda directory: rewrite_weights(directory, change)


def on_config(**settings) -> Callable[[Path], None]:
    return lambda directory: rewrite_config(directory, **settings)


def on_bytes(change, file: str = FILE) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_bytes(change((directory / file).read_bytes()))


def pickle_instead(make) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        weights = load_file(directory / FILE)
        (directory / FILE).unlink()
        torch.save(make(weights), directory / "adapter_model.bin")

    return damage


def put_directory(directory: Path) -> None:
    (directory / FILE).unlink()
    (directory / FILE).mkdir()


def set_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return on_weights(lambda weights: weights.update({"base_model.model." + name: tensor}))


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    return on_weights(lambda weights: weights.update({key: tensor.to(dtype) for key, tensor in weights.items()}))


# What was done, and the message; "@" is the directory of the adapter.
BAD = {
    "no_weights": (
        lambda directory: (directory / FILE).unlink(),
        "There are no weights (adapter_model.safetensors) "
        "beside the configuration in @. Copy the whole adapter; or, to make a new prefix by this configuration, use "
        "`dataclasses.replace(config, prefix_is_initialized=False)`.",
    ),
    "directory": (put_directory, f"@/{FILE} is not a file. {AGAIN}"),
    "truncated": (
        on_bytes(lambda data: data[:-1]),
        f"@/{FILE} is not a complete safetensors file (Error while "
        f"deserializing header: incomplete metadata, file not fully covered). {AGAIN}",
    ),
    "huge_header": (
        on_bytes(lambda data: struct.pack("<Q", 2**60) + data[8:]),
        f"@/{FILE} is not a complete safetensors file (Error while deserializing header: header too large). {AGAIN}",
    ),
    "code_in_pickle": (
        pickle_instead(lambda weights: {"x": Exploit()}),
        "@/adapter_model.bin is not a complete file of tensors (",
    ),
    "larger_than_the_file": (
        pickle_instead(lambda weights: {key: torch.zeros(1).expand(10**12) for key in weights}),
        f"@/adapter_model.bin has tensors that are larger than the file. {AGAIN}",
    ),
    "no_tensors_in_pickle": (
        pickle_instead(list),
        f"@/adapter_model.bin must hold a dict of names and tensors. {AGAIN}",
    ),
    "missing": (on_weights(lose_one), f"{MISFIT}1 of 16 tensors are missing, for instance '{ENCODER}anchor_keys'."),
    "empty": (on_weights(lose_all), f"{MISFIT}16 of 16 tensors are missing, for instance '{ENCODER}embedding'."),
    "foreign": (
        on_weights(add_foreign),
        f"{MISFIT}1 tensors have no place in it, for instance "
        "'model.layers.9.self_attn.prefix_plus_encoder.anchor_keys'.",
    ),
    "weights_of_the_base_model": (
        set_tensor("model.norm.weight", torch.zeros(32)),
        f"{MISFIT}1 tensors have no place in it, for instance 'model.norm.weight'.",
    ),
    "misshapen": (
        set_tensor(f"{ENCODER}anchor_keys", torch.zeros(2, 6, 8)),
        f"{MISFIT}'{ENCODER}anchor_keys' has shape (2, 6, 8), but the model needs (2, 5, 8).",
    ),
    "not_a_number": (
        on_weights(put_nan),
        f"{MISFIT}'base_model.model.model.layers.1.self_attn.prefix_plus_encoder."
        "scale_values' holds values that are not finite numbers.",
    ),
    "infinite": (
        on_weights(put_infinity),
        f"{MISFIT}'base_model.model.{ENCODER}anchor_keys' holds values that are not finite numbers.",
    ),
    "infinite_as_float32": (
        set_tensor(f"{ENCODER}anchor_keys", torch.full((2, 5, 8), 1e300, dtype=torch.float64)),
        f"{MISFIT}'base_model.model.{ENCODER}anchor_keys' holds values that are not finite numbers.",
    ),
    "integers": (
        on_weights(make_integers),
        f"{MISFIT}'{ENCODER}anchor_keys' has dtype I64, but the model needs a floating dtype of at least 16 bits.",
    ),
    "8_bits": (
        cast(torch.float8_e4m3fn),
        f"{MISFIT}'{ENCODER}anchor_keys' has dtype F8_E4M3, but the model needs a floating dtype of at least 16 bits.",
    ),
    "many_tokens": (
        on_config(num_virtual_tokens=2**24),
        f"{MISFIT}'{ENCODER}anchor_keys' has shape (2, 5, 8), but the model needs (2, 16777216, 8).",
    ),
    "too_many_tokens": (
        on_config(num_virtual_tokens=10**9),
        "`num_virtual_tokens` must be an integer of at most 16777216, got 1000000000.",
    ),
    "wide": (
        on_config(projection_dim=2**24),
        f"{MISFIT}'{ENCODER}embedding' has shape (5, 16), but the model needs (5, 16777216).",
    ),
    "too_wide": (
        on_config(projection_dim=10**9),
        "`projection_dim` must be an integer of at most 16777216, got 1000000000.",
    ),
    "many_tokens_in_a_pattern": (
        on_config(num_virtual_tokens_pattern={"attn": 10**9}),
        "`num_virtual_tokens_pattern['attn']` must be an integer of at most 16777216, got 1000000000.",
    ),
    "slow_pattern": (
        on_config(target_modules="(.*)*x"),
        "`target_modules` has '(.*)*x', which could take very long to match: it "
        "repeats parts that match in many ways. Use fewer wildcards and no repeats inside of repeats, or name the "
        "modules.",
    ),
    "other_layers": (
        on_config(layers_to_transform=[0]),
        f"{MISFIT}8 tensors have no place in it, for instance "
        "'model.layers.1.self_attn.prefix_plus_encoder.anchor_keys'.",
    ),
    "layers_that_are_not_there": (
        on_config(layers_to_transform=[0, 9]),
        "`layers_to_transform` names the layers [9], but the layers that can carry a prefix are [0, 1].",
    ),
    "other_projection": (
        on_config(projection="none"),
        f"{MISFIT}4 of 12 tensors are missing, for instance '{ENCODER}delta_keys'.",
    ),
    "head_that_is_not_in_the_file": (
        on_config(modules_to_save=["lm_head"]),
        f"{MISFIT}1 of 17 tensors are missing, for instance 'lm_head.weight'.",
    ),
    "head_inside_of_attention": (
        on_config(modules_to_save=["q_proj"]),
        "`modules_to_save` ['q_proj'] means "
        "model.layers.0.self_attn.q_proj, which has modules in common with model.layers.0.self_attn, which gets a "
        "prefix. Name other modules, or leave this one out of `target_modules`.",
    ),
    "head_that_is_everything": (
        on_config(modules_to_save=[""]),
        "`modules_to_save` must be a list of module names, got [''].",
    ),
    "remote_code": (
        on_config(tokenizer_kwargs={"trust_remote_code": True}),
        "`tokenizer_kwargs` has `trust_remote_code`, which "
        "would run code for everybody who uses this configuration. Tokenize the text with that tokenizer yourself, "
        "and set `prefix_init_token_ids`.",
    ),
    "mistyped": (
        on_config(base_model_name_or_path={"a": 1}),
        "`base_model_name_or_path` must be a string, got {'a': 1}.",
    ),
    "task": (on_config(task_type="POETRY"), "Invalid task type: 'POETRY'."),
}


@routes
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_by_every_route_and_changes_nothing(kind, load, tmp_path):
    damage, message = BAD[kind]
    save(tmp_path)
    damage(tmp_path)
    base = build_model("llama")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError) as raised:
        load(base, tmp_path)
    message = message.replace("@", str(tmp_path))
    assert str(raised.value)[: len(message)] == message
    snapshot.assert_unchanged(base)
    assert all(parameter.requires_grad for parameter in base.parameters()) and not base._hf_peft_config_loaded
    assert "PREFIX_PLUS_EXPLOITED" not in os.environ


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_beside_a_good_adapter_changes_nothing(kind, tmp_path):
    damage, message = BAD[kind]
    model = save(tmp_path)
    damage(tmp_path)
    expected, keys, modules = run(model), list(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError) as raised:
        model.load_adapter(tmp_path, "other")
    message = message.replace("@", str(tmp_path)).replace("'default'", "'other'")
    assert str(raised.value)[: len(message)] == message
    assert (
        list(model.state_dict()) == keys
        and list(model.modules()) == modules
        and list(model.peft_config) == ["default"]
    )
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights.pop(NORM), "1 of 21 tensors are missing, for instance 'model.norm.weight'"),
        (lambda weights: weights.update({NORM: torch.ones(3)}), "has shape (3,), but the model needs (32,)"),
        (lambda weights: weights[NORM].fill_(float("nan")), "holds values that are not finite numbers"),
        (lambda weights: weights.update({NORM: torch.ones(32, dtype=torch.int64)}), "has dtype I64"),
    ],
    ids=["missing", "misshapen", "not_a_number", "integers"],
)
@routes
def test_a_bad_head_is_refused(load, change, problem, tmp_path):
    save(tmp_path, modules_to_save=["norm"])
    rewrite_weights(tmp_path, change)
    base = build_model("llama")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match=re.escape(problem)):
        load(base, tmp_path)
    snapshot.assert_unchanged(base)


@routes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_floating_dtypes_become_float32(load, dtype, tmp_path):
    model = save(tmp_path)
    cast(dtype)(tmp_path)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".prefix_plus_" in name:
                tensor.copy_(tensor.to(dtype))
    loaded = load(build_model("llama"), tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())
    torch.testing.assert_close(loaded(draw_tokens()).logits, run(model))


@pytest.mark.parametrize("load", ROUTES[:-1], ids=lambda load: load.__name__)
def test_a_pickle_of_tensors_is_loaded(load, tmp_path):
    expected = run(save(tmp_path))
    pickle_instead(lambda weights: weights)(tmp_path)
    assert torch.equal(load(build_model("llama"), tmp_path)(draw_tokens()).logits, expected)


def test_transformers_reads_no_pickle_and_says_so_before_the_model_is_changed(tmp_path):
    save(tmp_path)
    pickle_instead(lambda weights: weights)(tmp_path)
    base = build_model("llama")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match=r"adapter_model\.bin is not a safetensors file.*PeftModel\.from_pretrained"):
        base.load_adapter(str(tmp_path))
    snapshot.assert_unchanged(base)


@routes
@pytest.mark.parametrize("settings", [{"prefix_is_initialized": False}, {}], ids=["false", "absent"])
def test_loading_runs_no_initialization_whatever_the_file_says(load, settings, tmp_path):
    expected = run(save(tmp_path))
    text = {"prefix_init": "text", "prefix_init_text": "a", "prefix_init_token_ids": None}
    rewrite_config(tmp_path, **text, tokenizer_name_or_path="no/where")
    path = tmp_path / CONFIG_FILE
    written = json.loads(path.read_text())
    del written["prefix_is_initialized"]
    path.write_text(json.dumps(written | settings))
    base = build_model("llama")
    hook = base.register_forward_pre_hook(lambda *args: pytest.fail("the base model ran"))
    loaded = load(base, tmp_path)
    hook.remove()
    assert torch.equal(loaded(draw_tokens()).logits, expected)


def test_an_init_text_never_runs_the_code_of_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Mine", None]}}))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}})
    )
    (tmp_path / "code.py").write_text("import os\nos.environ['PREFIX_PLUS_EXPLOITED'] = '1'\nclass Mine: pass\n")
    config = PrefixPlusConfig(prefix_init_text="a", tokenizer_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="Cannot load the tokenizer"):
        get_peft_model(build_model("llama"), config)
    assert "PREFIX_PLUS_EXPLOITED" not in os.environ


@pytest.mark.parametrize("parent_library", ["os", "subprocess", "peft_prefix_plus.cli"])
def test_an_auto_class_imports_nothing_that_a_file_names(parent_library, tmp_path):
    save(tmp_path)
    rewrite_config(
        tmp_path, task_type=None, auto_mapping={"base_model_class": "system", "parent_library": parent_library}
    )
    with pytest.raises(ValueError, match="not in the import allowlist"):
        AutoPeftModel.from_pretrained(tmp_path)


def test_unknown_settings_of_a_later_version_are_named(tmp_path):
    expected = run(save(tmp_path))
    rewrite_config(tmp_path, source="x", later={"a": 1})
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['later', 'source'\]"):
        loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert torch.equal(run(loaded), expected)


@routes
def test_an_enlarged_vocabulary_is_loaded_with_its_embeddings(load, tmp_path):
    model = add_prefix(build_model("llama"))
    perturb(model)
    model.get_input_embeddings().weight.data[7] = 1.0
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert torch.equal(load(build_model("llama"), tmp_path)(draw_tokens()).logits, run(model))


@routes
@pytest.mark.parametrize("modules_to_save", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_embeddings_that_are_also_modules_to_save(load, modules_to_save, tmp_path):
    """PEFT then writes them under several names."""
    model = add_prefix(build_model("llama"), modules_to_save=modules_to_save)
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter += 0.1
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    torch.testing.assert_close(load(build_model("llama"), tmp_path)(draw_tokens()).logits, run(model))


def test_a_larger_vocabulary_than_that_of_the_base_model_is_refused(tmp_path):
    model = add_prefix(build_model("llama", vocab_size=100))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = build_model("llama")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match=r"weight' has shape \(100, 32\), .* \(96, 32\)"):
        PeftModel.from_pretrained(base, tmp_path)
    snapshot.assert_unchanged(base)


@pytest.mark.parametrize("damage", [lose_one, add_foreign, misshape, put_nan, make_integers])
def test_a_state_dict_that_does_not_fit_is_refused(damage, tmp_path):
    """Without a file there is nothing to look at before the adapter is in the model."""
    save(tmp_path)
    weights = load_file(tmp_path / FILE)
    damage(weights)
    base = build_model("llama")
    snapshot = Snapshot(base)
    model = get_peft_model(base, PrefixPlusConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(ValueError, match="The weights do not fit adapter 'default'"):
        set_peft_model_state_dict(model, weights)
    snapshot.assert_unchanged(base)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_task_that_is_not_the_models_is_refused(task_type, tmp_path):
    """The model without its head, or an encoder: PEFT's class for the task would fail after the injection."""
    save(tmp_path)
    rewrite_config(tmp_path, task_type=task_type)
    base = build_model("llama").model
    modules = list(base.modules())
    for load in (load_bare, lambda base, directory: get_peft_model(base, PrefixPlusConfig(task_type=task_type))):
        with pytest.raises(ValueError, match=f"`task_type` is '{task_type}', but LlamaModel does not generate"):
            load(base, tmp_path)
        assert list(base.modules()) == modules and all(parameter.requires_grad for parameter in base.parameters())


def test_an_adapter_in_the_cache_of_the_hub_is_checked_as_well(tmp_path):
    snapshot = tmp_path / "models--org--ferries" / "snapshots" / ("0" * 40)
    expected = run(save(snapshot))
    refs = tmp_path / "models--org--ferries" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    loaded = PeftModel.from_pretrained(build_model("llama"), "org/ferries", cache_dir=tmp_path)
    assert torch.equal(run(loaded), expected)
    rewrite_weights(snapshot, misshape)
    base = build_model("llama")
    before = Snapshot(base)
    with pytest.raises(ValueError, match=r"output_bias' has shape \(33,\), but the model needs \(32,\)"):
        PeftModel.from_pretrained(base, "org/ferries", cache_dir=tmp_path)
    before.assert_unchanged(base)


def test_a_configuration_that_was_checked_forgets_where_it_was_read(tmp_path):
    """A folded or changed adapter must not be compared with a file that it no longer comes from."""
    save(tmp_path)
    model = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert model.peft_config["default"].source is None
    assert PrefixPlusConfig.from_pretrained(str(tmp_path)).source.folder == str(tmp_path)


@pytest.mark.parametrize("size", [{"num_virtual_tokens": 2**24}, {"projection_dim": 2**24}], ids=str)
def test_folding_allocates_nothing_for_sizes_that_the_weights_do_not_have(size, tmp_path):
    save(tmp_path / "adapter")
    rewrite_config(tmp_path / "adapter", **size)
    with pytest.raises(ValueError, match=r"the configuration says 16777216\. The files belong to different adapters"):
        fold_adapter(str(tmp_path / "adapter"), str(tmp_path / "folded"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_a_model_in_half_precision_has_computed_is_saved_in_half_precision(low_cpu_mem_usage, dtype, tmp_path):
    model = add_prefix(build_model("llama", dtype=dtype))
    perturb(model)
    model.save_pretrained(tmp_path)
    saved = {key: tensor.dtype for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    anchors = {own for key, own in saved.items() if ".anchor_" in key}
    assert anchors == {dtype}
    assert {own for key, own in saved.items() if ".anchor_" not in key} == {torch.float32}
    loaded = PeftModel.from_pretrained(
        build_model("llama", dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]) and tensor.dtype == loaded.state_dict()[key].dtype


def test_what_would_lose_a_bit_is_saved_as_it_is(tmp_path):
    model = add_prefix(build_model("llama", dtype=torch.bfloat16))
    anchor = next(buffer for name, buffer in model.named_buffers() if name.endswith("anchor_keys"))
    anchor[0, 0, 0] += 1e-5
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert [tensor.dtype for key, tensor in saved.items() if key.endswith("anchor_keys")].count(torch.float32) == 1


def test_refused_weights_leave_the_head_of_the_adapter_in_use(tmp_path):
    model = add_prefix(build_model("llama"), modules_to_save=["lm_head"])
    perturb(model)
    expected = run(model)
    add_prefix(build_model("llama"), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "anchor_keys" in name))
    model.add_adapter("other", PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="tensors are missing"):
        set_peft_model_state_dict(model, weights, adapter_name="other")
    assert model.base_model.model.lm_head.active_adapters == ["default"]
    assert torch.equal(run(model), expected)
