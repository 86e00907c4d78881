"""Offloaded, dispatched and empty base models: the prefix is that of the whole model, and lives where it is used."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from helpers import INIT_TOKEN_IDS, add_prefix, add_second, draw_tokens, named_prefix_parameters, perturb, run, save
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_models import build_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer
from peft_prefix_plus.architectures.devices import find_device, find_missing_weights
from peft_prefix_plus.capture import CaptureError

CPU, META = torch.device("cpu"), torch.device("meta")
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "cpu",
}
PEFT_DEVICE_MAP = {f"base_model.model.{name}": device for name, device in DEVICE_MAP.items()}

# How a model gets its place, and the architecture.
PLACES = [
    ("cpu_offload", "llama"),
    ("cpu_offload", "gpt2"),
    ("disk_offload", "llama"),
    ("disk_offload", "gpt2"),
    ("dispatch_model", "llama"),
    ("from_pretrained", "llama"),
]
places = pytest.mark.parametrize(("place", "name"), PLACES)


def build_offloaded(place: str, name: str, directory: Path) -> PreTrainedModel:
    """The model of `build_model`, most of whose weights are on the meta device between forwards."""
    model = build_model(name)
    if place == "cpu_offload":
        return cpu_offload(model, CPU)
    if place == "disk_offload":
        return disk_offload(model, directory / "offload", CPU)
    if place == "dispatch_model":
        return dispatch_model(model, DEVICE_MAP, offload_dir=directory / "offload")
    model.save_pretrained(directory / "base")
    return AutoModelForCausalLM.from_pretrained(
        directory / "base", device_map=DEVICE_MAP, offload_folder=directory / "offload"
    )


def build_empty(name: str = "llama") -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        return build_model(name)


def count_offloaded(model: nn.Module) -> int:
    return sum(parameter.device == META for parameter in model.parameters())


def list_prefix_devices(model: nn.Module) -> set[torch.device]:
    encoders = [module.prefix_plus_encoder for module in model.modules() if isinstance(module, PrefixPlusLayer)]
    return {tensor.device for encoder in encoders for tensor in encoder.state_dict().values()}


@places
def test_a_prefix_made_on_an_offloaded_model_is_that_of_the_whole_model(place, name, tmp_path):
    expected, base = add_prefix(build_model(name)), build_offloaded(place, name, tmp_path)
    num_offloaded = count_offloaded(base)
    assert num_offloaded > 0
    torch.manual_seed(0)
    model = add_prefix(base)
    assert list_prefix_devices(model) == {CPU}
    given = model.state_dict()
    for key, tensor in expected.state_dict().items():
        if ".anchor_" in key or ".scale_" in key:
            assert torch.equal(given[key], tensor)
    perturb(model)
    perturb(expected)
    expected.load_state_dict({key: given[key] for key in given if "prefix_plus" in key}, strict=False)
    assert torch.equal(run(model), run(expected))
    tokens = [m.generate(input_ids=draw_tokens(), max_new_tokens=4, do_sample=False) for m in (model, expected)]
    assert torch.equal(*tokens)
    assert count_offloaded(model) == num_offloaded


@places
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_on_an_offloaded_model_has_the_same_gradients(place, name, checkpointing, tmp_path):
    gradients = []
    for base in (build_model(name), build_offloaded(place, name, tmp_path)):
        torch.manual_seed(0)
        model = add_prefix(base).train()
        perturb(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=draw_tokens(), labels=draw_tokens()).loss.backward()
        gradients.append({key: p.grad for key, p in named_prefix_parameters(model).items()})
    assert all(torch.allclose(gradients[1][key], given, atol=1e-7) for key, given in gradients[0].items())


@places
def test_adapters_come_and_go_on_an_offloaded_model(place, name, tmp_path):
    whole = build_model(name)
    bare = whole(draw_tokens()).logits.detach()
    expected = add_prefix(whole)
    add_second(expected)
    model = add_prefix(build_offloaded(place, name, tmp_path))
    add_second(model)
    for adapters in ("default", "other", ["default", "other"]):
        assert torch.equal(run(model, adapters), run(expected, adapters))
    model.delete_adapter("other")
    assert torch.equal(run(model, "default"), run(expected, "default"))
    base = model.unload()
    assert not any(isinstance(module, PrefixPlusLayer) for module in base.modules())
    with torch.no_grad():
        assert torch.equal(base(draw_tokens()).logits, bare)
    assert count_offloaded(base) > 0


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("place", "name"), [place for place in PLACES if place[0].endswith("_offload")])
def test_loading_onto_an_offloaded_model(place, name, low_cpu_mem_usage, tmp_path):
    expected = run(save(tmp_path / "adapter", name))
    base = build_offloaded(place, name, tmp_path)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert list_prefix_devices(model) == {CPU}
    assert torch.equal(run(model), expected)
    model.load_adapter(tmp_path / "adapter", "again", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(model, "again"), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_onto_a_model_with_a_device_map_puts_the_prefix_to_the_disk_too(low_cpu_mem_usage, tmp_path):
    expected = run(save(tmp_path / "adapter"))
    base = build_offloaded("from_pretrained", "llama", tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    settings = {"device_map": PEFT_DEVICE_MAP, "offload_folder": tmp_path / "again"}
    before = set(Path(tempfile.gettempdir()).glob("prefix-plus-offload-*"))
    model = PeftModel.from_pretrained(
        base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=False, **settings
    )
    on_disk = [key for key, p in named_prefix_parameters(model).items() if p.device == META]
    assert on_disk and all(".layers.1." in key for key in on_disk)
    assert torch.equal(run(model), expected)
    model.load_adapter(tmp_path / "adapter", "again", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(model, "again"), expected)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    assert torch.equal(run(PeftModel.from_pretrained(build_model("llama"), tmp_path / "saved")), expected)
    assert {path: path.read_bytes() for path in (tmp_path / "base").iterdir()} == files
    del model, base
    gc.collect()
    assert set(Path(tempfile.gettempdir()).glob("prefix-plus-offload-*")) <= before


def test_the_loader_of_transformers_is_refused_where_it_would_lose_weights(tmp_path):
    save(tmp_path / "adapter")
    model = build_offloaded("from_pretrained", "llama", tmp_path)
    expected = run_bare(model)
    with pytest.raises(ValueError, match=r"offloaded to the disk.*PeftModel\.from_pretrained"):
        model.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(run_bare(model), expected)


@torch.no_grad()
def run_bare(model: nn.Module) -> torch.Tensor:
    return model(draw_tokens()).logits


@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload", "dispatch_model"])
@pytest.mark.parametrize("projection", ["none", "mlp"])
def test_a_model_can_be_offloaded_together_with_its_prefix(place, projection, tmp_path):
    model = add_prefix(build_model("llama"), projection=projection)
    perturb(model)
    expected = run(model)
    if place == "cpu_offload":
        cpu_offload(model, CPU)
    elif place == "disk_offload":
        disk_offload(model, tmp_path / "offload", CPU)
    else:
        dispatch_model(model, PEFT_DEVICE_MAP, offload_dir=tmp_path / "offload")
    assert any(parameter.device == META for parameter in named_prefix_parameters(model).values())
    assert torch.equal(run_bare(model), expected)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(run(PeftModel.from_pretrained(build_model("llama"), tmp_path / "adapter")), expected)


@pytest.mark.parametrize("prefix_init", ["vocab", "random", "zero", "tokens"])
def test_a_model_without_weights_is_refused(prefix_init):
    model = build_empty()
    given = {"prefix_init_token_ids": INIT_TOKEN_IDS} if prefix_init == "tokens" else {}
    with pytest.raises(
        CaptureError, match=r"21 weights .*model\.embed_tokens\.weight.* meta .*low_cpu_mem_usage=True"
    ):
        add_prefix(model, prefix_init=prefix_init, **given)
    assert not any(isinstance(module, PrefixPlusLayer) for module in model.modules())
    assert not hasattr(model, "peft_config")


def test_a_model_of_which_a_single_weight_is_missing_is_refused():
    model = build_model("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(CaptureError, match=r"1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        add_prefix(model)


def test_low_cpu_mem_usage_gives_an_empty_prefix_to_an_empty_model_as_lora_does():
    lora = get_peft_model(build_empty(), LoraConfig(task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=INIT_TOKEN_IDS)
    model = get_peft_model(build_empty(), config, low_cpu_mem_usage=True)
    assert {p.device for p in lora.parameters()} == {p.device for p in model.parameters()} == {META}
    assert list_prefix_devices(model) == {META}
    assert model(draw_tokens().to("meta")).logits.shape == (2, 7, 96)


def test_the_weights_may_come_after_the_adapter(tmp_path):
    expected = run(save(tmp_path))
    model = PeftModel.from_pretrained(build_empty(), tmp_path, low_cpu_mem_usage=True)
    base = model.get_base_model()
    names = {name.replace(".base_layer", ""): name for name in base.state_dict()}
    weights = build_model("llama").state_dict()
    base.load_state_dict({names[name]: weights[name] for name in weights}, strict=False, assign=True)
    assert torch.equal(run(model), expected)


@pytest.mark.filterwarnings("ignore:.*which is a no-op.*:UserWarning")
def test_without_low_cpu_mem_usage_an_adapter_stays_as_empty_as_its_model(tmp_path):
    save(tmp_path)
    assert list_prefix_devices(PeftModel.from_pretrained(build_empty(), tmp_path)) == {META}


def test_each_prefix_lives_where_its_attention_lives(tmp_path):
    save(tmp_path)
    model = build_model("llama")
    model.model.layers[1].to("meta")
    get_peft_model(model, PeftConfig.from_pretrained(tmp_path))
    devices = [list_prefix_devices(layer) for layer in model.model.layers]
    assert devices == [{CPU}, {META}]


def test_the_device_is_that_of_the_hook_while_weights_are_offloaded():
    linear = nn.Sequential(nn.Linear(2, 2))
    assert find_device(linear) == CPU
    add_hook_to_module(linear[0], AlignDevicesHook(execution_device=CPU, offload=True))
    assert linear[0].weight.device == META
    assert find_device(linear) == CPU and not find_missing_weights(linear)
    add_hook_to_module(linear[0], ModelHook(), append=True)
    assert find_device(linear) == CPU and not find_missing_weights(linear)
    outer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to("meta"))
    add_hook_to_module(outer[0], AlignDevicesHook(execution_device=CPU, offload=True, place_submodules=True))
    assert find_missing_weights(outer) == ["1.weight", "1.bias"]
    assert find_device(outer[1]) == META
