"""What must hold on a base model whose weights are quantized."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from checks import INIT_TOKEN_IDS, NotApplicableError
from laws_forward import Comparison, run
from mode_subjects import Builder, ModeSubject, set_implementation
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.integrations.gguf import kernels as gguf_kernels

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.base_models import find_wheel_model

# Wide enough for the blocks of every method.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def quantize_bitsandbytes(model: PreTrainedModel) -> dict[str, Any]:
    """Four bits of bitsandbytes."""
    return {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)}


def quantize_torchao(model: PreTrainedModel) -> dict[str, Any]:
    """Weights of eight bits of torchao."""
    from torchao.quantization import Int8WeightOnlyConfig

    return {"quantization_config": transformers.TorchAoConfig(Int8WeightOnlyConfig())}


def quantize_hqq(model: PreTrainedModel) -> dict[str, Any]:
    """Four bits of HQQ."""
    return {"quantization_config": transformers.HqqConfig(nbits=4, group_size=64)}


def quantize_quanto(model: PreTrainedModel) -> dict[str, Any]:
    """Weights of eight bits of quanto."""
    return {"quantization_config": transformers.QuantoConfig(weights="int8")}


def build_quantized(quantize: Callable[[PreTrainedModel], dict[str, Any]], implementation: str) -> PreTrainedModel:
    """Save a tiny Llama, and load it quantized."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, num_key_value_heads=2, initializer_range=0.2, eos_token_id=None, pad_token_id=0, **SIZES
    )
    model = AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=implementation, **quantize(model)
        ).eval()


class GgufStandIn:
    """In place of the kernel of the Hub: unpacks the blocks in plain torch, on a CPU."""

    gemv_types = frozenset(range(64))

    def supports(self, ggml_type: int) -> bool:
        return True

    def mul_mat_vec(self, weight: torch.Tensor, x: torch.Tensor, ggml_type: int, out_features: int) -> torch.Tensor:
        rows = gguf_kernels.dequantize_blocks(weight, ggml_type, out_features, x.shape[-1], torch.float32)
        return x.float() @ rows.T


def build_packed_gguf(implementation: str) -> PreTrainedModel:
    """SmolLM2-135M-Instruct with its weights left in the blocks of its file."""
    from transformers.quantizers import quantizer_gguf

    path = find_wheel_model()
    kernel = GgufStandIn()
    original = quantizer_gguf.get_gguf_kernel
    gguf_kernels._gguf_kernel = quantizer_gguf.get_gguf_kernel = lambda: kernel  # type: ignore[assignment]
    gguf_kernels._gguf_kernel = kernel  # type: ignore[assignment]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=torch.float32,
            attn_implementation=implementation,
            quantization_config=transformers.GgufConfig(dequantize=False),
        )
    finally:
        quantizer_gguf.get_gguf_kernel = original
    if not any(type(module).__name__ == "GgufLinear" for module in model.modules()):
        raise NotApplicableError("transformers unpacked the file")
    return model.eval()


def law_quantized_base(
    subject: ModeSubject, build: Builder, quantize: Callable[[PreTrainedModel], dict[str, Any]] | None
) -> Comparison:
    """On a quantized base a captured prefix equals its prompt, generation equals recomputation, and the prefix trains.

    With a `quantize` of `None`, the base is a GGUF file kept packed.
    """
    name = subject.implementation.name
    base = build_packed_gguf(name) if quantize is None else build_quantized(quantize, name)
    if not any("quant" in str(type(value)).lower() or "uint8" in str(value.dtype) for value in _weights(base)):
        raise NotApplicableError("the weights were not quantized")
    ids = torch.tensor([[9, 31, 57, 14, 8, 60, 22]])
    prompt = torch.tensor([INIT_TOKEN_IDS])
    expected = run(base, {"input_ids": torch.cat([prompt, ids], dim=1)})[:, len(INIT_TOKEN_IDS) :]
    base_logits = run(base, {"input_ids": ids})
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    model: Any = base
    if not is_plain(build):
        config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=INIT_TOKEN_IDS, projection_dim=8)
        model = get_peft_model(base, config).eval()
        given = run(model, {"input_ids": ids})
    else:
        given = expected
    tokens = [model.generate(input_ids=ids, use_cache=use_cache, **settings) for use_cache in (True, False)]
    if isinstance(model, PeftModel):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained):
            raise ValueError("parameters of the prefix have no gradient")
        model.eval()
        with model.disable_adapter():
            disabled = run(model, {"input_ids": ids})
    else:
        disabled = base_logits
    return Comparison([given, tokens[0], disabled], [expected, tokens[1], base_logits])


def is_plain(build: Builder) -> bool:
    """Whether a builder makes models without a prefix."""
    return not build.args[0]  # type: ignore[attr-defined]


def _weights(model: nn.Module) -> list[Any]:
    return [
        getattr(module, "weight", None) for module in model.modules() if getattr(module, "weight", None) is not None
    ]
