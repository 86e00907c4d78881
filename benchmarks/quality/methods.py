"""Builds the methods that the benchmarks compare, from the words of an experiment file."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import peft
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.initial_tokens import build_initial_tokens
from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.examples import Example
from peft_prefix_plus.initialization import fit_token_ids

FULL, HEAD = "FULL", "HEAD"
CONFIG_CLASSES = {
    "PREFIX_PLUS": PrefixPlusConfig,
    "LORA": peft.LoraConfig,
    "IA3": peft.IA3Config,
    "CARTRIDGE": peft.CartridgeConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "PROMPT_TUNING": peft.PromptTuningConfig,
}
PEFT_TYPES = (*CONFIG_CLASSES, FULL, HEAD)


@dataclass
class AppliedMethod:
    """A base model with a method, ready for training.

    Attributes:
        model (`nn.Module`): what is trained.
        base (`PreTrainedModel`): the base model inside, or the same.
        weights (`IO`, *optional*): what full fine-tuning found, in a file, so that no memory is measured for it.
        is_copy (`bool`): whether the method works on a copy of the base model.
    """

    model: nn.Module
    base: PreTrainedModel
    weights: IO[bytes] | None = None
    is_copy: bool = False

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def count_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trainable.values())

    def measure_bytes(self) -> int:
        """Size of the weights that are saved."""
        if not isinstance(self.model, PeftModel):
            return sum(parameter.nbytes for parameter in self.trainable.values())
        with tempfile.TemporaryDirectory() as directory:
            self.model.save_pretrained(directory, save_embedding_layers=False)
            return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))

    def save_trainable(self, path: Path) -> None:
        """Keep the trained parameters in a file."""
        torch.save({name: parameter.detach() for name, parameter in self.trainable.items()}, path)

    @torch.no_grad()
    def load_trainable(self, path: Path) -> None:
        """Put kept parameters in the place of those that the same method has now."""
        kept, own = torch.load(path), self.trainable
        if kept.keys() != own.keys():
            raise ValueError(f"{path} has other parameters than the method: {sorted(kept.keys() ^ own.keys())}.")
        for name, parameter in own.items():
            parameter.copy_(kept[name])


def build_method(
    peft_type: str,
    settings: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    init_text: str = "",
    examples: Sequence[Example] = (),
    task_type: str = "CAUSAL_LM",
) -> AppliedMethod:
    """Give a base model a method.

    Args:
        peft_type (`str`): one of `PEFT_TYPES`.
        settings (`dict`): fields of its configuration, and two more. `init` (see [`build_initial_tokens`]) says which
            tokens a prefix or a prompt starts from; they also give its length if `num_virtual_tokens` does not.
            `num_trained_tokens` freezes all virtual tokens but the last ones. Full fine-tuning takes only `dtype`,
            training of the head alone nothing.
        model (`PreTrainedModel`): the base model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        init_text (`str`): the task's, for `init`.
        examples (`Sequence[Example]`): the training set, for `init`.
        task_type (`str`): PEFT's. For `"SEQ_CLS"` the method gets a copy of the base model, as PEFT replaces its head.

    Returns:
        `AppliedMethod`: give it to [`remove_method`] when it is not needed any more.
    """
    if task_type == "CAUSAL_LM":
        return _build(peft_type, settings, model, tokenizer, init_text, examples, task_type)
    applied = _build(peft_type, settings, copy.deepcopy(model), tokenizer, init_text, examples, task_type)
    return AppliedMethod(applied.model, model, is_copy=True)


def _build(
    peft_type: str,
    settings: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    init_text: str,
    examples: Sequence[Example],
    task_type: str,
) -> AppliedMethod:
    if peft_type == FULL:
        return _train_everything(model, **settings)
    if peft_type == HEAD and task_type == "SEQ_CLS" and not settings:
        model.requires_grad_(False).classifier.requires_grad_(True)
        return AppliedMethod(model, model)
    if peft_type not in CONFIG_CLASSES:
        raise ValueError(
            f"Cannot build {peft_type!r} with the settings {settings} for {task_type}; use one of "
            f"{', '.join(PEFT_TYPES)}, HEAD only for classification and without settings."
        )
    fields, token_ids = dict(settings), None
    if "init" in fields:
        if peft_type not in _STARTS:
            raise ValueError(f"{peft_type} does not start from tokens; remove `init` from its settings.")
        token_ids = build_initial_tokens(fields.pop("init"), model, tokenizer, init_text, examples)
        token_ids = fit_token_ids(token_ids, fields.setdefault("num_virtual_tokens", len(token_ids)))
        if peft_type == "PREFIX_PLUS":
            fields["prefix_init_token_ids"] = token_ids
    if "num_trained_tokens" in fields:
        trained, length = fields.pop("num_trained_tokens"), fields.get("num_virtual_tokens", 0)
        if not 0 < trained <= length:
            raise ValueError(
                f"`num_trained_tokens` is {trained}, of {length} virtual tokens; train at least one, and give `init` "
                "or `num_virtual_tokens`."
            )
        fields["num_frozen_tokens"] = length - trained
    peft_model = get_peft_model(model, CONFIG_CLASSES[peft_type](task_type=task_type, **fields))
    if token_ids is not None:
        _STARTS[peft_type](peft_model, torch.tensor([token_ids], device=model.device))
    return AppliedMethod(peft_model, model)


def remove_method(method: AppliedMethod) -> PreTrainedModel:
    """Give back the base model as it was."""
    if method.is_copy:
        return method.base
    if method.weights is not None:
        method.weights.seek(0)
        weights = torch.load(method.weights)
        method.weights.close()
        for name, parameter in method.base.named_parameters():
            parameter.grad = None
            parameter.data = weights[name]
    elif not method.model.active_peft_config.is_prompt_learning:
        method.model.unload()
    return method.base.requires_grad_(True)


def stands_before_padding(model: nn.Module) -> bool:
    """Whether padding on the left comes between the virtual tokens and the text, at the positions of tokens."""
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type in (
        PeftType.PROMPT_TUNING,
        PeftType.P_TUNING,
    )


def _train_everything(model: PreTrainedModel, dtype: str | None = None) -> AppliedMethod:
    """Train the base model itself, if asked for in another dtype; buffers stay as they are."""
    weights = tempfile.TemporaryFile()  # noqa: SIM115, closed when the method is removed
    torch.save({name: parameter.detach() for name, parameter in model.named_parameters()}, weights)
    for parameter in model.requires_grad_(True).parameters():
        parameter.data = parameter.data.to(None if dtype is None else getattr(torch, dtype))
    return AppliedMethod(model, model, weights)


@torch.no_grad()
def _start_cache(peft_model: PeftModel, token_ids: torch.Tensor) -> None:
    """PEFT's way to fill a cache prefix; its function for texts wants at least as many tokens as the prefix has."""
    with peft_model.eval().disable_adapter():
        cache = peft_model(input_ids=token_ids, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(peft_model, past_key_values=cache)


@torch.no_grad()
def _start_prompt(peft_model: PeftModel, token_ids: torch.Tensor) -> None:
    """What `prompt_tuning_init="TEXT"` does, which would need a tokenizer that it can load by name."""
    encoder = peft_model.prompt_encoder[peft_model.active_adapter]
    encoder.embedding.weight.copy_(peft_model.get_input_embeddings()(token_ids[0]))


def _start_nothing(peft_model: PeftModel, token_ids: torch.Tensor) -> None:
    """The configuration has said it."""


_STARTS = {
    "PREFIX_PLUS": _start_nothing,
    "CARTRIDGE": _start_cache,
    "PREFIX_TUNING": _start_cache,
    "PROMPT_TUNING": _start_prompt,
}
