"""What people do with a model that has an adapter, as runs that can be timed."""

import time
from collections.abc import Callable
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel

from benchmarks.peak_memory import read_memory, read_peak_memory, reset_peak_memory

Run = Callable[[], object]


def draw_ids(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    """Random tokens, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, model.get_input_embeddings().num_embeddings, (batch, length), generator=generator)


def train_step(model: nn.Module, batch: int, length: int, checkpointing: bool = False) -> None:
    """Forward and backward; of the base model, down to the input of its first layer."""
    ids = draw_ids(model, batch, length)
    model.train()
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
    model.zero_grad(set_to_none=True)


class FirstToken(LogitsProcessor):
    """Notes when the scores of the first new token are there, and changes nothing."""

    time: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.time = self.time or time.perf_counter()
        return scores


@torch.no_grad()
def generate(model: nn.Module, batch: int, context: int, new: int) -> float:
    """Greedy generation of a fixed number of tokens; returns the seconds to the first of them."""
    ids = draw_ids(model, batch, context)
    model.eval()
    first = FirstToken()
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    start = time.perf_counter()
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=[first], **settings)
    assert first.time is not None
    return first.time - start


def count_saved_bytes(model: nn.Module, run: Run) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def measure_peak(run: Run) -> int | None:
    """By how many bytes a run raises the resident memory at its peak; `None` where the system does not tell."""
    reset_peak_memory()
    before = read_memory()
    run()
    peak = read_peak_memory()
    return None if peak is None or before is None else peak - before


def build_mixed_batch(model: PeftModel, names: list[str], context: int, new: int) -> dict[str, Run]:
    """Generate for rows that each use another adapter: in one pass, and in one pass for each row."""
    ids = draw_ids(model, len(names), context)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def run_mixed() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **settings)

    @torch.no_grad()
    def run_each() -> None:
        for row, name in enumerate(names):
            model.set_adapter(name)
            row_ids = ids[row : row + 1]
            model.generate(input_ids=row_ids, attention_mask=torch.ones_like(row_ids), **settings)

    return {"mixed": run_mixed, "one pass for each": run_each}


def build_switch(model: PeftModel, names: list[str], times: int = 20) -> Run:
    """Make one adapter after the other the active one."""

    def run() -> None:
        for number in range(times):
            model.set_adapter(names[number % len(names)])

    return run


def build_loading(model: PeftModel, directory: str, name: str = "default") -> Run:
    """Load one more adapter from the disk, and delete it."""
    model.save_pretrained(directory, selected_adapters=[name])

    def run() -> None:
        model.load_adapter(directory, adapter_name="loaded")
        model.delete_adapter("loaded")

    return run


def truncate_layers(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """Leave the first layers only, in place."""
    model.model.layers = model.model.layers[:depth]
    model.config.num_hidden_layers = depth
    return model


def build_runs(models: dict[str, nn.Module], case: Callable[..., object], **settings: object) -> dict[str, Run]:
    """The same case for each model."""
    return {name: partial(case, model, **settings) for name, model in models.items()}
