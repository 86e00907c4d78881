"""Tiny random models, a tokenizer and data that the behaviours run on; nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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

# Larger than usual, so that attention is far from uniform and a prefix matters.
INITIALIZER_RANGE = 0.2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special tokens, and a chat template."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


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
    return AutoModelForCausalLM.from_config(_llama_config()).eval()


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
        if adapter_name in name.split(".") or ("prompt_encoder" in name and adapter_name in name):
            parameter += size * torch.randn(parameter.shape, generator=generator)


def assert_close(given: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Fail unless two tensors agree."""
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=tolerance)


def assert_differ(given: torch.Tensor, other: torch.Tensor) -> None:
    """Fail if two tensors agree: an adapter that does nothing passes too many other checks."""
    if torch.allclose(given, other, atol=1e-4):
        raise AssertionError("The adapter has no effect.")
