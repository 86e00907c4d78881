"""Folding: the projection goes, the outputs stay, in a model and on disk."""

import json
import shutil

import pytest
import torch
from helpers import add_prefix, draw_tokens, named_prefix_parameters, perturb
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build_model
from torch.testing import assert_close

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.encoders import PROJECTIONS, DirectPrefix, PrefixEncoder
from peft_prefix_plus.folding import fold_adapter

projections = pytest.mark.parametrize("projection", PROJECTIONS)


def build_pair() -> PeftModel:
    """A model with the adapters `default` (mlp, active) and `other` (linear)."""
    model = add_prefix(build_model("llama"), projection="mlp", num_frozen_tokens=1)
    config = PrefixPlusConfig(task_type="CAUSAL_LM", projection="linear", prefix_init_token_ids=[3, 4, 6])
    model.add_adapter("other", config)
    perturb(model)
    return model.eval()


@torch.no_grad()
def run(model: PeftModel, adapters: str | list[str] = "default") -> torch.Tensor:
    model.base_model.set_adapter(adapters)
    return model.base_model(draw_tokens()).logits


def list_encoders(model: PeftModel, name: str) -> list[PrefixEncoder]:
    return [module.prefix_plus_encoder[name] for module in model.modules() if "prefix_plus_encoder" in module._modules]


@pytest.mark.parametrize(
    ("argument", "folded"),
    [
        (None, ["default", "other"]),
        ("default", ["default"]),
        (["other"], ["other"]),
        (["other", "default"], ["default", "other"]),
        ([], []),
    ],
    ids=str,
)
def test_the_named_adapters_are_folded_and_all_outputs_stay(argument, folded):
    model = build_pair()
    expected = {str(names): run(model, names) for names in ("default", "other", ["other", "default"])}
    model.fold_prefix(argument)
    for name, projection in (("default", "mlp"), ("other", "linear")):
        assert model.peft_config[name].projection == ("none" if name in folded else projection)
        assert all((type(encoder) is DirectPrefix) is (name in folded) for encoder in list_encoders(model, name))
    for names in ("default", "other", ["other", "default"]):
        assert torch.equal(run(model, names), expected[str(names)])


@projections
def test_folding_twice_changes_nothing(projection):
    model = add_prefix(build_model("llama"), projection=projection)
    perturb(model)
    expected = run(model)
    model.fold_prefix()
    model.fold_prefix("default")
    assert torch.equal(run(model), expected)


def test_the_users_config_keeps_its_projection():
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(build_model("llama"), config)
    model.fold_prefix()
    assert config.projection == "linear" and model.active_peft_config.projection == "none"


@pytest.mark.parametrize("names", ["nope", ["default", "nope"]])
def test_an_unknown_adapter_raises_before_anything_is_folded(names):
    model = build_pair()
    with pytest.raises(ValueError, match=r"no prefix 'nope'; the model has default, other"):
        model.fold_prefix(names)
    assert model.peft_config["default"].projection == "mlp"
    assert not any(type(encoder) is DirectPrefix for encoder in list_encoders(model, "default"))


def test_a_folded_prefix_trains_on_with_its_frozen_tokens():
    model = build_pair()
    model.fold_prefix()
    run(model)
    before = [encoder().keys.detach().clone() for encoder in list_encoders(model, "default")]
    optimizer = torch.optim.SGD([p for p in named_prefix_parameters(model).values() if p.requires_grad], lr=0.1)
    ids = draw_tokens()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for encoder, keys in zip(list_encoders(model, "default"), before, strict=True):
        assert torch.equal(encoder().keys[..., :1, :], keys[..., :1, :])
        assert not torch.equal(encoder().keys[..., 1:, :], keys[..., 1:, :])


def test_folding_keeps_what_trains_and_what_does_not():
    model = build_pair()
    model.fold_prefix()
    assert all(
        parameter.requires_grad is (".default." in key) for key, parameter in named_prefix_parameters(model).items()
    )
    assert all(not parameter.requires_grad for key, parameter in model.named_parameters() if "prefix_plus" not in key)


def test_a_loaded_model_can_be_folded(tmp_path):
    model = add_prefix(build_model("gpt2"))
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("gpt2"), tmp_path)
    loaded.fold_prefix()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(run(loaded), run(model))


# On disk


