"""What must hold on a base model whose weights are quantized."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from checks import INIT_TOKEN_IDS, NotApplicableError
from laws_forward import Comparison, run
from mode_subjects import Builder, ModeSubject
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.integrations.gguf import kernels as gguf_kernels
from transformers.quantizers import quantizer_gguf

from peft_prefix_plus import PrefixPlusConfig

QUANTIZED_MODULES = ("GgufLinear", "Linear4bit", "HQQLinear", "QLinear")
QUANTIZED_WEIGHTS = ("Int8Tensor",)
TOKEN_IDS = torch.tensor([[9, 31, 57, 14, 8, 60, 22]])
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


def write_gguf(path: Path) -> None:
    """Write a tiny LFM2 that has attention in all of its layers, in blocks of 8 bits."""
    heads, kv_heads, hidden, intermediate, vocab_size = 4, 2, 64, 128, 96
    shapes = {"token_embd": (vocab_size, hidden)}
    norms = {"token_embd_norm": hidden}
    for index in range(2):
        block = f"blk.{index}."
        norms |= {block + name: hidden for name in ("attn_norm", "ffn_norm")}
        norms |= {block + name: hidden // heads for name in ("attn_q_norm", "attn_k_norm")}
        shapes |= {block + name: (hidden, hidden) for name in ("attn_q", "attn_output")}
        shapes |= {block + name: (hidden * kv_heads // heads, hidden) for name in ("attn_k", "attn_v")}
        shapes |= {block + name: (intermediate, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes[block + "ffn_down"] = (hidden, intermediate)
    writer = gguf.GGUFWriter(str(path), "lfm2")
    for name, size in (
        ("context_length", 64),
        ("embedding_length", hidden),
        ("feed_forward_length", intermediate),
        ("block_count", 2),
        ("attention.head_count", heads),
        ("shortconv.l_cache", 3),
    ):
        writer.add_uint32(f"lfm2.{name}", size)
    writer.add_array("lfm2.attention.head_count_kv", [kv_heads] * 2)
    writer.add_float32("lfm2.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("lfm2.rope.freq_base", 1e4)
    writer.add_token_list([str(index) for index in range(vocab_size)])
    generator = np.random.default_rng(0)
    blocks = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        weight = generator.normal(scale=0.2, size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, blocks), raw_dtype=blocks)
    for name, length in norms.items():
        writer.add_tensor(f"{name}.weight", np.ones(length, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build_packed_gguf(implementation: str) -> PreTrainedModel:
    """Load a GGUF file, its weights left in blocks; of Llama, transformers 5.23 unpacks such files."""
    kernel: Any = GgufStandIn()
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        write_gguf(Path(directory) / "tiny.gguf")
        patch.setattr(quantizer_gguf, "get_gguf_kernel", lambda: kernel)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            gguf_file="tiny.gguf",
            dtype=torch.float32,
            attn_implementation=implementation,
            quantization_config=transformers.GgufConfig(dequantize=False),
        )
    gguf_kernels._gguf_kernel = kernel
    return model.eval()


Quantize = Callable[[PreTrainedModel], dict[str, Any]] | None


def build_base(subject: ModeSubject, quantize: Quantize) -> PreTrainedModel:
    """Build a quantized base; with a `quantize` of `None`, a GGUF file kept packed."""
    name = subject.implementation.name
    base = build_packed_gguf(name) if quantize is None else build_quantized(quantize, name)
    if not find_quantized(base):
        raise NotApplicableError("the weights were not quantized")
    return base


def add_prefix(base: PreTrainedModel) -> PeftModel:
    """Give a base the prefix of some tokens."""
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=INIT_TOKEN_IDS, projection_dim=8)
    return get_peft_model(base, config).eval()


def law_quantized_base(subject: ModeSubject, build: Builder, quantize: Quantize) -> Comparison:
    """A captured prefix equals its prompt, generation equals recomputation, and without a prefix nothing changed."""
    base = build_base(subject, quantize)
    prompt = torch.tensor([INIT_TOKEN_IDS])
    expected = run(base, {"input_ids": torch.cat([prompt, TOKEN_IDS], dim=1)})[:, len(INIT_TOKEN_IDS) :]
    base_logits = run(base, {"input_ids": TOKEN_IDS})
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKEN_IDS)}
    model: Any = base if is_plain(build) else add_prefix(base)
    given = run(model, {"input_ids": TOKEN_IDS})
    tokens = [model.generate(input_ids=TOKEN_IDS, use_cache=use_cache, **settings) for use_cache in (True, False)]
    if is_plain(build):
        return Comparison([given, tokens[0]], [base_logits, tokens[1]])
    with model.disable_adapter():
        disabled = run(model, {"input_ids": TOKEN_IDS})
    return Comparison([given, tokens[0], disabled], [expected, tokens[1], base_logits])


def law_quantized_training(subject: ModeSubject, build: Builder, quantize: Quantize) -> Comparison:
    """The gradient of a prefix in a quantized base is the slope of the loss."""
    # In evaluation, bitsandbytes packs the weights for inference, and passes no gradients on from then on.
    base = build_base(subject, quantize).train()
    if is_plain(build):
        run(base, {"input_ids": TOKEN_IDS})
        for module in find_quantized(base):
            states = torch.randn(1, 7, module.in_features, requires_grad=True)
            output = module(states).sum()
            gradient = torch.autograd.grad(output, states, allow_unused=True)[0] if output.requires_grad else None
            if gradient is None or not gradient.any():
                raise ValueError(f"{type(module).__name__} passes no gradients on, once it has run without")
        return Comparison([], [])
    model = add_prefix(base)
    model.fold_prefix()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss
    gradients = torch.autograd.grad(loss, trained)
    losses = []
    for step in (1e-2, -1e-2):
        shift_parameters(trained, gradients, step)
        # With gradients, as without them some methods use another kernel.
        losses.append(model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss.detach())
        shift_parameters(trained, gradients, -step)
    slope = sum(gradient.square().sum() for gradient in gradients)
    return Comparison([(losses[0] - losses[1]) / 2e-2 / slope], [torch.tensor(1.0)])


@torch.no_grad()
def shift_parameters(parameters: list[nn.Parameter], directions: Iterable[torch.Tensor], step: float) -> None:
    """Add a step in some directions."""
    for parameter, direction in zip(parameters, directions, strict=True):
        parameter += step * direction


def is_plain(build: Builder) -> bool:
    """Whether a builder makes models without a prefix."""
    return not build.args[0]  # type: ignore[attr-defined]


def find_quantized(model: nn.Module) -> list[Any]:
    """The linear maps whose weights are quantized."""
    return [
        module
        for module in model.modules()
        if type(module).__name__ in QUANTIZED_MODULES
        or (isinstance(module, nn.Linear) and type(module.weight).__name__ in QUANTIZED_WEIGHTS)
    ]
