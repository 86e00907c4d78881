"""Two processes train what one trains: DDP, FSDP2 and DeepSpeed over gloo, on the CPU."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, set_seed
from behaviours.processes import pretend_accelerators, run_processes
from helpers import add_prefix, draw_tokens, named_prefix_parameters, run, save
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import build_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

STEPS, LEARNING_RATE = 3, 5.0
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
# Between runs that add the same numbers in another order.
TOLERANCE = 1e-5
# Without the dropout of GPT-2, which draws other numbers in two processes than in one.
SETTINGS = {"llama": {}, "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}}
CHECKPOINTING = {"": None, "reentrant": True, "not reentrant": False}


def build_prefixed(name: str = "llama", checkpointing: str = "", seed: int = 7) -> PeftModel:
    base = build_model(name, **SETTINGS[name])
    set_seed(seed)
    model = add_prefix(base).train()
    if checkpointing:
        reentrant = CHECKPOINTING[checkpointing]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def train(model: nn.Module, ids: Tensor, accelerator: Accelerator | None = None, forwards: int = 1) -> nn.Module:
    """Plain gradient descent, whose result shows any wrong factor in the gradients; returns what was prepared."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
        ids = ids.chunk(accelerator.num_processes)[accelerator.process_index]
    for _ in range(STEPS):
        losses = [model(input_ids=part, labels=part).loss for part in ids.chunk(forwards, dim=1)]
        loss = torch.stack(losses).sum()
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return model


def save_from_main(accelerator: Accelerator, model: nn.Module, directory: Path) -> None:
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(directory, state_dict=state_dict)
    accelerator.wait_for_everyone()


def assert_same_adapter(directory: Path, expected: dict[str, Tensor] | Path, tolerance: float = TOLERANCE) -> None:
    given = load_file(directory / "adapter_model.safetensors")
    if isinstance(expected, Path):
        expected = load_file(expected / "adapter_model.safetensors")
    assert given.keys() == expected.keys()
    assert max(float((given[key] - expected[key]).abs().max()) for key in given) <= tolerance


def train_alone(directory: Path, name: str = "llama", checkpointing: str = "", forwards: int = 1) -> Path:
    model = build_prefixed(name, checkpointing)
    train(model, draw_tokens(4, 8), forwards=forwards)
    model.save_pretrained(directory)
    return directory


def train_ddp(directory: Path, name: str, checkpointing: str, unused: bool, forwards: int) -> None:
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=unused)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[kwargs])
    # Each process starts from other random numbers; DDP sends those of the first to the others.
    model = train(
        build_prefixed(name, checkpointing, seed=7 + accelerator.process_index),
        draw_tokens(4, 8),
        accelerator,
        forwards,
    )
    save_from_main(accelerator, model, directory)
    accelerator.unwrap_model(model).save_pretrained(directory / str(accelerator.process_index))


@pytest.mark.parametrize(
    ("name", "checkpointing", "unused", "forwards"),
    [
        ("llama", "", False, 1),
        ("llama", "reentrant", False, 1),
        ("llama", "not reentrant", False, 1),
        ("llama", "", True, 1),
        ("llama", "", False, 2),
        ("gpt2", "not reentrant", True, 1),
    ],
)
def test_ddp(name, checkpointing, unused, forwards, tmp_path):
    expected = train_alone(tmp_path / "one", name, checkpointing, forwards)
    run_processes(train_ddp, tmp_path / "two", name, checkpointing, unused, forwards)
    assert_same_adapter(tmp_path / "two", expected)
    assert_same_adapter(tmp_path / "two" / "1", tmp_path / "two" / "0", tolerance=0.0)


def train_fsdp(directory: Path, name: str, checkpointing: str, layer: str) -> None:
    pretend_accelerators()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.FSDP
    model = train(build_prefixed(name, checkpointing), draw_tokens(4, 8), accelerator)
    assert all(hasattr(p, "device_mesh") for p in named_prefix_parameters(model).values())
    save_from_main(accelerator, model, directory)


@pytest.mark.parametrize(
    ("name", "checkpointing", "layer"),
    [
        ("llama", "", "LlamaDecoderLayer"),
        ("llama", "reentrant", "LlamaDecoderLayer"),
        ("llama", "not reentrant", "LlamaDecoderLayer"),
        # The layer of the prefix is a unit of its own.
        ("llama", "", "PrefixPlusLayer"),
        ("gpt2", "not reentrant", "GPT2Block"),
    ],
)
def test_fsdp2(name, checkpointing, layer, tmp_path):
    expected = train_alone(tmp_path / "one", name, checkpointing)
    run_processes(train_fsdp, tmp_path / "two", name, checkpointing, layer)
    assert_same_adapter(tmp_path / "two", expected)
    loaded = PeftModel.from_pretrained(build_model(name), tmp_path / "two")
    assert torch.allclose(run(loaded), run(PeftModel.from_pretrained(build_model(name), expected)), atol=1e-3)


