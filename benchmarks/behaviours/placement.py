"""Where weights live: offloading, empty weights, several processes."""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.utils import set_seed
from peft import PeftModel
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .behaviour import behaviour
from .methods import Method
from .processes import run_processes
from .subjects import (
    assert_close,
    assert_differ,
    assert_same_tokens,
    build_adapted,
    build_causal_lm,
    compute_logits,
    continue_greedily,
    draw_tokens,
    save_base_model,
)

GROUP = "Devices and processes"

CPU = torch.device("cpu")
# One layer and the end of the model are on the disk.
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "cpu",
}
LEARNING_RATE = 5.0
STEPS = 3


def name_devices(method: Method) -> dict[str, str]:
    """`DEVICE_MAP` with the names that the modules have in a `PeftModel`."""
    if method.build_config().is_prompt_learning:
        devices = {f"base_model.{name}": device for name, device in DEVICE_MAP.items()}
        return devices | {"prompt_encoder": "cpu", "word_embeddings": "cpu"}
    return {f"base_model.model.{name}": device for name, device in DEVICE_MAP.items()}


def save_adapted(method: Method, directory: Path) -> torch.Tensor:
    """Save an adapter, and return the logits that it has to give."""
    model = build_adapted(method)
    model.save_pretrained(directory)
    return compute_logits(model)


def assert_loads(method: Method, directory: Path, base: PreTrainedModel, **settings: Any) -> PeftModel:
    """Load a saved adapter onto a model; it has to answer and to continue as it does elsewhere."""
    expected = save_adapted(method, directory / "adapter")
    model = PeftModel.from_pretrained(base, directory / "adapter", **settings)
    assert_close(compute_logits(model), expected)
    reference = PeftModel.from_pretrained(build_causal_lm(), directory / "adapter").eval()
    tokens = model.generate(input_ids=draw_tokens(), max_new_tokens=4, do_sample=False)
    assert_same_tokens(tokens, continue_greedily(reference, draw_tokens(), steps=4))
    return model


@behaviour(GROUP)
def load_onto_a_model_offloaded_to_the_cpu(method: Method, directory: Path) -> None:
    """Load onto a model with `cpu_offload`."""
    assert_loads(method, directory, cpu_offload(build_causal_lm(), CPU))


@behaviour(GROUP)
def load_onto_a_model_offloaded_to_the_disk(method: Method, directory: Path) -> None:
    """Load onto a model with `disk_offload`."""
    assert_loads(method, directory, disk_offload(build_causal_lm(), directory / "offload", CPU))


@behaviour(GROUP)
def load_onto_a_model_with_a_device_map(method: Method, directory: Path) -> None:
    """`PeftModel.from_pretrained` onto a model with a `device_map` that uses the disk."""
    base = AutoModelForCausalLM.from_pretrained(
        save_base_model(directory / "base"), device_map=DEVICE_MAP, offload_folder=directory / "offload"
    )
    settings = {"device_map": name_devices(method), "offload_folder": directory / "adapter-offload"}
    # PEFT writes copies of the base model's files below the working directory, if they are not from the Hub.
    with chdir(directory):
        assert_loads(method, directory, base, **settings)


@behaviour(GROUP)
def load_onto_an_offloaded_model_with_low_cpu_mem_usage(method: Method, directory: Path) -> None:
    """Load with `low_cpu_mem_usage=True` onto a model with `cpu_offload`."""
    assert_loads(method, directory, cpu_offload(build_causal_lm(), CPU), low_cpu_mem_usage=True)


@behaviour(GROUP)
def offload_a_model_with_its_adapter(method: Method, directory: Path) -> None:
    """Offload a model together with its adapter, run it, save the adapter."""
    model = build_adapted(method)
    expected = compute_logits(model)
    dispatch_model(model, name_devices(method), offload_dir=directory / "offload")
    assert_close(compute_logits(model), expected)
    model.save_pretrained(directory / "adapter")
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory / "adapter")
    assert_close(compute_logits(loaded), expected)


@behaviour(GROUP)
def train_on_an_offloaded_model(method: Method, directory: Path) -> None:
    """Create an adapter on an offloaded model, and train it."""
    states = []
    for offload in (False, True):
        base = build_causal_lm()
        if offload:
            dispatch_model(base, DEVICE_MAP, offload_dir=directory / "offload")
        set_seed(0)
        model = method.apply(base).train()
        take_plain_steps(model, draw_tokens())
        states.append(compute_logits(model))
    assert_close(states[1], states[0], 1e-3)


