"""Builds the methods that the benchmarks compare, from the words of an experiment file."""

from typing import Any

import peft
from peft import PeftModel, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix_plus import PrefixPlusConfig

CONFIG_CLASSES = {
    "PREFIX_PLUS": PrefixPlusConfig,
    "LORA": peft.LoraConfig,
    "CARTRIDGE": peft.CartridgeConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
}


def build_method(
    peft_type: str,
    settings: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    init_text: str,
) -> PeftModel:
    """Wrap a base model in one method.

    Args:
        peft_type (`str`): a key of `CONFIG_CLASSES`.
        settings (`dict`): fields of its configuration. The value `"$init_text"` stands for the task's init text.
        model (`PreTrainedModel`): the base model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        init_text (`str`): for methods that start from a text.

    Returns:
        `PeftModel`: ready for training.
    """
    fields = dict(settings)
    if fields.get("prefix_init_text") == "$init_text":
        del fields["prefix_init_text"]
        fields["prefix_init_token_ids"] = tokenizer(init_text, add_special_tokens=False)["input_ids"]
    peft_model = get_peft_model(model, CONFIG_CLASSES[peft_type](task_type="CAUSAL_LM", **fields))
    if peft_type == "CARTRIDGE":
        initialize_kv_prefix_from_text(peft_model, tokenizer, text=init_text, use_chat_template=False)
    return peft_model


def remove_method(peft_model: PeftModel) -> PreTrainedModel:
    """Give back the base model as it was."""
    base = peft_model.get_base_model() if peft_model.active_peft_config.is_prompt_learning else peft_model.unload()
    return base.requires_grad_(True)
