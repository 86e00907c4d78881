"""What must hold for a model type that is called supported: one function a check."""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from zoo import build_inputs, build_tiny_model

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.architectures import belongs_to_text, explain_missing_attention, find_attention_modules

LENGTH = 7
INIT_TOKEN_IDS = [11, 23, 5, 42, 7]
ATOL, RTOL = 2e-4, 2e-3
# Layers that carry a state from token to token, which a prefix of keys and values does not stand for.
RECURRENT = re.compile(
    "Mamba|DeltaNet|DeltaAttention|ShortConv|LightningAttention|Compressor|HrmTextStack|Patcher|Rwkv|xLSTM"
)


class NotApplicableError(Exception):
    """A check says nothing about a type; the message is the reason."""


class FailedError(Exception):
    """A check does not hold; the message is by how much."""


@dataclass
class Subject:
    """A model type with a method.

    Attributes:
        group (`str`): of the zoo.
        model_type (`str`): of transformers.
        config (`Callable`): makes the method's configuration for a group.
    """

    group: str
    model_type: str
    config: Callable[[str, PreTrainedModel], PeftConfig]

    def build_base(self) -> PreTrainedModel:
        """A new base model; always with the same weights, frozen as PEFT freezes them, which may choose kernels."""
        return build_tiny_model(self.group, self.model_type).requires_grad_(False)

    @cached_property
    def base(self) -> PreTrainedModel:
        return self.build_base()

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return build_inputs(self.group, self.base, length=LENGTH)

    @cached_property
    def base_logits(self) -> Tensor:
        return run(self.base, self.inputs)

    def build(self) -> PeftModel:
        """The model with a prefix that is not as it was initialized, so that every parameter counts."""
        torch.manual_seed(0)
        base = self.build_base()
        model = get_peft_model(base, self.config(self.group, base)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in trainable(model):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        return model

    @cached_property
    def model(self) -> PeftModel:
        return self.build()

    @cached_property
    def logits(self) -> Tensor:
        return run(self.model, self.inputs)


def run(model: torch.nn.Module, inputs: dict[str, Tensor], **kwargs: object) -> Tensor:
    """The first output of a forward, in float32."""
    with torch.no_grad():
        output = model(**inputs, **kwargs)
    logits = output.logits if getattr(output, "logits", None) is not None else output[0]
    return logits.float()


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters that require gradients, without a head that the task brings."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def require_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise a [`FailedError`] unless two tensors agree."""
    if actual.shape != expected.shape:
        raise FailedError(f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if not torch.allclose(actual, expected, atol=ATOL, rtol=RTOL):
        raise FailedError(f"{what}: differs by {(actual - expected).abs().max().item():.1e}")


def check_forward(subject: Subject) -> None:
    """The model can be given a prefix, and the prefix changes the outputs."""
    if not find_attention_modules(subject.base):
        raise NotApplicableError(explain_missing_attention(subject.base).partition(".")[0])
    if not torch.isfinite(subject.logits).all():
        raise FailedError("outputs are not finite")
    if torch.allclose(subject.logits, subject.base_logits, atol=1e-5):
        raise FailedError("the prefix has no effect")


def check_gradients(subject: Subject) -> None:
    """All prefix parameters get gradients, and nothing else does."""
    model = subject.build()
    output = model(**subject.inputs)
    logits = output.logits if getattr(output, "logits", None) is not None else output[0]
    logits.float().square().mean().backward()
    without = [name for name, parameter in trainable(model) if parameter.grad is None or not parameter.grad.any()]
    if without:
        raise FailedError(f"{len(without)} parameters without a gradient, such as {without[0]}")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    touched = [name for name in frozen if model.get_parameter(name).grad is not None]
    if touched:
        raise FailedError(f"{len(touched)} frozen parameters have a gradient, such as {touched[0]}")


def check_disabled(subject: Subject) -> None:
    """With the adapter disabled the outputs are the base model's, bit for bit."""
    with subject.model.disable_adapter():
        logits = run(subject.model, subject.inputs)
    if not torch.equal(logits, subject.base_logits):
        raise FailedError(f"differs by {(logits - subject.base_logits).abs().max().item():.1e}")


def check_saved(subject: Subject) -> None:
    """A saved and loaded adapter gives the same outputs, bit for bit."""
    with tempfile.TemporaryDirectory() as directory:
        subject.model.save_pretrained(directory)
        if not list(Path(directory).glob("*.safetensors")):
            raise FailedError("nothing was written")
        loaded = PeftModel.from_pretrained(subject.build_base(), directory).eval()
    logits = run(loaded, subject.inputs)
    if not torch.equal(logits, subject.logits):
        raise FailedError(f"differs by {(logits - subject.logits).abs().max().item():.1e}")


def check_cached(subject: Subject) -> None:
    """Greedy generation with a cache gives the tokens of generation without one."""
    if not generates(subject):
        raise NotApplicableError("does not generate text")
    try:
        base = [generate(subject.base, subject, use_cache) for use_cache in (True, False)]
    except Exception as error:
        raise NotApplicableError(f"the base model cannot: {type(error).__name__}") from error
    if not torch.equal(*base):
        raise NotApplicableError("the base model's cached and uncached tokens differ")
    if subject.group == "causal" and not is_causal(subject):
        raise NotApplicableError("later tokens change earlier outputs")
    tokens = [generate(subject.model, subject, use_cache) for use_cache in (True, False)]
    if not torch.equal(*tokens):
        raise FailedError("tokens differ")


def generates(subject: Subject) -> bool:
    """Whether the type has a language model's head and the generation loop."""
    return subject.group in ("causal", "seq2seq", "multimodal") and subject.base.can_generate()


def generate(model: torch.nn.Module, subject: Subject, use_cache: bool) -> Tensor:
    """Greedy tokens."""
    inputs = {name: value for name, value in subject.inputs.items() if not name.startswith("decoder_")}
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache)


def check_padding(subject: Subject) -> None:
    """Left padding changes nothing, where it changes nothing for the base model."""
    ids = subject.inputs.get("input_ids")
    if ids is None or subject.group in ("encoder", "vision"):
        raise NotApplicableError("no text that would be padded on the left")
    padded = {**subject.inputs, "input_ids": torch.nn.functional.pad(ids, (3, 0))}
    padded["attention_mask"] = (torch.arange(padded["input_ids"].shape[1]) >= 3).long().expand(ids.shape[0], -1)
    width = subject.base_logits.shape[1]
    try:
        base = run(subject.base, padded)[:, -width:]
    except Exception as error:
        raise NotApplicableError(f"the base model refuses it: {type(error).__name__}") from error
    if not torch.allclose(base, subject.base_logits, atol=ATOL, rtol=RTOL):
        raise NotApplicableError("left padding changes the base model's outputs")
    require_close(run(subject.model, padded)[:, -width:], subject.logits, "left padding")


def check_exact(subject: Subject) -> None:
    """A prefix captured from real tokens acts exactly like the tokens as a prompt."""
    if subject.group not in ("causal", "multimodal") or "input_ids" not in subject.inputs:
        raise NotApplicableError("not a causal language model")
    recurrent = sorted(
        {
            type(module).__name__
            for name, module in subject.base.named_modules()
            if RECURRENT.search(type(module).__name__)
            or (isinstance(module, torch.nn.Conv1d) and belongs_to_text(subject.base, name))
        }
    )
    if recurrent:
        raise NotApplicableError(f"carries a state from token to token ({recurrent[0]})")
    if not is_causal(subject):
        raise NotApplicableError("later tokens change earlier outputs")
    ids = subject.inputs["input_ids"]
    prompt = torch.tensor(INIT_TOKEN_IDS).expand(*ids.shape[:-1], -1)
    prompted = {**subject.inputs, "input_ids": torch.cat([prompt, ids], dim=-1)}
    try:
        expected = run(subject.base, prompted)[:, len(INIT_TOKEN_IDS) :]
    except Exception as error:
        raise NotApplicableError(f"the base model refuses a longer text: {type(error).__name__}") from error
    base = subject.build_base()
    config = PrefixPlusConfig(prefix_init_token_ids=INIT_TOKEN_IDS, projection_dim=8)
    model = get_peft_model(base, config).eval()
    try:
        logits = run(model, subject.inputs)
    except TypeError as error:
        raise NotApplicableError(f"PEFT's class for the task does not pass what the model needs: {error}") from error
    require_close(logits, expected, "prefix and prompt")


def is_causal(subject: Subject) -> bool:
    """Measured: neither a change of the last token nor its absence changes the outputs before it."""
    ids = subject.inputs["input_ids"].clone()
    ids[:, -1] = ids[:, -1] % 50 + 7
    changed = run(subject.base, {**subject.inputs, "input_ids": ids})
    if not torch.allclose(changed[:, :-1], subject.base_logits[:, :-1], atol=1e-5):
        return False
    try:
        shorter = run(subject.base, {**subject.inputs, "input_ids": ids[..., :-1]})
    except Exception:
        # Some models demand a certain length beside their other inputs.
        return True
    return torch.allclose(shorter, changed[:, :-1], atol=1e-3)


CHECKS: dict[str, Callable[[Subject], None]] = {
    "forward": check_forward,
    "gradients": check_gradients,
    "disabled": check_disabled,
    "saved": check_saved,
    "cached": check_cached,
    "padding": check_padding,
    "exact": check_exact,
}
