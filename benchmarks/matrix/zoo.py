"""Tiny random models of every model type that transformers knows, from configurations alone.

A configuration starts from the defaults of its class. `SIZES` lowers numbers by the names of their fields, every kind
of layer gets one layer, and `OVERRIDES` holds what such rules get wrong.
"""

import copy
import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB_SIZE = 96
PAD_TOKEN_ID, BOS_TOKEN_ID = 0, 1
# Ids of text lie between these two; above are those of images, sounds and the like.
FIRST_TEXT_ID, FIRST_SPECIAL_ID = 2, 80
IMAGE_SIZE, PATCH_SIZE = 64, 16
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
NUM_MEL_BINS, NUM_FRAMES, NUM_SAMPLES = 16, 128, 1600
# Generation never stops early. The last entry is what musicgen's own `generate` expects to find.
GENERATION = {"eos_token_id": None, "decoder_start_token_id": BOS_TOKEN_ID, "num_return_sequences": 1}

# Where transformers lists the types of a group, and the class that builds them. The first mapping with a type wins.
MAPPINGS = {
    "causal": [("CAUSAL_LM", "AutoModelForCausalLM")],
    "seq2seq": [
        ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM"),
        ("SPEECH_SEQ_2_SEQ", "AutoModelForSpeechSeq2Seq"),
    ],
    "encoder": [("MASKED_LM", "AutoModelForMaskedLM")],
    "multimodal": [("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText")],
    "vision": [("IMAGE_CLASSIFICATION", "AutoModelForImageClassification")],
}
GROUPS: tuple[str, ...] = tuple(MAPPINGS)
# Vision towers without a head of their own.
BARE_VISION_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov3_vit")
# Types that their auto class cannot build, their model class, and the sub-configuration it reads (`None`: the whole).
DIRECT: dict[tuple[str, str], tuple[str, str | None]] = {
    ("causal", "musicgen"): ("MusicgenForCausalLM", "decoder"),
    ("causal", "musicgen_melody"): ("MusicgenMelodyForCausalLM", "decoder"),
    ("multimodal", "evolla"): ("EvollaForProteinText2Text", None),
}

# Fields of a configuration by name. The first pattern that matches the whole name decides; a number is only lowered.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(max_window|num_dense)_layers|first_k_dense_replace", 1),
    (r"n_group|num_expert_group|topk_group", 1),
    (r".*(key_value|kv)_heads|n_groups|.*ngroups|altup_num_inputs", 2),
    (r".*(head_dim|head_size)|dim_head|d_head|d_kv|kv_channels|hidden_size_per_layer_input", 8),
    (r".*heads?", 4),
    (r".*(layers?|depth|num_blocks)", 2),
    (r"codebook_size", 64),
    (r".*(vocab_size|group_vocab).*|num_embeddings|ngram_vocab_size_base", VOCAB_SIZE),
    (r".*(experts_per_tok|experts_per_token|moe_k|moe_topk|top_k|expert_num)", 2),
    (r".*experts", 4),
    (r".*(intermediate|ffn|feed_forward).*|d_ff|dff|dim_ff|d_inner|mlp_dim", 48),
    (r".*_rank|hc_lowrank", 8),
    (r".*(window|d_state|state_size|attn_chunk_length).*|(mamba_|attention_)?chunk_size|index_topk|num_buckets", 16),
    (r".*(position_embeddings|positions)|n_positions|n_ctx|max_seq_len", 64),
    (r"image_size", IMAGE_SIZE),
    (r"patch_size", PATCH_SIZE),
    (r"num_mel_bins", NUM_MEL_BINS),
    (r"depths", 1),
    (r"conv_dim", 32),
    (r".*(hidden|embed|proj).*(size|dim|sizes|dims)|hidden_size_.*|d_model|n_embd|dim|emb_dim", 32),
    (r"(.*_)?(embedding|output|input|in|out)_(size|dim)", 32),
    (r".*channels?", 32),
    (r"index_block_size|index_topk_blocks", 4),
)
INITIALIZERS = ("initializer_range", "init_std", "initializer_factor")
INITIALIZER_RANGE = 0.2
# Lists with one entry per layer, whose kinds shall all appear, and the names of the number of layers.
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attn_layers")
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

