"""The checks of `make matrix` on at least one type of every kind, and what is done with its results."""

import sys
from pathlib import Path

import pytest
import torch

from peft_prefix_plus import supported_model_types
from peft_prefix_plus.supported import read_matrix

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "matrix"))

from checks import CHECKS, FailedError, NotApplicableError, Subject
from matrix import METHODS, run_checks
from zoo import GROUPS, list_model_types

KINDS = {
    "rotary": "causal llama",
    "grouped queries and normed keys": "causal qwen3",
    "partial rotary": "causal phi",
    "sliding windows": "causal gemma3_text",
    "chunked attention": "causal llama4_text",
    "no positions in some layers": "causal smollm3",
    "soft-capping": "causal gemma2",
    "attention sinks": "causal gpt_oss",
    "latent attention": "causal deepseek_v3",
    "sparse latent attention": "causal deepseek_v32",
    "compressed keys": "causal deepseek_v4",
    "several attentions a layer": "causal longcat_flash",
    "shared keys": "causal gemma3n_text",
    "geometry by layer": "causal gemma4_text",
    "two calls of the attention function": "causal diffllama",
    "repeated keys": "causal jetmoe",
    "masks from values": "causal doge",
    "output post-processing": "causal zaya",
    "queries scaled by position": "causal ministral3",
    "delta rule": "causal qwen3_next",
    "state space": "causal jamba",
    "both in one layer": "causal falcon_h1",
    "short convolution": "causal lfm2",
    "recurrent in depth": "causal hrm_text",
    "learned positions": "causal gpt2",
    "sinusoidal positions": "causal ctrl",
    "positions behind the padding's": "causal roberta",
    "decoder with a cross-attention that is not used": "causal bart",
    "ALiBi and a fused product": "causal bloom",
    "ALiBi from the end": "causal mpt",
    "several query heads, one key": "causal falcon",
    "rotation tables": "causal gptj",
    "causal buffers": "causal gpt_neo",
    "no cache": "causal openai-gpt",
    "two streams": "causal xlnet",
    "codebooks": "causal musicgen",
    "no softmax attention": "causal mamba",
    "relative position bias": "seq2seq t5",
    "local and global attention": "seq2seq longt5",
    "learned positions on both sides": "seq2seq bart",
    "sinusoidal positions on both sides": "seq2seq m2m_100",
    "chunks in the encoder": "seq2seq led",
    "n-grams of streams": "seq2seq prophetnet",
    "speech": "seq2seq whisper",
    "encoder": "encoder bert",
    "alternating windows": "encoder modernbert",
    "disentangled attention": "encoder deberta-v2",
    "its predecessor": "encoder deberta",
    "quantized embeddings": "encoder ibert",
    "positions of several coordinates": "multimodal qwen2_vl",
    "image tokens": "multimodal llava",
    "image and text masks": "multimodal gemma3",
    "images as an argument": "multimodal blip-2",
    "patches": "vision vit",
    "windows of patches": "vision swin",
    "registers": "vision dinov2_with_registers",
    "tower": "vision siglip_vision_model",
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def find_row(group: str, model_type: str) -> dict:
    return next(row for row in read_matrix()["models"] if (row["group"], row["model_type"]) == (group, model_type))


@pytest.mark.parametrize("kind", KINDS)
def test_a_type_of_every_kind_gives_what_the_table_says(kind):
    group, model_type = KINDS[kind].split()
    outcomes = run_checks(group, model_type, "prefix_plus")
    assert not [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome.startswith("fail")]
    recorded = find_row(group, model_type)["prefix_plus"]
    assert {name: outcome[:4] for name, outcome in outcomes.items()} == {
        name: outcome[:4] for name, outcome in recorded.items()
    }


def test_the_checks_can_fail():
    subject = Subject("causal", "llama", METHODS["prefix_plus"])
    layer = next(module for name, module in subject.model.named_modules() if name.endswith("0.self_attn"))
    layer.list_effective_adapters = list
    layer._update_route()
    with pytest.raises(FailedError, match="differs by"):
        CHECKS["saved"](subject)


def test_every_type_of_transformers_is_in_the_table():
    recorded = {(row["group"], row["model_type"]) for row in read_matrix()["models"]}
    assert {(group, model_type) for group in GROUPS for model_type in list_model_types(group)} <= recorded


def test_supported_types_are_those_that_pass():
    works = {(model.group, model.model_type) for model in supported_model_types()}
    assert ("causal", "llama") in works and ("causal", "mamba") not in works and ("seq2seq", "t5") in works
    assert {group for group, _ in works} == set(GROUPS)
    assert works == {(m.group, m.model_type) for group in GROUPS for m in supported_model_types(group)}
    assert all(model.is_exact for model in supported_model_types("causal") if model.model_type in ("llama", "bloom"))


def test_an_unknown_group_raises():
    with pytest.raises(ValueError, match=r"'decoder'.*causal"):
        supported_model_types("decoder")


def test_the_share_that_works():
    """What the project promises: 98% of the types with softmax attention, and all that PEFT's own method works on."""
    rows = [
        row
        for row in read_matrix()["models"]
        if not row.get("prefix_plus", {}).get("forward", "n/a").startswith("n/a")
    ]
    works = {(model.group, model.model_type) for model in supported_model_types()}
    assert len(works) >= 0.98 * len(rows)
    for row in rows:
        if all(not outcome.startswith("fail") for outcome in row["prefix_tuning"].values()):
            assert (row["group"], row["model_type"]) in works


def test_a_check_that_does_not_apply_says_why():
    with pytest.raises(NotApplicableError, match="carries a state"):
        CHECKS["exact"](Subject("causal", "qwen3_next", METHODS["prefix_plus"]))
