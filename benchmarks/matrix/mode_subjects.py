"""Which models and attention implementations the table of modes has, and how to build one of them."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import INIT_TOKEN_IDS, LENGTH, NotApplicableError, trainable
from matrix import configure_prefix_plus
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from zoo import NUM_PATCHES, PATCH_SIZE, build_inputs, build_tiny_model

from peft_prefix_plus.architectures import find_attention_modules, uses_attention_interface

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from flash_stand_in import FLASH_STAND_IN, register_flash_stand_in

USERS_OWN = "users_own"
NUM_VIRTUAL_TOKENS = len(INIT_TOKEN_IDS)
# A vision tower of Qwen2-VL cuts patches of its own size, and merges two by two.
QWEN_GRID = (4, 4)


@dataclass(frozen=True)
class Representative:
    """One model type that stands for a group of architectures.

    Attributes:
        title (`str`): the group.
        group (`str`): of the zoo.
        model_type (`str`): of transformers.
        has_image (`bool`): whether the text has an image in it.
    """

    title: str
    group: str
    model_type: str
    has_image: bool = False

    @property
    def name(self) -> str:
        return f"{self.model_type}+image" if self.has_image else self.model_type


REPRESENTATIVES = {
    representative.name: representative
    for representative in (
        Representative("rotary positions", "causal", "llama"),
        Representative("sliding window", "causal", "mistral"),
        Representative("sliding and full layers", "causal", "gemma3_text"),
        Representative("learned positions", "causal", "gpt2"),
        Representative("ALiBi, without the attention interface", "causal", "bloom"),
        Representative("latent attention", "causal", "deepseek_v3"),
        Representative("hybrid", "causal", "qwen3_next"),
        Representative("attention sinks", "causal", "gpt_oss"),
        Representative("soft-capping", "causal", "gemma2"),
        Representative("encoder-decoder, relative positions", "seq2seq", "t5"),
        Representative("encoder-decoder, learned positions", "seq2seq", "bart"),
        Representative("encoder", "encoder", "bert"),
        Representative("encoder without the attention interface", "encoder", "deberta-v2"),
        Representative("multimodal, positions of several coordinates", "multimodal", "qwen2_vl"),
        Representative("multimodal, positions of several coordinates", "multimodal", "qwen2_vl", has_image=True),
        Representative("multimodal", "multimodal", "llava"),
        Representative("multimodal", "multimodal", "llava", has_image=True),
        Representative("vision", "vision", "vit"),
        Representative("speech", "seq2seq", "whisper"),
    )
}


def attend_by_hand(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as a user may write it, for the masks of `eager`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for added in (position_bias, attention_mask):
        scores = scores if added is None else scores + added[..., : key.shape[-2]]
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = nn.functional.dropout(scores.softmax(-1), p=dropout, training=module.training)
    return (weights[..., : key.shape[-2]] @ value).transpose(1, 2).contiguous(), None


@dataclass
class Implementation:
    """A way to choose the attention function.

    Attributes:
        name (`str`): for `set_attn_implementation`.
        title (`str`): for the table.
        flag (`str`, *optional*): what a model class says about its support.
        switches (`bool`): whether it is chosen after the prefix was put in, from `eager`.
        prepare (`Callable`): a context for a model type, in which it can be used.
    """

    name: str
    title: str
    flag: str | None = None
    switches: bool = False
    prepare: Callable[["ModeSubject"], contextlib.AbstractContextManager[None]] = field(
        default=lambda subject: contextlib.nullcontext()
    )


@contextlib.contextmanager
def _without_compilation(subject: "ModeSubject") -> Iterator[None]:
    """Flex attention compiles for minutes on a CPU; eagerly it is quick, and the same."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@contextlib.contextmanager
def _with_flash(subject: "ModeSubject") -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register_flash_stand_in(patch)
        # Some types take certain kernels only, such as those with attention sinks.
        patch.setattr(type(subject.base), "_compatible_flash_implementations", [FLASH_STAND_IN])
        yield


