"""Steps that many tests take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, build_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer

INIT_TOKEN_IDS = [11, 23, 5, 42, 7]
both_kinds = pytest.mark.parametrize("name", ["llama", "gpt2"])


def draw_tokens(batch_size: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (batch_size, length), generator=generator)


def add_prefix(model: PreTrainedModel, **settings: Any) -> PeftModel:
    """Give a model a prefix that starts from `INIT_TOKEN_IDS`, unless the settings say otherwise."""
    if not {"prefix_init", "prefix_init_token_ids"} & set(settings):
        settings["prefix_init_token_ids"] = INIT_TOKEN_IDS
    return get_peft_model(model, PrefixPlusConfig(task_type="CAUSAL_LM", **settings)).eval()


def named_prefix_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".prefix_plus_" in name}


@torch.no_grad()
def perturb(model: nn.Module, size: float = 0.3, seed: int = 2) -> None:
    """Move every prefix parameter away from step 0, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in named_prefix_parameters(model).values():
        parameter += size * torch.randn(parameter.shape, generator=generator)


def pad_rows(rows: Tensor, lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """Cut row `i` to `lengths[i]` tokens and pad it with zeros on one side; ids and mask."""
    ids, mask = torch.zeros_like(rows), torch.zeros_like(rows)
    for i, length in enumerate(lengths):
        where = slice(rows.shape[1] - length, None) if side == "left" else slice(0, length)
        ids[i, where], mask[i, where] = rows[i, :length], 1
    return ids, mask


def compute_logits_under_dropout(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the real tokens under one draw of dropout, the same for every model; another draw gives others."""
    model.train()
    logits = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert not torch.allclose(logits[1], logits[0])
    return logits[0]


class Snapshot:
    """Everything of a model that an adapter which was refused must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.ids = draw_tokens()
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.modules = {name: (type(module), module.training) for name, module in model.named_modules()}
        self.configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
        self.num_hooks = len(model._forward_pre_hooks)
        with torch.no_grad():
            self.logits = model(self.ids).logits

    def assert_unchanged(self, model: nn.Module) -> None:
        assert list(model.state_dict()) == list(self.state)
        assert all(torch.equal(tensor, self.state[name]) for name, tensor in model.state_dict().items())
        assert {name: (type(m), m.training) for name, m in model.named_modules()} == self.modules
        for name, module in model.named_modules():
            assert not hasattr(module, "config") or module.config is self.configs[name], name
        assert len(model._forward_pre_hooks) == self.num_hooks
        assert torch.equal(model(self.ids).logits, self.logits)


def list_lengths(model: nn.Module) -> dict[str, int]:
    """Prefix lengths of the adapter `default` by layer, where there is one."""
    return {
        name.removeprefix("base_model.model."): module.prefix_plus_encoder["default"].num_virtual_tokens
        for name, module in model.named_modules()
        if isinstance(module, PrefixPlusLayer) and "default" in module.prefix_plus_encoder
    }


def names(*layers: int) -> list[str]:
    return [f"model.layers.{i}.self_attn" for i in layers]


def add_second(model: PeftModel, name: str = "other", **settings) -> None:
    settings = {"prefix_init_token_ids": [3, 4, 6]} | settings
    model.add_adapter(name, PrefixPlusConfig(task_type="CAUSAL_LM", **settings))


@torch.no_grad()
def run(model: nn.Module, adapters: str | list[str] | None = None) -> torch.Tensor:
    if adapters is not None:
        model.base_model.set_adapter(adapters)
    return model.base_model(draw_tokens()).logits


def save(directory: Path, name: str = "llama", **settings) -> PeftModel:
    model = add_prefix(build_model(name), **settings)
    perturb(model)
    model.save_pretrained(directory)
    return model


def rewrite_weights(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def lose_one(weights: dict) -> None:
    del weights[min(weights)]


def lose_all(weights: dict) -> None:
    weights.clear()


def add_foreign(weights: dict) -> None:
    weights["base_model.model.model.layers.9.self_attn.prefix_plus_encoder.anchor_keys"] = torch.zeros(1)


def misshape(weights: dict) -> None:
    name = next(name for name in weights if name.endswith("output_bias"))
    weights[name] = torch.zeros(len(weights[name]) + 1)


def put_nan(weights: dict) -> None:
    weights[max(name for name in weights if "prefix_plus" in name)].view(-1)[-1] = float("nan")


def put_infinity(weights: dict) -> None:
    weights[min(weights)].view(-1)[0] = float("inf")


def make_integers(weights: dict) -> None:
    weights[min(weights)] = weights[min(weights)].long()


def get_trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
