"""`trainable_token_indices`: rows of embeddings that are trained and saved beside a prefix."""

import pytest
import torch
from helpers import Snapshot, add_prefix, draw_tokens
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import build_model

from peft_prefix_plus import PrefixPlusConfig

ROWS = [11, 23]
forms = pytest.mark.parametrize("indices", [ROWS, {"embed_tokens": ROWS}], ids=["list", "dict"])
tied = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


def build_trained(indices: object, is_tied: bool) -> PeftModel:
    model = add_prefix(build_model("llama", tie_word_embeddings=is_tied), trainable_token_indices=indices).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.tensor([[11, 5, 23, 7, 11]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model.eval()


@forms
@tied
def test_only_the_rows_and_the_prefix_are_trained(indices, is_tied):
    base = build_model("llama", tie_word_embeddings=is_tied)
    model = build_trained(indices, is_tied)
    table = model.base_model.model.model.embed_tokens
    others = torch.tensor([i for i in range(96) if i not in ROWS])
    expected = base.model.embed_tokens(others)
    assert torch.equal(table(others), expected)
    assert not torch.equal(table(torch.tensor(ROWS)), base.model.embed_tokens(torch.tensor(ROWS)))
    ids = draw_tokens()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)


@forms
@tied
def test_saved_and_loaded_equals_before(indices, is_tied, tmp_path):
    model = build_trained(indices, is_tied)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama", tie_word_embeddings=is_tied), tmp_path)
    ids = torch.tensor([[11, 5, 23, 7, 11]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.unload().model.embed_tokens.weight.shape == (96, 32)


@pytest.mark.parametrize("indices", [[5, 96], {"embed_tokens": [10**9]}, {"absent": [1]}, {"mlp": [1]}], ids=str)
def test_rows_that_are_not_there_are_refused(indices):
    base = build_model("llama")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match="trainable_token_indices"):
        add_prefix(base, trainable_token_indices=indices)
    snapshot.assert_unchanged(base)


@pytest.mark.parametrize("indices", [[-1], ["a"], 5, {"embed_tokens": 5}, [True], [], {"embed_tokens": []}], ids=str)
def test_what_is_no_list_of_tokens_is_refused(indices):
    with pytest.raises(ValueError, match="must be a list of token ids"):
        add_prefix(build_model("llama"), trainable_token_indices=indices)


@pytest.mark.parametrize("damage", ["shape", "missing"])
def test_rows_that_do_not_fit_leave_the_model_as_it_was(damage, tmp_path):
    build_trained(ROWS, False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "trainable_tokens" in name)
    rows = tensors.pop(name)
    save_file(tensors if damage == "missing" else tensors | {name: rows[:1].clone()}, path)
    base = build_model("llama")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match="trainable_tokens_delta"):
        PeftModel.from_pretrained(base, tmp_path)
    snapshot.assert_unchanged(base)


@forms
def test_several_adapters_with_rows_are_loaded(indices, tmp_path):
    model = build_trained(indices, is_tied=False)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[11, 5, 23, 7, 11]])
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("indices", [[1], {"embed_tokens": [1]}], ids=["list", "dict"])
def test_rows_of_a_table_that_is_trained_as_a_whole_are_refused(indices):
    base = build_model("llama")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match="trained as a whole"):
        add_prefix(base, trainable_token_indices=indices, modules_to_save=["embed_tokens"])
    snapshot.assert_unchanged(base)
    model = add_prefix(base, modules_to_save=["embed_tokens"])
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="trained as a whole"):
        model.add_adapter("rows", PrefixPlusConfig(task_type="CAUSAL_LM", trainable_token_indices=indices))
    snapshot.assert_unchanged(model)


def test_an_adapter_without_rows_beside_one_that_has_some_is_refused(tmp_path):
    """PEFT could not save it."""
    model = build_trained(ROWS, is_tied=False)
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"adapter 'default' of the model trains rows of model\.embed_tokens"):
        model.add_adapter("plain", PrefixPlusConfig(task_type="CAUSAL_LM"))
    snapshot.assert_unchanged(model)
    assert list(model.peft_config) == ["default"]
    model.save_pretrained(tmp_path)


def test_rows_of_positions_are_refused_where_the_input_moves():
    base = build_model("gpt2")
    snapshot = Snapshot(base)
    with pytest.raises(ValueError, match=r"trainable_token_indices.*wpe, which numbers the input"):
        add_prefix(base, trainable_token_indices={"wpe": [5]})
    snapshot.assert_unchanged(base)
    add_prefix(base, prefix_init="random", trainable_token_indices={"wpe": [5]})(draw_tokens())
