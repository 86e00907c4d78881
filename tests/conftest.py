"""Shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tiny Llama and a tokenizer of single bytes that has a chat template."""
    from tiny_models import build_chat_tokenizer, build_model

    directory: Path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = build_chat_tokenizer()
    # Texts are long in bytes.
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