@pytest.fixture
def adapter_dir(tmp_path):
    build_pair().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@projections
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_folding_on_disk_equals_folding_in_the_model(name, projection, tmp_path):
    settings = {"num_virtual_tokens_pattern": {r".*\.0\..*": 3}, "num_virtual_tokens": 5, "num_frozen_tokens": 2}
    model = add_prefix(build_model(name), projection=projection, projection_dim=7, **settings)
    perturb(model)
    expected = run(model)
    model.save_pretrained(tmp_path / "saved")
    model.fold_prefix()
    model.save_pretrained(tmp_path / "in-model")
    path = fold_adapter(str(tmp_path / "saved"), str(tmp_path / "on-disk"))
    assert path == str(tmp_path / "on-disk" / "adapter_model.safetensors")
    ours, theirs = load_file(path), load_file(tmp_path / "in-model" / "adapter_model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    configs = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("on-disk", "in-model")]
    assert configs[0] == configs[1] and configs[0]["projection"] == "none"
    loaded = PeftModel.from_pretrained(build_model(name), tmp_path / "on-disk")
    assert torch.equal(run(loaded), expected)


def test_folding_on_disk_leaves_the_adapter_alone(adapter_dir, tmp_path):
    before = {path.name: path.read_bytes() for path in adapter_dir.iterdir() if path.is_file()}
    fold_adapter(str(adapter_dir), str(tmp_path / "deep" / "folded"))
    assert {path.name: path.read_bytes() for path in adapter_dir.iterdir() if path.is_file()} == before
    card = (tmp_path / "deep" / "folded" / "README.md").read_text()
    assert "- Projection: `none`\n" in card and "- Projection: `mlp`" in before["README.md"].decode()


def test_folding_on_disk_keeps_a_card_that_is_there(adapter_dir, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n\nprecious\n")
    fold_adapter(str(adapter_dir), str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "# Mine\n\nprecious\n" in card and "- Projection: `none`\n" in card


def test_other_saved_modules_are_kept(tmp_path):
    model = add_prefix(build_model("llama"), modules_to_save=["norm"])
    perturb(model)
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["default"].weight *= 2
    model.save_pretrained(tmp_path / "saved")
    fold_adapter(str(tmp_path / "saved"), str(tmp_path / "folded"))
    assert torch.equal(run(PeftModel.from_pretrained(build_model("llama"), tmp_path / "folded")), run(model))


def test_one_directory_for_both_raises(adapter_dir):
    with pytest.raises(ValueError, match="directory of its own") as raised:
        fold_adapter(str(adapter_dir), str(adapter_dir / "." / "..") + "/saved/")
    assert "saved" in str(raised.value)


def test_a_link_to_the_directory_raises(adapter_dir, tmp_path):
    (tmp_path / "link").symlink_to(adapter_dir, target_is_directory=True)
    before = {path.name: path.read_bytes() for path in adapter_dir.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="directory of its own"):
        fold_adapter(str(adapter_dir), str(tmp_path / "link"))
    assert {path.name: path.read_bytes() for path in adapter_dir.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(missing, adapter_dir, tmp_path):
    (adapter_dir / missing).unlink()
    with pytest.raises(ValueError, match=f"no .*{missing}; expected the directory of a saved adapter"):
        fold_adapter(str(adapter_dir), str(tmp_path / "folded"))
    assert not (tmp_path / "folded").exists()


def test_a_truncated_file_is_named(adapter_dir, tmp_path):
    path = adapter_dir / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a complete"):
        fold_adapter(str(adapter_dir), str(tmp_path / "folded"))


def test_an_adapter_of_another_method_raises(tmp_path):
    model = get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"LORA; only PrefixPlus can be folded"):
        fold_adapter(str(tmp_path / "lora"), str(tmp_path / "folded"))


def drop(weights: dict, ending: str) -> None:
    del weights[next(key for key in weights if key.endswith(ending))]


@pytest.mark.parametrize(
    "damage",
    [
        lambda weights: drop(weights, "anchor_keys"),
        lambda weights: drop(weights, "hidden_bias"),
        lambda weights: weights.update({key: own[..., :-1].clone() for key, own in weights.items() if own.dim()}),
        lambda weights: weights.update({next(iter(weights)).rpartition(".")[0] + ".surplus": torch.zeros(1)}),
    ],
    ids=["no-anchor", "no-bias", "cut", "surplus"],
)
def test_weights_that_do_not_fit_the_configuration_name_the_module(damage, adapter_dir, tmp_path):
    path = adapter_dir / "adapter_model.safetensors"
    weights = load_file(path)
    damage(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.\d\.self_attn do not fit the adapter's configuration"):
        fold_adapter(str(adapter_dir), str(tmp_path / "folded"))
    assert not (tmp_path / "folded").exists()


def test_an_adapter_without_a_readme_is_folded(adapter_dir, tmp_path):
    (adapter_dir / "README.md").unlink()
    fold_adapter(str(adapter_dir), str(tmp_path / "folded"))
    shutil.rmtree(adapter_dir)
    PeftModel.from_pretrained(build_model("llama"), tmp_path / "folded")


def test_files_of_different_adapters_are_not_folded(tmp_path):
    add_prefix(build_model("llama")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"num_virtual_tokens": 5', '"num_virtual_tokens": 4'))
    with pytest.raises(ValueError, match="different adapters"):
        fold_adapter(str(tmp_path), str(tmp_path / "folded"))
    assert not (tmp_path / "folded").exists()


def test_a_pattern_that_begins_at_the_model_is_read_from_there(tmp_path):
    model = add_prefix(build_model("llama"), num_virtual_tokens_pattern={r"^model\.layers\.0\.self_attn": 2})
    perturb(model)
    expected = run(model)
    model.save_pretrained(tmp_path / "saved")
    fold_adapter(str(tmp_path / "saved"), str(tmp_path / "folded"))
    assert_close(run(PeftModel.from_pretrained(build_model("llama"), tmp_path / "folded")), expected)
