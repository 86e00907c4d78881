"""Hot-swapping: after a swap the model is the one that the new adapter was loaded into, compiled or not."""

import copy
import json
import shutil

import pytest
import torch
from accelerate import cpu_offload
from behaviours.hub_client import OWNER, STRANGER_TOKEN, TOKEN, get_hub, in_client
from helpers import (
    Snapshot,
    add_foreign,
    add_prefix,
    add_second,
    draw_tokens,
    lose_one,
    named_prefix_parameters,
    pad_rows,
    perturb,
    put_nan,
    rewrite_weights,
    run,
    save,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import build_model
from torch.testing import assert_close
from zoo_models import build_zoo_model

from peft_prefix_plus import PrefixPlusLayer, hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_prefix_plus.encoders import PrefixSlot

# Name of a directory, and what its adapter has that the others have not.
ADAPTERS = {
    "mlp": {},
    "short": {"prefix_init_token_ids": [3, 9, 4], "projection": "none"},
    "long": {"prefix_init_token_ids": [3, 9, 4, 8, 8, 17, 6, 5], "projection": "linear", "num_frozen_tokens": 2},
    "random": {"prefix_init": "random", "num_virtual_tokens": 6, "prefix_dropout": 0.5},
    "uneven": {"prefix_init_token_ids": [5, 6, 7], "num_virtual_tokens_pattern": {r"1\.(self_attn|attn)": 7}},
}
both_kinds = pytest.mark.parametrize("name", ["llama", "gpt2"])
implementations = pytest.mark.parametrize("implementation", ["sdpa", "eager"])
either_way = pytest.mark.parametrize("length", [None, 9], ids=["loaded", "prepared"])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def saved(name, tmp_path_factory):
    """Directories of trained adapters for one architecture."""
    directories = {}
    for seed, (adapter, settings) in enumerate(ADAPTERS.items()):
        directories[adapter] = tmp_path_factory.mktemp(f"{name}-{adapter}")
        model = add_prefix(build_model(name), projection_dim=8, **settings)
        perturb(model, seed=seed)
        model.save_pretrained(directories[adapter])
    return directories


def load(name, directory, implementation="sdpa", length=None, **kwargs) -> PeftModel:
    model = PeftModel.from_pretrained(build_model(name, implementation), directory, **kwargs)
    if length is not None:
        prepare_model_for_compiled_hotswap(model, num_virtual_tokens=length)
    return model


def generate(model) -> torch.Tensor:
    rows, mask = pad_rows(draw_tokens(), [7, 4], "left")
    return model.generate(input_ids=rows, attention_mask=mask, max_new_tokens=8, do_sample=False)


def list_slots(model) -> list[PrefixSlot]:
    return [module for module in model.modules() if isinstance(module, PrefixSlot)]


@implementations
@either_way
def test_a_swap_equals_loading(name, saved, implementation, length):
    model = load(name, saved["mlp"], implementation, length)
    for adapter in [*ADAPTERS, "mlp"]:
        hotswap_adapter(model, str(saved[adapter]), "default")
        fresh = load(name, saved[adapter], implementation)
        if length is None:
            assert torch.equal(run(model), run(fresh))
        else:
            assert_close(run(model), run(fresh), atol=2e-5, rtol=1e-4)
        assert torch.equal(generate(model), generate(fresh))
        assert model.peft_config["default"].num_virtual_tokens == fresh.peft_config["default"].num_virtual_tokens


@either_way
def test_swapping_back_gives_the_same_bits(name, saved, length):
    model = load(name, saved["mlp"], length=length)
    before = run(model)
    for adapter in ("long", "short", "mlp"):
        hotswap_adapter(model, str(saved[adapter]), "default")
        assert torch.equal(run(model), before) == (adapter == "mlp")


def test_preparing_changes_no_output(name, saved):
    model = load(name, saved["uneven"])
    before = run(model)
    prepare_model_for_compiled_hotswap(model)
    assert [slot.num_virtual_tokens for slot in list_slots(model)] == [3, 7]
    assert_close(run(model), before, atol=1e-5, rtol=1e-4)
    prepare_model_for_compiled_hotswap(model, num_virtual_tokens=12)
    assert [slot.num_virtual_tokens for slot in list_slots(model)] == [12, 12]
    assert_close(run(model), before, atol=1e-5, rtol=1e-4)


def test_a_slot_keeps_its_tensors(name, saved):
    model = load(name, saved["mlp"], length=9)
    pointers = [tensor.data_ptr() for slot in list_slots(model) for tensor in slot.buffers()]
    hotswap_adapter(model, str(saved["short"]), "default")
    assert [tensor.data_ptr() for slot in list_slots(model) for tensor in slot.buffers()] == pointers


def test_adapters_of_one_recipe_are_swapped_in_place(name, saved, tmp_path):
    other = add_prefix(build_model(name), projection_dim=8, prefix_init_token_ids=[1, 2, 3, 4, 5])
    perturb(other, seed=9)
    other.save_pretrained(tmp_path)
    model = load(name, saved["mlp"])
    pointers = {key: parameter.data_ptr() for key, parameter in named_prefix_parameters(model).items()}
    hotswap_adapter(model, str(tmp_path), "default")
    assert {key: parameter.data_ptr() for key, parameter in named_prefix_parameters(model).items()} == pointers
    assert torch.equal(run(model), run(load(name, tmp_path)))


def compile_and_run(model) -> torch.nn.Module:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(draw_tokens())
    return compiled


@pytest.mark.slow
@torch.no_grad()
def test_a_prepared_model_is_compiled_once(name, saved):
    compiled = compile_and_run(load(name, saved["mlp"], length=9))
    for adapter in [*ADAPTERS, "mlp"]:
        hotswap_adapter(compiled, str(saved[adapter]), "default")
        with torch.compiler.set_stance("fail_on_recompile"):
            logits = compiled(draw_tokens()).logits
        assert_close(logits, run(load(name, saved[adapter])), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_model_that_was_not_prepared_is_compiled_again(name, saved):
    compiled = compile_and_run(load(name, saved["mlp"]))
    hotswap_adapter(compiled, str(saved["short"]), "default")
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompil"):
        compiled(draw_tokens())
    assert_close(compiled(draw_tokens()).logits, run(load(name, saved["short"])), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_generation_with_a_compiled_forward_is_compiled_once(name, saved):
    model = load(name, saved["mlp"], length=9)
    torch.compiler.reset()
    model.get_base_model().compile(backend="eager", dynamic=True)
    generate(model)
    for adapter in ("long", "short"):
        hotswap_adapter(model, str(saved[adapter]), "default")
        with torch.compiler.set_stance("fail_on_recompile"):
            tokens = generate(model)
        assert torch.equal(tokens, generate(load(name, saved[adapter])))


@either_way
@pytest.mark.parametrize("adapter", ["short", "uneven", "long"])
def test_what_is_saved_after_a_swap_is_the_new_adapter(name, saved, adapter, length, tmp_path):
    model = load(name, saved["mlp"], length=length)
    hotswap_adapter(model, str(saved[adapter]), "default")
    model.save_pretrained(tmp_path)
    assert torch.equal(run(load(name, tmp_path)), run(load(name, saved[adapter])))
    config, written = (json.loads((d / "adapter_config.json").read_text()) for d in (saved[adapter], tmp_path))
    assert written == config | ({} if length is None else {"projection": "none"})
    weights = load_file(tmp_path / "adapter_model.safetensors")
    lengths = {tensor.shape[1] for key, tensor in weights.items() if key.endswith("anchor_keys")}
    assert lengths == {written["num_virtual_tokens"], *written["num_virtual_tokens_pattern"].values()}


def test_the_state_of_a_slot_can_be_loaded_into_another(name, saved):
    model, other = load(name, saved["long"], length=9), load(name, saved["short"], length=10)
    other.load_state_dict(model.state_dict())
    for slot, source in zip(list_slots(other), list_slots(model), strict=True):
        assert torch.equal(slot().keys[:, :, 2:], source().keys[:, :, 1:])
        assert torch.equal(slot().values[:, :, 2:], source().values[:, :, 1:])
        assert slot().mask.tolist() == [[False] * 2 + [True] * 8]
    too_short = load(name, saved["short"], length=3)
    with pytest.raises(RuntimeError, match="room for 3 virtual tokens, not for 8"):
        too_short.load_state_dict(model.state_dict())


def test_folding_disabling_and_unloading_work_with_slots(name, saved):
    model = load(name, saved["mlp"], length=9)
    hotswap_adapter(model, str(saved["short"]), "default")
    expected = run(model)
    model.fold_prefix()
    assert torch.equal(run(model), expected) and list_slots(model)
    with model.disable_adapter():
        assert torch.equal(run(model), build_model(name)(draw_tokens()).logits)
    twin = copy.deepcopy(model)
    hotswap_adapter(model, str(saved["long"]), "default")
    assert torch.equal(run(twin), expected) and not torch.equal(run(model), expected)
    assert torch.equal(model.unload()(draw_tokens()).logits, build_model(name)(draw_tokens()).logits)


def test_a_slot_is_not_trained_and_has_no_dropout(name, saved):
    model = load(name, saved["random"], length=9, is_trainable=True)
    hotswap_adapter(model, str(saved["random"]), "default")
    assert not named_prefix_parameters(model)
    layer = next(module for module in model.modules() if isinstance(module, PrefixPlusLayer)).train()
    states = layer.get_prefix_states(["default"], 4)
    assert states.mask.tolist() == [[False] * 3 + [True] * 6]
    assert model.peft_config["default"].prefix_dropout == 0.5


def test_what_is_trained_stays_trained(name, saved):
    model = load(name, saved["mlp"], is_trainable=True)
    hotswap_adapter(model, str(saved["random"]), "default")
    assert all(parameter.requires_grad for parameter in named_prefix_parameters(model).values())
    assert not model.peft_config["default"].inference_mode
    frozen = load(name, saved["mlp"])
    hotswap_adapter(frozen, str(saved["short"]), "default")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    model.train()
    draws = [
        layer.get_prefix_states(["default"], 4).mask
        for layer in model.modules()
        if hasattr(layer, "prefix_plus_dropout")
    ]
    assert all(mask is not None for mask in draws)


@either_way
def test_only_the_named_adapter_is_swapped(name, saved, length, tmp_path):
    model = load(name, saved["mlp"])
    add_second(model, "other")
    perturb(model, seed=7)
    if length is not None:
        prepare_model_for_compiled_hotswap(model, num_virtual_tokens=length)
    before = {adapter: run(model, adapter) for adapter in ("default", "other")}
    hotswap_adapter(model, str(saved["long"]), "other")
    assert torch.equal(run(model, "default"), before["default"])
    assert not torch.equal(run(model, "other"), before["other"])
    fresh = load(name, saved["long"])
    assert_close(run(model, "other"), run(fresh), atol=2e-5, rtol=1e-4)
    hotswap_adapter(model, str(saved["mlp"]), "default")
    fresh.load_adapter(saved["mlp"], "second")
    assert_close(run(model, ["default", "other"]), run(fresh, ["second", "default"]), atol=2e-5, rtol=1e-4)


@either_way
def test_an_inactive_and_a_disabled_adapter_can_be_swapped(name, saved, length):
    model = load(name, saved["random"], length=length)
    model.load_adapter(saved["random"], "other")
    base = build_model(name)(draw_tokens()).logits
    hotswap_adapter(model, str(saved["mlp"]), "other")
    assert_close(run(model), run(load(name, saved["random"])), atol=2e-5, rtol=1e-4)
    with model.disable_adapter():
        hotswap_adapter(model, str(saved["mlp"]), "default")
        assert torch.equal(run(model), base)
    assert_close(run(model, "default"), run(load(name, saved["mlp"])), atol=2e-5, rtol=1e-4)
    assert_close(run(model, "other"), run(load(name, saved["mlp"])), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_slots_take_part_in_mixed_batches(name, saved):
    model = load(name, saved["mlp"], length=9)
    model.load_adapter(saved["uneven"], "other")
    hotswap_adapter(model, str(saved["short"]), "default")
    ids, rows = draw_tokens(3), ["default", "other", "__base__"]
    mixed = model(ids, adapter_names=rows).logits
    assert_close(mixed[0], load(name, saved["short"])(ids).logits[0], atol=2e-5, rtol=1e-4)
    assert_close(mixed[1], load(name, saved["uneven"])(ids).logits[1], atol=2e-5, rtol=1e-4)
    assert_close(mixed[2], build_model(name)(ids).logits[2], atol=2e-5, rtol=1e-4)


@either_way
def test_adapters_that_transformers_has_loaded_are_swapped(name, saved, length):
    model = build_model(name)
    model.load_adapter(str(saved["mlp"]))
    if length is not None:
        prepare_model_for_compiled_hotswap(model, num_virtual_tokens=length)
    hotswap_adapter(model, str(saved["long"]), "default")
    with torch.no_grad():
        logits = model(draw_tokens()).logits
    assert_close(logits, run(load(name, saved["long"])), atol=2e-5, rtol=1e-4)


@either_way
@pytest.mark.parametrize("order", [["lora", "prefix"], ["prefix", "lora"]], ids="-".join)
@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_a_prefix_beside_lora_is_swapped(order, length, tmp_path):
    """Each method has a wrapper of its own; any of them will do."""
    for seed, directory in enumerate(("first", "second")):
        model = add_prefix(build_model("llama"), prefix_init_token_ids=list(range(5, 8 + seed)))
        model.save_pretrained(tmp_path / directory)

    def build(directory):
        base, wrappers = build_model("llama"), {}
        for kind in order:
            torch.manual_seed(4)
            if kind == "prefix":
                wrappers[kind] = PeftModel.from_pretrained(base, tmp_path / directory, adapter_name="prefix")
            else:
                config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
                wrappers[kind] = get_peft_model(base, config, adapter_name="lora").eval()
        return wrappers

    expected = build("second")["lora"](draw_tokens()).logits
    for kind in order:
        wrappers = build("first")
        if length is not None:
            prepare_model_for_compiled_hotswap(wrappers[kind], num_virtual_tokens=length)
        hotswap_adapter(wrappers[kind], str(tmp_path / "second"), "prefix")
        assert_close(wrappers["lora"](draw_tokens()).logits, expected, atol=2e-5, rtol=1e-4)
        assert wrappers["prefix"].peft_config["prefix"].num_virtual_tokens == 4


@either_way
def test_other_saved_modules_are_swapped(length, tmp_path):
    for seed, directory in enumerate(("first", "second")):
        model = add_prefix(build_model("llama"), modules_to_save=["norm"], projection_dim=8)
        perturb(model, seed=seed)
        with torch.no_grad():
            model.get_base_model().model.norm.modules_to_save["default"].weight *= seed + 2
        model.save_pretrained(tmp_path / directory)
    model = load("llama", tmp_path / "first", length=length)
    hotswap_adapter(model, str(tmp_path / "second"), "default")
    assert_close(run(model), run(load("llama", tmp_path / "second")), atol=2e-5, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(run(model), build_model("llama")(draw_tokens()).logits)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_the_step_of_embeddings_comes_with_the_weights(projection, tmp_path):
    expected = run(save(tmp_path / "first", projection=projection, embedding_step=1.0))
    model = add_prefix(build_model("llama"), projection=projection)
    hotswap_adapter(model, str(tmp_path / "first"), "default")
    assert torch.equal(run(model), expected)
    model.fold_prefix()
    assert_close(run(model), expected)


def test_an_offloaded_adapter_is_swapped_as_a_whole(tmp_path):
    expected = run(save(tmp_path, prefix_init_token_ids=[7, 8, 9, 4, 5]))
    model = add_prefix(build_model("llama"))
    perturb(model, seed=5)
    cpu_offload(model, execution_device=torch.device("cpu"))
    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(run(model), expected)


def test_an_offloaded_head_is_refused(tmp_path):
    save(tmp_path, modules_to_save=["norm"])
    model = add_prefix(build_model("llama"), modules_to_save=["norm"])
    cpu_offload(model, execution_device=torch.device("cpu"))
    before = run(model)
    with pytest.raises(ValueError, match=r"norm.*is offloaded"):
        hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(run(model), before)


def test_another_adapter_starts_where_a_prepared_one_did():
    model = add_prefix(build_model("llama"))
    expected = run(model)
    prepare_model_for_compiled_hotswap(model, num_virtual_tokens=9)
    model.add_adapter("twin", model.peft_config["default"])
    assert_close(run(model, "twin"), expected)


@pytest.mark.parametrize("model_type", ["bloom", "ctrl", "ministral3", "mpt", "gptj", "bart"])
@either_way
@torch.no_grad()
def test_every_way_to_know_positions_survives_a_swap(model_type, length, tmp_path):
    """Linear biases, absolute positions without a table, and several tables: the visible tokens keep their places."""

    def build():
        return build_zoo_model("causal", model_type)

    for seed, size in enumerate((5, 3)):
        model = add_prefix(build(), prefix_init_token_ids=list(range(4, 4 + size)), projection_dim=8)
        perturb(model, seed=seed)
        model.save_pretrained(tmp_path / str(size))
    model = PeftModel.from_pretrained(build(), tmp_path / "5")
    if length is not None:
        prepare_model_for_compiled_hotswap(model, num_virtual_tokens=length)
    hotswap_adapter(model, str(tmp_path / "3"), "default")
    ids, mask = pad_rows(draw_tokens() % 60 + 3, [7, 4], "left")
    fresh = PeftModel.from_pretrained(build(), tmp_path / "3")
    given, expected = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (model, fresh))
    assert_close(given, expected, atol=5e-5, rtol=1e-4)


def change_config(directory, **fields) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def copy_saved(saved, adapter, tmp_path):
    return shutil.copytree(saved[adapter], tmp_path / "changed")


def refuse(model, directory, match, adapter="default", error=ValueError) -> None:
    """A swap must fail, and leave everything as it was."""
    snapshot, configs = Snapshot(model), {name: config.to_dict() for name, config in model.peft_config.items()}
    with pytest.raises(error, match=match):
        hotswap_adapter(model, str(directory), adapter)
    snapshot.assert_unchanged(model)
    assert {name: config.to_dict() for name, config in model.peft_config.items()} == configs


@either_way
@pytest.mark.parametrize(
    ("change", "match"), [(lose_one, "anchor_keys"), (add_foreign, r"layers\.9"), (put_nan, "not finite")]
)
def test_weights_that_do_not_fit_are_refused(name, saved, change, match, length, tmp_path):
    directory = copy_saved(saved, "short", tmp_path)
    rewrite_weights(directory, change)
    refuse(load(name, saved["mlp"], length=length), directory, match)


@either_way
def test_other_modules_are_refused(saved, name, length, tmp_path):
    model = add_prefix(build_model(name), layers_to_transform=[1])
    model.save_pretrained(tmp_path / "fewer")
    loaded = load(name, saved["mlp"], length=length)
    refuse(loaded, tmp_path / "fewer", r"other attention modules.* 0 more, 1 fewer, for instance '\S*\.0\.")
    refuse(load(name, tmp_path / "fewer"), saved["mlp"], "other attention modules.* 1 more, 0 fewer")


@either_way
def test_another_base_model_is_refused(length, tmp_path):
    save(tmp_path / "one")
    add_prefix(build_model("llama", num_key_value_heads=4)).save_pretrained(tmp_path / "other")
    refuse(load("llama", tmp_path / "one", length=length), tmp_path / "other", "base model")


@either_way
def test_other_saved_modules_of_another_kind_are_refused(length, tmp_path):
    save(tmp_path / "plain")
    save(tmp_path / "norm", modules_to_save=["norm"])
    refuse(load("llama", tmp_path / "plain", length=length), tmp_path / "norm", "norm.*same `modules_to_save`")
    refuse(load("llama", tmp_path / "norm", length=length), tmp_path / "plain", "norm.*same `modules_to_save`")


def test_an_adapter_that_is_longer_than_the_slot_is_refused(name, saved):
    refuse(load(name, saved["mlp"], length=7), saved["long"], "8 virtual tokens .*prepared for 7.*at least 8")


@either_way
def test_an_adapter_of_another_method_is_refused(saved, name, length, tmp_path):
    targets = ["q_proj"] if name == "llama" else ["c_attn"]
    lora = get_peft_model(build_model(name), LoraConfig(target_modules=targets, fan_in_fan_out=name == "gpt2"))
    lora.save_pretrained(tmp_path)
    refuse(load(name, saved["mlp"], length=length), tmp_path, "LORA.*peft.utils.hotswap")
    refuse(lora, saved["mlp"], "LORA.*peft.utils.hotswap")


def test_missing_files_and_names_are_refused(name, saved, tmp_path):
    model = load(name, saved["mlp"])
    refuse(model, tmp_path / "nowhere", "nowhere")
    directory = copy_saved(saved, "short", tmp_path)
    (directory / "adapter_model.safetensors").unlink()
    refuse(model, directory, "adapter_model.safetensors")
    refuse(model, saved["short"], "no adapter 'other'; the model has default", adapter="other")
    with pytest.raises(ValueError, match="has no adapters"):
        hotswap_adapter(build_model(name), str(saved["mlp"]), "default")


def test_a_damaged_file_is_refused(name, saved, tmp_path):
    directory = copy_saved(saved, "short", tmp_path)
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refuse(load(name, saved["mlp"]), directory, "complete safetensors file")


def test_a_subfolder_is_read(name, saved, tmp_path):
    shutil.copytree(saved["short"], tmp_path / "repository" / "inside")
    model = load(name, saved["mlp"])
    hotswap_adapter(model, str(tmp_path / "repository"), "default", torch_device="cpu", subfolder="inside")
    assert torch.equal(run(model), run(load(name, saved["short"])))


@pytest.mark.slow
@in_client
def test_an_adapter_is_swapped_in_from_the_hub(tmp_path):
    save(tmp_path / "first")
    save(tmp_path / "second", prefix_init_token_ids=[3, 9, 4], projection="none")
    files = {f"inside/{path.name}": path.read_bytes() for path in (tmp_path / "second").iterdir()}
    repo_id = f"{OWNER}/swapped"
    get_hub().put(repo_id, files, private=True)
    model = load("llama", tmp_path / "first")
    before = run(model)
    with pytest.raises(ValueError, match="Can't find 'adapter_config"):
        hotswap_adapter(model, repo_id, "default", subfolder="inside", token=STRANGER_TOKEN)
    assert torch.equal(run(model), before)
    hotswap_adapter(model, repo_id, "default", subfolder="inside", token=TOKEN, revision="main")
    assert torch.equal(run(model), run(load("llama", tmp_path / "second")))


def test_preparing_refuses_what_cannot_be_prepared(name, saved):
    model = load(name, saved["long"])
    with pytest.raises(ValueError, match="`num_virtual_tokens` is 7, but an adapter of the model has 8"):
        prepare_model_for_compiled_hotswap(model, num_virtual_tokens=7)
    with pytest.raises(ValueError, match="no PrefixPlus adapter"):
        prepare_model_for_compiled_hotswap(build_model(name))
    with pytest.raises(ValueError, match="'error', 'warn' or 'ignore', got 'shout'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="shout")
    for compiled in (torch.compile(model), load(name, saved["long"])):
        if compiled is not model and not hasattr(compiled, "_orig_mod"):
            compiled.get_base_model().compile()
        with pytest.raises(ValueError, match="compiled already"):
            prepare_model_for_compiled_hotswap(compiled)
        with pytest.warns(UserWarning, match="compiled already"):
            prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
        prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore", num_virtual_tokens=9)


def test_adapters_that_train_rows_of_embeddings_are_refused(tmp_path):
    add_prefix(build_model("llama")).save_pretrained(tmp_path)
    model = add_prefix(build_model("llama"), trainable_token_indices=[11, 23])
    with pytest.raises(ValueError, match="cannot be hot-swapped"):
        hotswap_adapter(model, str(tmp_path), "default")