FULL_AND_SLIDING = ["full_attention", "sliding_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
MROPE_TYPES = (
    "cosmos3_edge_text",
    "glm4v_text",
    "glm4v_moe_text",
    "glm_ocr_text",
    "hunyuan_vl_text",
    "paddleocr_vl_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
)
SPECIAL_ID = VOCAB_SIZE - 1
VQGAN = {"channel_multiplier": (1, 1), "num_res_blocks": 1}
VIBEVOICE_CODEC = {"downsampling_ratios": (2, 2), "depths": (1, 1, 1), "num_filters": 4}
SWIN = {
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (2, 4),
    "window_size": 4,
    "patch_size": 4,
    "pretrained_window_sizes": (0, 0),
}
SIGLIP = {"model_type": "siglip_vision_model"}

# What the rules above get wrong or leave uninteresting, by the model type of a configuration or sub-configuration.
# The value of a sub-configuration without a type of its own is a `dict` within its parent's.
OVERRIDES: dict[str, dict[str, Any]] = {
    **{name: {"logit_scale": 1.0} for name in ("cohere", "cohere2", "cohere2_moe")},
    **{name: {"rope_parameters": MROPE} for name in MROPE_TYPES},
    # The sparse form needs long texts.
    **{name: {"attention_type": "original_full"} for name in ("big_bird", "bigbird_pegasus")},
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "blip-2": {"num_query_tokens": 2},
    "blt": {"num_hidden_layers": 2},
    "chameleon": {"vocabulary_map": {"<image>": SPECIAL_ID}},
    "chameleon_vqgan": VQGAN,
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": FULL_AND_SLIDING,
        "rope_parameters": dict.fromkeys(FULL_AND_SLIDING, MROPE),
    },
    "cvt": {"num_heads": (1, 2, 4), "depth": (1, 2, 3)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 32]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "diffusion_gemma_text": {
        "global_head_dim": 16,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "donut-swin": SWIN,
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "layer_types": FULL_AND_SLIDING,
    },
    "dots3_note_text": {
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "emu3": {"vocabulary_map": {"<image>": SPECIAL_ID, "<|extra_200|>": SPECIAL_ID - 1}},
    "emu3_vqgan": VQGAN,
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]},
    },
    "esm": {"vocab_size": VOCAB_SIZE, "mask_token_id": SPECIAL_ID},
    "esmc": {"num_key_value_heads": 4, "vocab_size": VOCAB_SIZE},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "fast_vlm": {"vision_config": SIGLIP},
    "flint": {"mlp_only_layers": [0]},
    "focalnet": {"embed_dim": 16, "depths": (1, 1), "hidden_sizes": (16, 32), "patch_size": 4},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [(-1, 0)],
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "hiera": {"embed_dim": 8, "depths": (1, 1, 1, 1)},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "inkling_vision": {"num_hidden_layers": 3, "patch_size": 2},
    "instructblip": {"num_query_tokens": 2},
    "instructblipvideo": {"num_query_tokens": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus_vqgan": VQGAN,
    "kosmos-2": {"latent_query_num": 2},
    "kyutai_speech_to_text": {"num_codebooks": 4},
    "laguna": {"layer_types": FULL_AND_SLIDING},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "mellum": {"layer_types": FULL_AND_SLIDING},
    "mimi": {"upsample_groups": 32, "upsampling_ratios": [2, 2], "num_quantizers": 4},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "ministral": {"layer_types": FULL_AND_SLIDING},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevitv2": {"width_multiplier": 0.25, "base_attn_unit_dims": (64, 64, 64), "n_attn_blocks": (1, 1, 1)},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine_streaming_encoder": {"sliding_windows": [[16, 4], [16, 0]]},
    "moshi": {"num_codebooks": 4},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron_h": {"mamba_head_dim": 16},
    "neomme": {"head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "perceiver": {"d_latents": 32, "num_self_attends_per_block": 2, "num_latents": 16, "image_size": IMAGE_SIZE},
    "perception_lm": {"vision_config": {**SIGLIP, "model_args": {"embed_dim": 32}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": SPECIAL_ID},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": SPECIAL_ID},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
    },
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "hash_seed": 0, "num_buckets": 4},
    "shieldgemma2": {"yes_token_index": SPECIAL_ID, "no_token_index": SPECIAL_ID - 1},
    "siglip2_vision_model": {"num_patches": NUM_PATCHES},
    "step3p5": {
        "layer_types": FULL_AND_SLIDING,
        "rope_parameters": dict.fromkeys(FULL_AND_SLIDING, ROPE),
        "sliding_window": 16,
    },
    "swin": SWIN,
    "swinv2": SWIN,
    "vibevoice_acoustic_tokenizer": VIBEVOICE_CODEC,
    "vibevoice_acoustic_tokenizer_encoder": VIBEVOICE_CODEC,
    "whisper": {"begin_suppress_tokens": None},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 16},
}


