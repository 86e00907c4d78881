"""Tiny random models, a tokenizer and data that the behaviours run on; nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import build_byte_tokenizer
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .methods import Method

# Larger than usual, so that attention is far from uniform and a prefix matters.
INITIALIZER_RANGE = 0.2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special tokens, and a chat template."""
    return build_byte_tokenizer(
        "{% for message in messages %}<{{ message['role'] }}>"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def _llama_config(**settings: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )


def build_causal_lm(seed: int = 0) -> PreTrainedModel:
    """A Llama with two layers; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_llama_config()).eval()
    # No continuation ends early.
    model.generation_config.eos_token_id = None
    return model


def build_classifier(seed: int = 0) -> PreTrainedModel:
    """The same Llama with a head for three classes."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(_llama_config(num_labels=3)).eval()


def build_seq2seq_lm(seed: int = 0) -> PreTrainedModel:
    """A BART with two layers on each side."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=259,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        init_std=INITIALIZER_RANGE,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def save_base_model(directory: Path) -> str:
    """Write the Llama and the tokenizer to a directory, which stands in for a repository of the Hub."""
    build_causal_lm().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return str(directory)


def draw_tokens(batch_size: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Ids of random bytes, `[batch_size, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (batch_size, length), generator=generator)


@torch.no_grad()
def perturb(model: nn.Module, adapter_name: str = "default", size: float = 0.3, seed: int = 2) -> None:
    """Move the parameters of an adapter away from where they start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter += size * torch.randn(parameter.shape, generator=generator)


def build_adapted(
    method: Method, adapter_name: str = "default", size: int = 4, seed: int = 2, **fields: Any
) -> PeftModel:
    """The Llama with an adapter whose parameters are not those of the start any more, in evaluation."""
    config = method.build_config(size=size, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(build_causal_lm(), config, adapter_name=adapter_name)
    perturb(model, adapter_name, seed=seed)
    return model.eval()


def add_adapter(
    model: PeftModel, method: Method, adapter_name: str, size: int = 6, seed: int = 3, **fields: Any
) -> None:
    """Give a model one more adapter, with parameters of its own; the active one stays active."""
    model.add_adapter(adapter_name, method.build_config(size=size, task_type="CAUSAL_LM", **fields))
    perturb(model, adapter_name, seed=seed)
    model.eval()


def take_steps(model: nn.Module, steps: int = 4, learning_rate: float = 1e-2) -> list[float]:
    """Train on one batch with AdamW in a plain loop; the losses before each step."""
    model.train()
    ids = draw_tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def compute_logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits for some ids, in evaluation."""
    return model.eval()(input_ids=draw_tokens() if ids is None else ids).logits.clone()


@torch.no_grad()
def continue_greedily(model: nn.Module, ids: torch.Tensor, steps: int = 6) -> torch.Tensor:
    """What greedy generation has to give: one forward over all tokens for each new one, without a cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def warm_up() -> None:
    """Import what the libraries import late, without starting threads: processes are forked from this one."""
    model = build_causal_lm()
    model.generate(draw_tokens(), max_new_tokens=1)
    build_classifier()
    build_seq2seq_lm()
    build_tokenizer()


def assert_close(given: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Fail unless two tensors agree."""
    if given.shape != expected.shape:
        raise AssertionError(f"The shape is {tuple(given.shape)} instead of {tuple(expected.shape)}.")
    if not torch.allclose(given, expected, atol=tolerance, rtol=tolerance):
        raise AssertionError(f"The values are wrong by up to {(given - expected).abs().max():.1g}.")


def assert_same_tokens(given: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail unless two batches of ids are equal."""
    if given.tolist() != expected.tolist():
        raise AssertionError("The tokens are wrong.")


def assert_decreases(losses: list[float]) -> None:
    """Fail unless training made a loss smaller."""
    if not losses[-1] < losses[0]:
        raise AssertionError("The loss does not decrease.")


def assert_differ(given: torch.Tensor, other: torch.Tensor) -> None:
    """Fail if two tensors agree: an adapter that does nothing passes too many other checks."""
    if torch.allclose(given, other, atol=1e-4):
        raise AssertionError("The adapter has no effect.")


def check_message(error: Exception, words: str) -> None:
    """Raise an error again unless its message has some words in it."""
    if words not in str(error):
        raise error
