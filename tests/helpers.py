"""Steps that many tests take."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny_models import VOCAB_SIZE
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig

INIT_TOKEN_IDS = [11, 23, 5, 42, 7]


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