@dataclasses.dataclass
class Draw:
    """Draws a batch of one thing or another."""

    config: PreTrainedConfig
    batch_size: int
    length: int
    generator: torch.Generator

    def tokens(self, *shape: int) -> Tensor:
        """Ids of text, `[batch, length, *shape]`."""
        size = (self.batch_size, self.length, *shape)
        return torch.randint(FIRST_TEXT_ID, FIRST_SPECIAL_ID, size, generator=self.generator)

    def values(self, *shape: int) -> Tensor:
        """Numbers, `[batch, *shape]`."""
        return torch.randn(self.batch_size, *shape, generator=self.generator)

    def pixels(self, *shape: int) -> Tensor:
        """One image a row, `[batch, *shape, channels, height, width]`."""
        return self.values(*shape, 3, IMAGE_SIZE, IMAGE_SIZE)

    def tokens_after(self, special_id: int) -> Tensor:
        """Ids of text behind two places for an image, `[batch, 2 + length]`."""
        return torch.cat([torch.full((self.batch_size, 2), special_id), self.tokens()], dim=1)


MAIN_INPUTS: dict[str, Callable[[Draw], Tensor]] = {
    "input_ids": Draw.tokens,
    "inputs": Draw.pixels,
    "pixel_values": Draw.pixels,
    "input_features": lambda draw: draw.values(NUM_MEL_BINS, NUM_FRAMES),
    "input_values": lambda draw: draw.values(NUM_SAMPLES),
}
# Types that need more than their main input, or another shape of it.
INPUTS: dict[str, Callable[[Draw], dict[str, Tensor]]] = {
    **dict.fromkeys(
        ("canary", "cohere_asr"),
        lambda draw: {
            "input_features": draw.values(NUM_FRAMES, NUM_MEL_BINS),
            "decoder_input_ids": draw.tokens(),
        },
    ),
    "blip": lambda draw: {"input_ids": draw.tokens(), "pixel_values": draw.pixels()},
    "blip-2": lambda draw: {"input_ids": draw.tokens_after(draw.config.image_token_id), "pixel_values": draw.pixels()},
    "dia": lambda draw: {"input_ids": draw.tokens(), "decoder_input_ids": draw.tokens(9)},
    "idefics": lambda draw: {
        "input_ids": draw.tokens(),
        "pixel_values": draw.pixels(1),
        "image_attention_mask": torch.ones(draw.batch_size, draw.length, 1, dtype=torch.long),
    },
    "instructblip": lambda draw: {
        "input_ids": draw.tokens_after(draw.config.image_token_id),
        "pixel_values": draw.pixels(),
        "qformer_input_ids": draw.tokens(),
    },
    "instructblipvideo": lambda draw: {
        "input_ids": draw.tokens_after(draw.config.video_token_index),
        "pixel_values": draw.pixels(1),
        "qformer_input_ids": draw.tokens(),
    },
    "kosmos-2": lambda draw: {
        "input_ids": draw.tokens(),
        "pixel_values": draw.pixels(),
        "image_embeds_position_mask": (torch.arange(draw.length) < 2).expand(draw.batch_size, -1),
    },
    "kyutai_speech_to_text": lambda draw: {"input_ids": draw.tokens(5)},
    "pi0": lambda draw: {
        "input_ids": draw.tokens(),
        "pixel_values": draw.pixels(1),
        "pixel_attention_mask": torch.ones(draw.batch_size, 1, dtype=torch.bool),
        "state": draw.values(32),
        "noise": draw.values(16, 32),
        "timestep": draw.values().sigmoid(),
    },
    "pix2struct": lambda draw: {
        "flattened_patches": draw.values(NUM_PATCHES, 2 + 32).abs(),
        "decoder_input_ids": draw.tokens(),
    },
    "pp_formulanet": lambda draw: {"pixel_values": draw.pixels(), "decoder_input_ids": draw.tokens()},
    "siglip2": lambda draw: {
        "pixel_values": draw.values(NUM_PATCHES, 3 * PATCH_SIZE**2),
        "pixel_attention_mask": torch.ones(draw.batch_size, NUM_PATCHES, dtype=torch.long),
        "spatial_shapes": torch.full((draw.batch_size, 2), IMAGE_SIZE // PATCH_SIZE),
    },
    "speech-encoder-decoder": lambda draw: {
        "input_values": draw.values(NUM_SAMPLES),
        "decoder_input_ids": draw.tokens(),
    },
    "speech_to_text": lambda draw: {
        "input_features": draw.values(NUM_FRAMES, 32),
        "decoder_input_ids": draw.tokens(),
    },
    "udop": lambda draw: {
        "input_ids": draw.tokens(),
        "bbox": draw.values(draw.length, 4).sigmoid(),
        "decoder_input_ids": draw.tokens(),
    },
    "voxtral_realtime": lambda draw: {
        "input_ids": draw.tokens(),
        "input_features": draw.values(NUM_MEL_BINS, 8 * draw.length),
    },
}

NEEDS_TARGET = "it drafts for another model, and its forward reads that model's hidden states, keys and values"
NEEDS_TIMM = "its vision tower is a model of timm, which is not installed"
UNBUILDABLE: dict[tuple[str, str], str] = {
    ("causal", "gemma3n"): NEEDS_TIMM,
    ("multimodal", "gemma3n"): NEEDS_TIMM,
    ("vision", "timm_wrapper"): NEEDS_TIMM,
    ("vision", "dinat"): "its attention needs natten, which is not installed",
    ("causal", "gemma4_assistant"): NEEDS_TARGET,
    ("causal", "gemma4_unified_assistant"): NEEDS_TARGET,
}


def list_model_types(group: str) -> list[str]:
    """Name the model types of a group that can be built, in the order of transformers.

    Args:
        group (`str`): one of `GROUPS`.

    Returns:
        `list[str]`: without the types in `UNBUILDABLE`.
    """
    return [name for name in _find_auto_classes(group) if (group, name) not in UNBUILDABLE]


def build_tiny_model(group: str, model_type: str, seed: int = 0) -> PreTrainedModel:
    """Build a random model of one type.

    Args:
        group (`str`): one of `GROUPS`; decides which head the model gets.
        model_type (`str`): a type of that group, e.g. `"llama"`.
        seed (`int`, defaults to 0): of its parameters.

    Returns:
        `PreTrainedModel`: in eval mode and float32.

    Raises:
        `ValueError`: if the group has no such type, or the type cannot be built here.
    """
    auto_classes = _find_auto_classes(group)
    if model_type not in auto_classes:
        raise ValueError(f"{model_type!r} is not a model type of the group {group!r}.")
    if reason := UNBUILDABLE.get((group, model_type)):
        raise ValueError(f"{model_type!r} of the group {group!r} cannot be built: {reason}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = build_tiny_config(model_type, is_decoder=group == "causal")
        if (group, model_type) in DIRECT:
            class_name, part = DIRECT[group, model_type]
            build, config = getattr(transformers, class_name)._from_config, getattr(config, part) if part else config
        else:
            build = getattr(transformers, auto_classes[model_type]).from_config
        model: PreTrainedModel = build(config, dtype=torch.float32)
        _redraw_faint_weights(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.update(**GENERATION)
    return model.eval()


def build_tiny_config(model_type: str, is_decoder: bool = False) -> PreTrainedConfig:
    """Shrink the default configuration of a type.

    Args:
        model_type (`str`): a key of `transformers.CONFIG_MAPPING`.
        is_decoder (`bool`, defaults to `False`): whether an encoder shall attend to the past only.

    Returns:
        `PreTrainedConfig`
    """
    config_class = CONFIG_MAPPING[model_type]
    # The auto class of a type with several heads looks the right one up here.
    roles: dict[str, Any] = {"architectures": []}
    roles |= {name: True for name in ("is_decoder", "causal") if is_decoder and name in _list_fields(config_class)}
    return _shrink(config_class(), roles)


def build_inputs(
    group: str, model: PreTrainedModel, batch_size: int = 2, length: int = 7, seed: int = 0
) -> dict[str, Tensor]:
    """Draw what the forward of a model needs.

    Args:
        group (`str`): the group that the model was built for.
        model (`PreTrainedModel`): from `build_tiny_model`.
        batch_size (`int`, defaults to 2): rows.
        length (`int`, defaults to 7): tokens per row. Images and sounds have the size that the model expects.
        seed (`int`, defaults to 0): of the drawn values.

    Returns:
        `dict[str, Tensor]`: keyword arguments of the forward. Token ids are neither padding nor special.
    """
    draw = Draw(model.config, batch_size, length, torch.Generator().manual_seed(seed))
    if model.config.model_type in INPUTS:
        return INPUTS[model.config.model_type](draw)
    arguments = inspect.signature(model.forward).parameters
    main = "input_ids" if "input_ids" in arguments and group != "vision" else model.main_input_name
    if main not in MAIN_INPUTS:
        raise ValueError(f"No rule for {main!r}, the main input of {type(model).__name__}. Add its type to `INPUTS`.")
    inputs = {main: MAIN_INPUTS[main](draw)}
    if "decoder_input_ids" in arguments:
        inputs["decoder_input_ids"] = draw.tokens()
    return inputs


def _find_auto_classes(group: str) -> dict[str, str]:
    if group not in MAPPINGS:
        raise ValueError(f"group must be one of {GROUPS}, got {group!r}.")
    found: dict[str, str] = {}
    for mapping, auto_class in MAPPINGS[group]:
        for name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"):
            found.setdefault(name, auto_class)
    if group == "vision":
        found |= dict.fromkeys(BARE_VISION_TYPES, "AutoModel")
    return found


def _list_fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Fields of a configuration and their defaults, `None` where the class computes them."""
    return {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(config_class)
    }


def _read(config: PreTrainedConfig, name: str) -> Any:
    """A field's value, also where the class stores it under another name or per layer."""
    return vars(config).get(config.attribute_map.get(name, name))


def _shrink(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Build a small configuration of the same class, and so of its sub-configurations."""
    overrides = copy.deepcopy(OVERRIDES.get(config.model_type, {})) | overrides
    defaults = _list_fields(type(config))
    settings: dict[str, Any] = {}
    for name, default in defaults.items():
        value = _read(config, name)
        if isinstance(value, PreTrainedConfig):
            nested = overrides.pop(name, {})
            if "model_type" in nested:
                value = CONFIG_MAPPING[nested.pop("model_type")]()
            settings[name] = _shrink(value, nested)
        elif default is not None and default is not dataclasses.MISSING:
            settings[name] = _shrink_value(name, value)
    if "num_key_value_heads" in defaults:
        settings["num_key_value_heads"] = 4 if "kv_lora_rank" in defaults else 2
    if "head_dim" in defaults and _read(config, "head_dim") is None:
        settings["head_dim"] = 8
    settings |= _choose_layers(config, defaults)
    settings |= _choose_token_ids(type(config))
    return type(config)(**settings | overrides)


def _shrink_value(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return next((min(value, size) for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
    if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
        return type(value)(_shrink_value(name, item) for item in value)
    if name in INITIALIZERS and isinstance(value, float):
        return max(value, INITIALIZER_RANGE)
    return value


@torch.no_grad()
def _redraw_faint_weights(model: PreTrainedModel) -> None:
    """Redraw the matrices that the model's own initialisation leaves near zero, which would hide what they pass on."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.numel():
            size = min(INITIALIZER_RANGE, (parameter.numel() / parameter.shape[0]) ** -0.5)
            if parameter.std() < size / 4:
                parameter.normal_(std=size)


def _choose_layers(config: PreTrainedConfig, defaults: dict[str, Any]) -> dict[str, Any]:
    """At least two layers, and one of each kind."""
    kinds = {
        name: list(dict.fromkeys(_read(config, name)))
        for name in LAYER_KINDS
        if name in defaults and _read(config, name)
    }
    count = max([2, *map(len, kinds.values())])
    chosen: dict[str, Any] = {name: _cycle(values, count) for name, values in kinds.items()}
    return chosen | {name: count for name in LAYER_COUNTS if isinstance(defaults.get(name), int)}


def _cycle(values: list[Any], count: int) -> list[Any]:
    return [values[index % len(values)] for index in range(count)]


def _choose_token_ids(config_class: type[PreTrainedConfig]) -> dict[str, int | None]:
    """Special tokens above the text, apart from padding and the start of a text; no end where a type allows it."""
    fixed = {"pad_token_id": PAD_TOKEN_ID, "bos_token_id": BOS_TOKEN_ID, "decoder_start_token_id": BOS_TOKEN_ID}
    special = itertools.count(FIRST_SPECIAL_ID)
    chosen: dict[str, int | None] = {}
    for field in dataclasses.fields(config_class):
        if field.name in ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id") and "None" in str(field.type):
            chosen[field.name] = None
        elif field.name.endswith(("_token_id", "_token_index")):
            chosen[field.name] = fixed[field.name] if field.name in fixed else next(special)
    return chosen