def take_plain_steps(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Take some steps of plain gradient descent, whose result shows any wrong factor in the gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_alone(method: Method, checkpointing: bool = False) -> torch.Tensor:
    """Train in one process on the whole batch; logits before and after."""
    model = apply_seeded(method, checkpointing)
    before = compute_logits(model)
    take_plain_steps(model.train(), draw_tokens(4))
    assert_differ(compute_logits(model), before)
    return compute_logits(model)


def apply_seeded(method: Method, checkpointing: bool = False, seed: int = 7) -> PeftModel:
    """Give the Llama an adapter that starts in the same way everywhere."""
    base = build_causal_lm()
    set_seed(seed)
    model = method.apply(base).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def take_prepared_steps(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The loop of `take_plain_steps` with accelerate: every process takes its rows of the batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in draw_tokens(4)] * STEPS, 2)
    if accelerator.num_processes == 1:
        loader = torch.utils.data.DataLoader(loader.dataset, 4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    return model


def save_prepared(accelerator: Accelerator, model: torch.nn.Module, directory: Path) -> None:
    """Save the adapter from the main process, as PEFT's examples do."""
    state_dict = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(directory, is_main_process=accelerator.is_main_process, state_dict=state_dict)
    accelerator.wait_for_everyone()


def train_prepared(method: Method, directory: Path, checkpointing: bool = False) -> None:
    accelerator = Accelerator(cpu=True)
    # Every process starts from other random numbers; those of the first count.
    model = apply_seeded(method, checkpointing, seed=7 + accelerator.process_index)
    save_prepared(accelerator, take_prepared_steps(accelerator, model), directory)


def assert_trains_like_one(
    method: Method, directory: Path, train: Callable[..., None], checkpointing: bool = False
) -> None:
    """Train in two processes; the saved adapter has to be that of one process with the whole batch."""
    expected = train_alone(method, checkpointing)
    run_processes(train, method, directory, checkpointing)
    assert sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors")
    loaded = PeftModel.from_pretrained(build_causal_lm(), directory)
    assert_close(compute_logits(loaded), expected, 2e-3)


@behaviour(GROUP)
def train_with_accelerate(method: Method, directory: Path) -> None:
    """`Accelerator.prepare` and a loop; save with `unwrap_model`."""
    expected = train_alone(method)
    run_processes(train_prepared, method, directory, num_processes=1)
    assert_close(compute_logits(PeftModel.from_pretrained(build_causal_lm(), directory)), expected, 2e-3)


@behaviour(GROUP)
def train_in_two_processes(method: Method, directory: Path) -> None:
    """Two processes (DDP) train what one trains."""
    assert_trains_like_one(method, directory, train_prepared)


@behaviour(GROUP)
def train_in_two_processes_with_gradient_checkpointing(method: Method, directory: Path) -> None:
    """Two processes (DDP) with gradient checkpointing train what one trains."""
    assert_trains_like_one(method, directory, train_prepared, checkpointing=True)


def shard(model: torch.nn.Module) -> None:
    """Shard a model over all processes, layer by layer, as FSDP2 is used."""
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module)
    fully_shard(model)


def train_sharded(method: Method, directory: Path, checkpointing: bool = False) -> None:
    distributed.init_process_group("gloo")
    model = apply_seeded(method, checkpointing)
    shard(model)
    rank = distributed.get_rank()
    take_plain_steps(model, draw_tokens(4)[2 * rank : 2 * rank + 2])
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(directory, state_dict=state_dict)
    distributed.barrier()


@behaviour(GROUP)
def train_sharded_over_two_processes(method: Method, directory: Path) -> None:
    """Two processes that share the weights (FSDP2) train what one trains."""
    assert_trains_like_one(method, directory, train_sharded)


def run_sharded(method: Method, adapter_dir: Path, expected: torch.Tensor) -> None:
    distributed.init_process_group("gloo")
    base = build_causal_lm()
    shard(base)
    model = PeftModel.from_pretrained(base, adapter_dir)
    assert_close(compute_logits(model), expected)


@behaviour(GROUP)
def load_onto_a_sharded_model(method: Method, directory: Path) -> None:
    """Load onto a model that is shared by two processes (FSDP2)."""
    expected = save_adapted(method, directory)
    run_processes(run_sharded, method, directory, expected)
