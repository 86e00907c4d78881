"""Whatever is in the files of an adapter: it loads as it was saved, or raises a documented error and changes nothing.

`PREFIX_PLUS_FUZZ_EXAMPLES` sets how many damaged adapters are tried; then the draws are other ones in each run.
"""

import dataclasses
import json
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from adapter_mutations import CONFIG, WEIGHTS, Change, config_changes, resize, weight_changes
from helpers import add_prefix, draw_tokens, perturb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import build_model
from torch import nn
from transformers import PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig

ASKED = os.environ.get("PREFIX_PLUS_FUZZ_EXAMPLES")
NUM_EXAMPLES = int(ASKED or 1800)
SECONDS = 10
GROWTH = 400 * 2**20
TINY = {
    "llama": {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2},
}
KINDS = {
    "mlp": ("llama", {"prefix_init_token_ids": [3, 4, 5], "projection_dim": 5}),
    "none": ("llama", {"prefix_init_token_ids": [3, 4, 5], "projection": "none", "modules_to_save": ["norm"]}),
    "shifted": (
        "gpt2",
        {"prefix_init_token_ids": [3, 4, 5, 6], "projection": "linear", "projection_dim": 5, "num_frozen_tokens": 1},
    ),
}
# Fields that are about training, about the past, or about other libraries.
WITHOUT_EFFECT = {
    # The weights bring it.
    "embedding_step",
    "inference_mode",
    "prefix_dropout",
    "prefix_dropout_mode",
    "prefix_init_text",
    "prefix_init_token_ids",
    "prefix_init_seed",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "revision",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
}


def build_base(name: str) -> PreTrainedModel:
    return build_model(name, **TINY[name])


@dataclasses.dataclass
class Adapter:
    """A good adapter, what it computes, and models to load a damaged copy onto."""

    directory: Path
    base: PreTrainedModel
    occupied: PeftModel
    logits: torch.Tensor
    config: PrefixPlusConfig

    def __post_init__(self) -> None:
        self.base_print, self.occupied_print = Fingerprint(self.base), Fingerprint(self.occupied)


class Fingerprint:
    """Everything of a model that a failure must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = dict(model.state_dict(keep_vars=True))
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.structure = self._describe(model)

    def assert_unchanged(self, model: nn.Module) -> None:
        tensors = dict(model.state_dict(keep_vars=True))
        assert list(tensors) == list(self.tensors)
        assert all(tensor is self.tensors[name] for name, tensor in tensors.items())
        assert all(torch.equal(tensor, self.values[name]) for name, tensor in tensors.items())
        structure = self._describe(model)
        assert structure == self.structure

    @staticmethod
    def _describe(model: nn.Module) -> list:
        described: list = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
        for name, module in model.named_modules():
            config = vars(module).get("config")
            hooks = [
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
                len(module._forward_hooks_with_kwargs),
            ]
            adapters = vars(module).get("peft_config")
            active = [str(vars(module).get(key)) for key in ("_active_adapter", "active_adapter", "_disable_adapters")]
            described.append((name, id(module), type(module), module.training, id(config), hooks, active))
            described.append(
                (None if adapters is None else list(adapters), vars(module).get("_hf_peft_config_loaded"))
            )
            described.append(getattr(config, "_attn_implementation", None))
        return described


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Adapter]:
    made = {}
    for kind, (name, options) in KINDS.items():
        directory = tmp_path_factory.mktemp(kind)
        build_base(name).save_pretrained(directory / "base")
        model = add_prefix(build_base(name), **options)
        perturb(model)
        model.peft_config["default"].base_model_name_or_path = str(directory / "base")
        model.save_pretrained(directory / "adapter", save_embedding_layers=False)
        occupied = PeftModel.from_pretrained(build_base(name), directory / "adapter")
        config = PrefixPlusConfig.from_pretrained(directory / "adapter")
        made[kind] = Adapter(directory / "adapter", build_base(name), occupied, run(model), config)
    return made


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """No example may take much memory; Linux says how much there is."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GROWTH, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


