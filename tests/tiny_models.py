"""Tiny random models, one per architecture that the tests cover, built from configurations without a network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from byte_tokenizer import build_byte_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 96
MAX_POSITIONS = 64


@dataclass(frozen=True)
class Architecture:
    """What the tests know about an architecture.

    Attributes:
        name: its model type.
        build: makes the model.
        learned_positions: it has a table of absolute positions, so the input moves behind the prefix.
        sliding_window: tokens that a query of its sliding layers sees, if it has such layers.
    """

    name: str
    build: Callable[..., PreTrainedModel]
    learned_positions: bool = False
    sliding_window: int | None = None


def _builder(config_name: str, **settings: object) -> Callable[..., PreTrainedModel]:
    def build(**overrides: object) -> PreTrainedModel:
        config = getattr(transformers, config_name)(
            **{
                "vocab_size": VOCAB_SIZE,
                "max_position_embeddings": MAX_POSITIONS,
                # Larger than usual: with almost uniform attention a lost mask would hide below the tolerance.
                "initializer_range": 0.2,
                "bos_token_id": 1,
                "eos_token_id": None,
                "pad_token_id": 0,
            }
            | settings
            | overrides
        )
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


_ROTARY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _ROTARY | {"num_key_value_heads": 2}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", _builder("LlamaConfig", **_GROUPED)),
        Architecture("qwen3", _builder("Qwen3Config", **_GROUPED, head_dim=16)),
        Architecture(
            "gemma3_text",
            _builder(
                "Gemma3TextConfig",
                **(_GROUPED | {"num_hidden_layers": 4}),
                head_dim=16,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            sliding_window=16,
        ),
        Architecture("mistral", _builder("MistralConfig", **_GROUPED, sliding_window=16), sliding_window=16),
        Architecture("gpt_neox", _builder("GPTNeoXConfig", **_ROTARY)),
        Architecture("phi", _builder("PhiConfig", **_ROTARY)),
        Architecture(
            "gpt2",
            _builder("GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=MAX_POSITIONS),
            learned_positions=True,
        ),
        Architecture(
            "opt",
            _builder(
                "OPTConfig",
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
            ),
            learned_positions=True,
        ),
    )
}


def build_model(
    name: str,
    implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: object,
) -> PreTrainedModel:
    """Build a tiny model in evaluation mode; equal arguments give equal weights."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name].build(**overrides).to(dtype).eval()
    model.set_attn_implementation(implementation)
    return model


def build_chat_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, three special tokens, and a chat template."""
    return build_byte_tokenizer(
        "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
