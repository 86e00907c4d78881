"""The benchmark's methods leave the base model as it was, and its table chooses as its runner does."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import draw_tokens
from tiny_models import build_chat_tokenizer, build_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from methods import CONFIG_CLASSES, build_method, remove_method  # noqa: E402
from table import build_table, choose_runs  # noqa: E402

EXPERIMENTS = sorted((BENCHMARKS / "experiments").glob("*.json"))


@pytest.mark.parametrize("peft_type", CONFIG_CLASSES)
def test_a_method_is_built_and_leaves_nothing_behind(peft_type):
    tokenizer = build_chat_tokenizer()
    model, ids = build_model("llama", vocab_size=len(tokenizer)), draw_tokens()
    expected, keys = model(ids).logits, list(model.state_dict())
    settings = {"r": 2, "target_modules": ["q_proj"]} if peft_type == "LORA" else {"num_virtual_tokens": 4}
    if peft_type == "PREFIX_PLUS":
        settings["prefix_init_text"] = "$init_text"
    peft_model = build_method(peft_type, settings, model, tokenizer, "Text").eval()
    assert peft_model.get_nb_trainable_parameters()[0] > 0
    if peft_type != "LORA":
        assert not torch.allclose(peft_model(ids).logits[:, -1], expected[:, -1])
    base = remove_method(peft_model)
    assert list(base.state_dict()) == keys
    assert torch.equal(base(ids).logits, expected)
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_name_known_methods_and_fields(path):
    for method in json.loads(path.read_text())["methods"]:
        CONFIG_CLASSES[method["peft_type"]](**method["config"])
        assert method["learning_rates"]


def test_the_rate_is_chosen_on_the_first_seed():
    runs = [
        {"seed": seed, "learning_rate": rate, "loss": loss}
        for seed, rate, loss in [(0, 0.1, 2.0), (0, 0.2, 1.5), (1, 0.2, 1.9), (1, 0.1, 1.0)]
    ]
    assert [run["loss"] for run in choose_runs(runs)] == [1.5, 1.9]


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_make_a_table(path):
    report = json.loads(path.read_text())
    rows = build_table(report).splitlines()[2:]
    measured = {run["method"] for run in report["runs"]}
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [
        "base model",
        *(method["name"] for method in report["experiment"]["methods"] if method["name"] in measured),
    ]