class Hanging(BaseException):
    """Not an `Exception`, which libraries catch."""


def interrupt(*_) -> None:
    raise Hanging


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    return model(draw_tokens()).logits


def load_bare(adapter: Adapter, directory: Path, **options) -> nn.Module:
    return PeftModel.from_pretrained(adapter.base, directory, **options)


def load_by_configuration(adapter: Adapter, directory: Path, **options) -> nn.Module:
    return PeftModel.from_pretrained(adapter.base, directory, config=PeftConfig.from_pretrained(directory), **options)


def load_beside(adapter: Adapter, directory: Path, **options) -> nn.Module:
    adapter.occupied.load_adapter(directory, "other", **options)
    adapter.occupied.set_adapter("other")
    return adapter.occupied


def load_natively(adapter: Adapter, directory: Path, **options) -> nn.Module:
    adapter.base.load_adapter(str(directory), **options)
    return adapter.base


def load_with_base(adapter: Adapter, directory: Path, **options) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(directory, **options)


# Twice those that take little time.
ROUTES = [load_bare, load_by_configuration, load_beside, load_natively]
ROUTES = [*ROUTES, *ROUTES, load_with_base]
CASES = {
    "route": st.sampled_from(ROUTES),
    "kind": st.sampled_from([*KINDS]),
    "low_cpu_mem_usage": st.booleans(),
}


def fuzz(share: float, **changes) -> Callable:
    """Try a share of all examples."""

    def decorate(test: Callable) -> Callable:
        test = given(**CASES, **changes)(test)
        return settings(
            max_examples=max(1, int(NUM_EXAMPLES * share)),
            derandomize=ASKED is None,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(test)

    return decorate


def check(adapter: Adapter, changes: list[Change], route: Callable, low_cpu_mem_usage: bool, directory: Path) -> None:
    """Load a damaged copy of an adapter, and look at what came of it."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(adapter.directory, directory)
    for change in changes:
        change.apply(directory)
    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = route(adapter, directory, low_cpu_mem_usage=low_cpu_mem_usage)
    except Exception as error:
        signal.alarm(0)
        check_error(error, directory, route)
        adapter.base_print.assert_unchanged(adapter.base)
        adapter.occupied_print.assert_unchanged(adapter.occupied)
    else:
        signal.alarm(0)
        check_loaded(adapter, loaded, directory)
        renew(adapter, loaded)
    assert "PREFIX_PLUS_EXPLOITED" not in os.environ


def renew(adapter: Adapter, loaded: nn.Module) -> None:
    """Build the model anew that has got an adapter."""
    name = adapter.base.config.model_type
    if loaded is adapter.occupied:
        adapter.occupied = PeftModel.from_pretrained(build_base(name), adapter.directory)
        adapter.occupied_print = Fingerprint(adapter.occupied)
    else:
        adapter.base = build_base(name)
        adapter.base_print = Fingerprint(adapter.base)


def names_the_method(directory: Path) -> bool:
    """Whether a file can be read far enough to see that PrefixPlus is asked for; before, errors are PEFT's."""
    try:
        return json.loads((directory / CONFIG).read_text())["peft_type"] == "PREFIX_PLUS"
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return False


def check_error(error: Exception, directory: Path, route: Callable) -> None:
    assert str(error).strip()
    if not names_the_method(directory):
        assert isinstance(error, ValueError | KeyError | TypeError | OSError | RecursionError), repr(error)
        return
    from_base = route is load_with_base and isinstance(error, OSError | AttributeError)
    assert isinstance(error, ValueError) or from_base, repr(error)


def check_loaded(adapter: Adapter, loaded: nn.Module, directory: Path) -> None:
    """What is in the model is what is in the file, and the rest of the model is what it was."""
    name = "other" if isinstance(loaded, PeftModel) and "other" in loaded.peft_config else "default"
    assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())
    own = {
        key.removeprefix("base_model.model.").replace(f".{name}.", ".").replace(".modules_to_save.", "."): tensor
        for key, tensor in loaded.state_dict().items()
        if f".prefix_plus_encoder.{name}." in key or f".modules_to_save.{name}." in key
    }
    given = read_weights(directory)
    assert own and set(own) <= set(given)
    for key, tensor in own.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, given[key].float())
    kept = {
        key.replace(".base_layer.", ".").replace(".original_module.", ".").removeprefix("base_model.model."): tensor
        for key, tensor in loaded.state_dict().items()
    }
    for key, tensor in adapter.base_print.values.items():
        # PEFT saves the embeddings of an enlarged vocabulary, and puts them back.
        assert torch.equal(kept[key], given[key].float() if key in given and key not in own else tensor), key
    logits = run(loaded)
    if has_same_effect(adapter, loaded.peft_config[name], given):
        # Tensors that are used where they stand in the file may be aligned differently, and be summed up so.
        torch.testing.assert_close(logits, adapter.logits)


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    path, pickled = directory / WEIGHTS, directory / "adapter_model.bin"
    weights = load_file(path) if path.exists() else torch.load(pickled, weights_only=True)
    return {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}