def use_sharded(adapter_dir: Path, expected: dict[str, Tensor], anchors: dict[str, Tensor]) -> None:
    distributed.init_process_group("gloo")
    base = build_model("llama")
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base)
    model = PeftModel.from_pretrained(base, adapter_dir).eval()
    assert torch.equal(run(model), expected["logits"])
    tokens = model.generate(input_ids=draw_tokens(), max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, expected["tokens"])
    fresh = add_prefix(model.unload())
    given = fresh.state_dict()
    assert anchors and all(torch.equal(given[key], tensor) for key, tensor in anchors.items())


def test_a_prefix_on_a_model_that_is_sharded_already(tmp_path):
    model = save(tmp_path)
    tokens = model.generate(input_ids=draw_tokens(), max_new_tokens=4, do_sample=False)
    anchors = {key: tensor for key, tensor in model.state_dict().items() if ".anchor_" in key}
    run_processes(use_sharded, tmp_path, {"logits": run(model), "tokens": tokens}, anchors)


def refuse_efficient_loading(adapter_dir: Path) -> None:
    distributed.init_process_group("gloo")
    for make in (add_prefix, lambda base: PeftModel.from_pretrained(base, adapter_dir)):
        base = build_model("llama")
        with pytest.raises(ValueError, match="Set `fsdp_cpu_ram_efficient_loading: false`"):
            make(base)
        assert not any("prefix_plus" in key for key, _ in base.named_modules())


def test_weights_in_the_first_process_only_are_refused_in_all(tmp_path):
    save(tmp_path)
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    run_processes(refuse_efficient_loading, tmp_path, **environment)


class Rows(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = draw_tokens(16)[index]
        return {"input_ids": ids, "labels": ids}


class StopAfter(TrainerCallback):
    def __init__(self, steps: int | None) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.steps


KINDS = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}},
}
AUTO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
UNTESTED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def run_trainer(
    kind: str, base: Path, directory: Path, batch_size: int, stop: int | None, resume: Path | None
) -> None:
    settings = dict(KINDS[kind])
    if "deepspeed" in settings:
        settings["deepspeed"] = settings["deepspeed"] | AUTO | UNTESTED
    arguments = TrainingArguments(
        directory,
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=batch_size,
        learning_rate=0.05,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=kind != "ddp",
        use_cpu="deepspeed" not in settings,
        **settings,
    )
    if kind != "ddp":
        assert arguments.device == torch.device("cpu")
        pretend_accelerators(DistributedType.DEEPSPEED if "deepspeed" in settings else DistributedType.MULTI_GPU)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert kind != "zero3" or all(p.numel() == 0 for p in model.parameters())
    set_seed(7)
    trainer = Trainer(add_prefix(model), arguments, train_dataset=Rows(), callbacks=[StopAfter(stop)])
    trainer.train(resume_from_checkpoint=resume)
    expected = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}.get(kind, "DeepSpeedEngine")
    assert arguments.world_size == 1 or type(trainer.model_wrapped).__name__ == expected
    trainer.save_model()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_the_trainer_trains_what_one_process_trains_and_resumes(kind, tmp_path):
    base, one, two, resumed = (tmp_path / name for name in ("base", "one", "two", "resumed"))
    build_model("llama").save_pretrained(base)
    run_processes(run_trainer, "ddp", base, one, 4, None, None, num_processes=1)
    environment = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true"}}.get(
        kind, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
    )
    run_processes(run_trainer, kind, base, two, 2, None, None, **environment)
    assert_same_adapter(two, one, tolerance=1e-3)
    run_processes(run_trainer, kind, base, resumed, 2, 3, None, **environment)
    run_processes(run_trainer, kind, base, resumed, 2, None, resumed / "checkpoint-3", **environment)
    assert_same_adapter(resumed, two, tolerance=0.0)


def capture_partitioned(base: Path, settings: dict[str, Any], expected: dict[str, Tensor]) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    model = AutoModelForCausalLM.from_pretrained(base)
    parameters = dict(model.named_parameters())
    assert config.is_zero3() and all(p.numel() == 0 for p in parameters.values())
    given = add_prefix(model, **settings).state_dict()
    assert all(torch.allclose(given[key], tensor, atol=1e-6) for key, tensor in expected.items())
    # Everything is partitioned again, and what did it is gone.
    assert all(p.numel() == 0 for p in parameters.values())
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not any(getattr(hook, "__module__", "").endswith("architectures.devices") for hook in hooks)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"prefix_init": "vocab"}])
def test_a_prefix_is_computed_from_weights_that_deepspeed_has_partitioned(name, settings, tmp_path):
    build_model(name).save_pretrained(tmp_path)
    expected = add_prefix(build_model(name), **settings).state_dict()
    expected = {key: tensor for key, tensor in expected.items() if ".anchor_" in key or ".scale_" in key}
    run_processes(capture_partitioned, tmp_path, settings, expected, DS_ACCELERATOR="cpu")


def test_a_process_that_fails_is_told():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_processes(divide, 0)


def divide(divisor: int) -> float:
    return 1 / divisor