@contextlib.contextmanager
def _with_local_interface(subject: "ModeSubject") -> Iterator[None]:
    """An instance of the interface in one modeling file, whose `eager` is the user's."""
    routed = [module for module in find_attention_modules(subject.base).values() if uses_attention_interface(module)]
    if not routed:
        raise NotApplicableError("its attention modules do not ask the attention interface")
    with pytest.MonkeyPatch.context() as patch:
        for module in {sys.modules[type(module).__module__] for module in routed}:
            interface = AttentionInterface()
            interface[USERS_OWN] = attend_by_hand
            patch.setattr(module, "ALL_ATTENTION_FUNCTIONS", interface)
        # `set_attn_implementation` looks the name up in the interface of the library.
        patch.setitem(AttentionInterface._global_mapping, USERS_OWN, _never)
        patch.setitem(AttentionMaskInterface._global_mapping, USERS_OWN, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        yield


@contextlib.contextmanager
def _with_registered_function(subject: "ModeSubject") -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, USERS_OWN, attend_by_hand)
        patch.setitem(AttentionMaskInterface._global_mapping, USERS_OWN, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        yield


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the function of the library was called instead of the local one")


IMPLEMENTATIONS = {
    "eager": Implementation("eager", "`eager`"),
    "sdpa": Implementation("sdpa", "`sdpa`", "_supports_sdpa"),
    "flash": Implementation(FLASH_STAND_IN, "flash (stand-in kernel)", "_supports_flash_attn", prepare=_with_flash),
    "flex": Implementation(
        "flex_attention", "`flex_attention` (not compiled)", "_supports_flex_attn", prepare=_without_compilation
    ),
    "local": Implementation(USERS_OWN, "local `AttentionInterface`", prepare=_with_local_interface),
    "registered": Implementation(USERS_OWN, "registered function", prepare=_with_registered_function),
    "switched": Implementation("sdpa", "switched from `eager` to `sdpa`", "_supports_sdpa", switches=True),
}


@dataclass
class ModeSubject:
    """A model type on one attention implementation.

    Attributes:
        representative ([`Representative`]): the type.
        implementation ([`Implementation`]): how its attention is computed.
    """

    representative: Representative
    implementation: Implementation

    @property
    def group(self) -> str:
        return self.representative.group

    @cached_property
    def base(self) -> PreTrainedModel:
        """A base model to ask about the type; never run."""
        return build_tiny_model(self.group, self.representative.model_type)

    @cached_property
    def uses_interface(self) -> bool:
        """Whether all of its attention modules ask the attention interface."""
        return all(uses_attention_interface(module) for module in find_attention_modules(self.base).values())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        inputs = build_inputs(self.group, self.base, length=LENGTH)
        return add_image(self.base, inputs) if self.representative.has_image else inputs

    def check_applicable(self) -> None:
        """Raise a [`NotApplicableError`] if transformers does not offer the implementation for this type."""
        flag = self.implementation.flag
        if flag is not None and not getattr(self.base, flag):
            title = flag.removeprefix("_supports_").replace("_", " ")
            raise NotApplicableError(f"transformers has no {title} for {type(self.base).__name__}")
        if self.implementation.name != "eager" and not any(
            uses_attention_interface(module) for module in find_attention_modules(self.base).values()
        ):
            raise NotApplicableError("its attention modules do not ask the attention interface")

    def build(self, has_prefix: bool, name: str | None = None, seed: int = 0) -> PreTrainedModel | PeftModel:
        """Build the model; equal arguments give equal weights.

        Args:
            has_prefix (`bool`): whether it gets a prefix, which is not as it was initialized.
            name (`str`, *optional*): another attention implementation.
            seed (`int`, defaults to 0): of the base model.
        """
        switches = self.implementation.switches and name is None
        base = build_tiny_model(self.group, self.representative.model_type, seed).requires_grad_(False)
        set_implementation(base, "eager" if switches else name or self.implementation.name)
        if has_prefix:
            torch.manual_seed(0)
            model = get_peft_model(base, configure_prefix_plus(self.group, base)).eval()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for _, parameter in trainable(model):
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        else:
            model = base
        if switches:
            set_implementation(model, self.implementation.name)
        return model

    def builder(self, has_prefix: bool) -> "Builder":
        """[`build`] for one side of a comparison."""
        return partial(self.build, has_prefix)


Builder = Callable[..., Any]


def set_implementation(model: nn.Module, name: str) -> None:
    """Choose the attention function of a model, and make sure that it was chosen."""
    model.set_attn_implementation(name)  # type: ignore[operator]
    chosen = {
        module.config._attn_implementation
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and hasattr(module, "config")
    }
    if chosen - {name, "eager"} or (name not in chosen):
        raise ValueError(f"asked for {name!r}, got {chosen}")


def unwrap(model: nn.Module) -> nn.Module:
    """The model of transformers, with or without a prefix in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def add_image(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put an image in front of every text."""
    config: Any = model.config
    ids = inputs["input_ids"]
    generator = torch.Generator().manual_seed(3)
    if config.model_type == "qwen2_vl":
        vision = config.vision_config
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        num_places = math.prod(QWEN_GRID) // vision.spatial_merge_size**2
        image = {
            "pixel_values": torch.randn(len(ids) * math.prod(QWEN_GRID), patch_dim, generator=generator),
            "image_grid_thw": torch.tensor([[1, *QWEN_GRID]]).expand(len(ids), -1),
        }
    else:
        size = PATCH_SIZE * math.isqrt(NUM_PATCHES)
        num_places = NUM_PATCHES
        image = {"pixel_values": torch.randn(len(ids), 3, size, size, generator=generator)}
    places = torch.full((len(ids), num_places), config.image_token_id)
    ids = torch.cat([ids[:, :1], places, ids[:, 1:]], dim=1)
    if config.model_type == "qwen2_vl":
        image["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return {"input_ids": ids, **image}