def has_same_effect(adapter: Adapter, config: PrefixPlusConfig, given: dict[str, torch.Tensor]) -> bool:
    fields = {field.name for field in dataclasses.fields(config)} - WITHOUT_EFFECT
    same = all(getattr(config, name) == getattr(adapter.config, name) for name in fields)
    expected = read_weights(adapter.directory)
    return (
        same and given.keys() == expected.keys() and all(torch.equal(t.float(), expected[k]) for k, t in given.items())
    )


@pytest.mark.slow
@fuzz(0.4, change=config_changes)
def test_damaged_configurations(adapters, tmp_path_factory, kind, change, route, low_cpu_mem_usage):
    check(adapters[kind], [change], route, low_cpu_mem_usage, tmp_path_factory.getbasetemp() / "damaged")


@pytest.mark.slow
@fuzz(0.4, change=weight_changes)
def test_damaged_weights(adapters, tmp_path_factory, kind, change, route, low_cpu_mem_usage):
    check(adapters[kind], [change], route, low_cpu_mem_usage, tmp_path_factory.getbasetemp() / "damaged")


@pytest.mark.slow
@fuzz(0.2, changes=st.lists(config_changes | weight_changes, min_size=2, max_size=4))
def test_several_damages(adapters, tmp_path_factory, kind, changes, route, low_cpu_mem_usage):
    check(adapters[kind], changes, route, low_cpu_mem_usage, tmp_path_factory.getbasetemp() / "damaged")


@pytest.mark.parametrize("route", sorted(set(ROUTES), key=ROUTES.index), ids=lambda route: route.__name__)
@pytest.mark.parametrize(("field", "old"), [("num_virtual_tokens", 3), ("projection_dim", 5)])
@pytest.mark.parametrize("new", [1, 2, 7, 300])
def test_both_files_of_another_size(adapters, tmp_path, route, field, old, new):
    """Not damaged: another adapter for the same model."""
    adapter = adapters["mlp"]
    shutil.copytree(adapter.directory, tmp_path / "resized")
    for change in resize(field, old, new):
        change.apply(tmp_path / "resized")
    loaded = route(adapter, tmp_path / "resized")
    check_loaded(adapter, loaded, tmp_path / "resized")
    renew(adapter, loaded)
    assert run(loaded).isfinite().all() and not torch.allclose(run(loaded), adapter.logits)


@pytest.mark.parametrize("route", sorted(set(ROUTES), key=ROUTES.index), ids=lambda route: route.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_an_undamaged_adapter_passes_the_checks(adapters, tmp_path, route, kind):
    adapter = adapters[kind]
    check(adapter, [], route, False, tmp_path / "copy")
    loaded = route(adapter, adapter.directory)
    check_loaded(adapter, loaded, adapter.directory)
    assert has_same_effect(adapter, list(loaded.peft_config.values())[-1], read_weights(adapter.directory))
    renew(adapter, loaded)
