"""Adapters that come and go, hundreds of times: nothing grows."""

import gc
import itertools
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import both_kinds
from peft import PeftModel, get_peft_model
from tiny_models import build_model
from torch import nn

from peft_prefix_plus import PrefixPlusConfig

IDS = torch.tensor([[5, 6, 7]])
STATUS = Path("/proc/self/statm")
PAGE_SIZE = 4096


def build_config(**settings: Any) -> PrefixPlusConfig:
    return PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, projection_dim=4, **settings)


def build_base(name: str) -> nn.Module:
    sizes = {"gpt2": {"n_layer": 1}}.get(name, {"num_hidden_layers": 1})
    return build_model(name, **sizes).eval()


class Counts(NamedTuple):
    """What can grow without anyone seeing it in the outputs."""

    modules: int
    parameters: int
    buffers: int
    hooks: int
    tensors: int
    entries: int


def count(model: nn.Module) -> Counts:
    """Count the parts of a model, the tensors of the process, and the entries that modules and hooks keep."""
    gc.collect()
    modules = list(model.modules())
    hooks = [hook for m in modules for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    attributes = [value for owner in (*modules, *hooks) for value in getattr(owner, "__dict__", {}).values()]
    return Counts(
        modules=len(modules),
        parameters=sum(1 for _ in model.parameters()),
        buffers=sum(1 for _ in model.buffers()),
        hooks=len(hooks),
        tensors=sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        entries=sum(len(value) for value in attributes if isinstance(value, dict | list | set)),
    )


def read_resident_bytes() -> int:
    """Memory of the process; 0 where the system does not tell it in this way."""
    return 0 if not STATUS.exists() else int(STATUS.read_text().split()[1]) * PAGE_SIZE


def repeat(cycle: Callable[[], None], cycles: int) -> None:
    for _ in range(cycles):
        cycle()
    # It keeps the patterns of the last 512 names.
    re.purge()
    gc.collect()


def check(model: nn.Module, cycle: Callable[[], None], cycles: int) -> None:
    """Repeat a cycle. Counts stay equal, and memory within what the allocators round up to."""
    repeat(cycle, 20)
    before, objects, resident = count(model), len(gc.get_objects()), read_resident_bytes()
    repeat(cycle, cycles)
    assert count(model) == before
    # A few: caches of the libraries, which are not full yet.
    grown = len(gc.get_objects()) - objects
    assert grown < 20 + cycles // 10, f"{grown} more objects after {cycles} cycles"
    grown = read_resident_bytes() - resident
    assert grown < 1_000_000 + 1_000 * cycles, f"{grown} more resident bytes after {cycles} cycles"


def check_python_memory(cycle: Callable[[], None], cycles: int) -> None:
    """Repeat a cycle; a module takes kilobytes."""
    tracemalloc.start()
    try:
        repeat(cycle, 20)
        traced = tracemalloc.get_traced_memory()[0]
        repeat(cycle, cycles)
        grown = tracemalloc.get_traced_memory()[0] - traced
    finally:
        tracemalloc.stop()
    assert grown < 2_000 * cycles, f"{grown} more bytes after {cycles} cycles"


def generate(model: nn.Module) -> None:
    model.generate(input_ids=IDS, max_new_tokens=1, do_sample=False, pad_token_id=0)


@both_kinds
@pytest.mark.slow
def test_adding_and_deleting(name):
    """A name that never came before each time, as in a server; some start from real tokens."""
    model = get_peft_model(build_base(name), build_config())
    numbers = itertools.count()

    def cycle() -> None:
        number = next(numbers)
        adapter = f"adapter_{number}"
        start = "zero" if number % 4 else "vocab"
        model.add_adapter(adapter, build_config(projection="none", prefix_init=start))
        model.set_adapter(adapter)
        generate(model)
        model.set_adapter("default")
        model.delete_adapter(adapter)

    check(model, cycle, cycles=500 if name == "llama" else 100)
    check_python_memory(cycle, cycles=30)


@both_kinds
@pytest.mark.slow
def test_loading_disabling_and_deleting(name, tmp_path):
    model = get_peft_model(build_base(name), build_config())
    model.save_pretrained(tmp_path)
    names = (f"adapter_{i}" for i in itertools.count())

    def cycle() -> None:
        adapter = next(names)
        model.load_adapter(tmp_path, adapter_name=adapter)
        model.base_model.set_adapter(["default", adapter])
        with model.disable_adapter():
            generate(model)
        generate(model)
        model.set_adapter("default")
        model.delete_adapter(adapter)

    check(model, cycle, cycles=100)


@both_kinds
@pytest.mark.slow
def test_wrapping_and_unloading(name, tmp_path):
    base = build_base(name)
    get_peft_model(base, build_config()).save_pretrained(tmp_path)
    base = build_base(name)
    numbers = itertools.count()

    def cycle() -> None:
        adapter = f"adapter_{next(numbers)}"
        model = get_peft_model(base, build_config(), adapter_name=adapter)
        generate(model)
        model.unload()
        model = PeftModel.from_pretrained(base, tmp_path, adapter_name=adapter)
        generate(model)
        model.delete_adapter(adapter)
        model.unload()

    check(base, cycle, cycles=100)


@both_kinds
@pytest.mark.slow
def test_adding_and_deleting_with_the_methods_of_transformers(name, tmp_path):
    base = build_base(name)
    get_peft_model(build_base(name), build_config()).save_pretrained(tmp_path)
    base.add_adapter(build_config(), adapter_name="default")
    numbers = itertools.count()

    def cycle() -> None:
        adapter = f"adapter_{next(numbers)}"
        base.add_adapter(build_config(), adapter_name=adapter)
        generate(base)
        base.disable_adapters()
        base.enable_adapters()
        base.set_adapter("default")
        base.delete_adapter(adapter)

    check(base, cycle, cycles=100)


@both_kinds
@pytest.mark.slow
def test_mixed_batches(name):
    model = get_peft_model(build_base(name), build_config())
    model.add_adapter("other", build_config())
    model.eval()
    ids = IDS.repeat(3, 1)

    def cycle() -> None:
        model.generate(
            input_ids=ids,
            adapter_names=["default", "__base__", "other"],
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
        )

    check(model, cycle, cycles=50)


@both_kinds
@pytest.mark.slow
def test_training_steps(name):
    model = get_peft_model(build_base(name), build_config(prefix_dropout=0.2)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

    def cycle() -> None:
        with model.disable_adapter(), torch.no_grad():
            model(input_ids=IDS)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    check(model, cycle, cycles=50)
