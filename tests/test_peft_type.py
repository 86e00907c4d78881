"""PEFT's enumeration of methods has one more member, which behaves like those in the class body."""

import copy
import enum
import importlib
import json
import pickle
import subprocess
import sys

import pytest
from helpers import add_prefix, draw_tokens
from peft import PeftType
from tiny_models import build_model

import peft_prefix_plus
from peft_prefix_plus import peft_type
from peft_prefix_plus.peft_type import MEMBER_NAME, METHOD_NAME, PREFIX_PLUS, add_string_member


class Fruit(str, enum.Enum):  # noqa: UP042  (PeftType is defined like this)
    APPLE = "APPLE"
    PEAR = "PEAR"


@pytest.mark.parametrize(
    "lookup", [lambda: PeftType("PREFIX_PLUS"), lambda: PeftType["PREFIX_PLUS"], lambda: PeftType.PREFIX_PLUS]
)
def test_every_lookup_finds_the_same_member(lookup):
    assert lookup() is PREFIX_PLUS


def test_member_is_a_string_and_a_peft_type():
    assert isinstance(PREFIX_PLUS, PeftType) and isinstance(PREFIX_PLUS, str)
    assert PREFIX_PLUS.name == PREFIX_PLUS.value == MEMBER_NAME == METHOD_NAME.upper() == "PREFIX_PLUS"
    assert PREFIX_PLUS == "PREFIX_PLUS"
    assert {PREFIX_PLUS: 1}["PREFIX_PLUS"] == 1
    assert PREFIX_PLUS != PeftType.LORA


@pytest.mark.parametrize("write", [repr, str, format], ids=["repr", "str", "format"])
def test_member_is_written_like_a_native_one(write):
    assert write(PREFIX_PLUS) == write(PeftType.LORA).replace("LORA", "PREFIX_PLUS")


def test_iteration_meets_the_member_once_and_last():
    members = list(PeftType)
    assert members.count(PREFIX_PLUS) == 1
    assert members[-1] is PREFIX_PLUS
    assert len(PeftType) == len(members) == len(PeftType.__members__)
    assert next(reversed(PeftType)) is PREFIX_PLUS
    assert PREFIX_PLUS in PeftType


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_keeps_identity(protocol):
    assert pickle.loads(pickle.dumps(PREFIX_PLUS, protocol)) is PREFIX_PLUS


def test_copies_keep_identity():
    assert copy.copy(PREFIX_PLUS) is PREFIX_PLUS
    assert copy.deepcopy({"type": [PREFIX_PLUS]})["type"][0] is PREFIX_PLUS


def test_json_roundtrip():
    assert json.loads(json.dumps({"peft_type": PREFIX_PLUS})) == {"peft_type": "PREFIX_PLUS"}
    assert PeftType(json.loads(json.dumps(PREFIX_PLUS))) is PREFIX_PLUS


def test_adding_twice_changes_nothing():
    before = dict(PeftType.__members__)
    assert add_string_member(PeftType, MEMBER_NAME) is PREFIX_PLUS
    assert dict(PeftType.__members__) == before


def test_adding_leaves_the_other_members_alone():
    apple, pear = Fruit.APPLE, Fruit.PEAR
    plum = add_string_member(Fruit, "PLUM")
    assert list(Fruit) == [apple, pear, plum]
    assert Fruit("APPLE") is apple and Fruit["PEAR"] is pear and Fruit("PLUM") is plum
    with pytest.raises(AttributeError):
        Fruit.PLUM = "other"
    with pytest.raises(ValueError):
        Fruit("CHERRY")


@pytest.mark.parametrize("module", [peft_type, peft_prefix_plus], ids=["peft_type", "package"])
def test_reload_keeps_the_member_and_the_method(module):
    model, ids = build_model("llama"), draw_tokens()
    importlib.reload(module)
    assert list(PeftType).count("PREFIX_PLUS") == 1
    assert PeftType.PREFIX_PLUS is PREFIX_PLUS
    peft_model = add_prefix(model)
    assert peft_model.active_peft_config.peft_type is PREFIX_PLUS
    assert peft_model(ids).logits.isfinite().all()


_REIMPORT = """
import pickle, sys
import torch
from peft import PeftModel, PeftType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

def build():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()

import peft_prefix_plus
first = PeftType.PREFIX_PLUS
pickled = pickle.dumps(first)
for name in [name for name in sys.modules if name.partition(".")[0] == "peft_prefix_plus"]:
    del sys.modules[name]
import peft_prefix_plus
import peft_prefix_plus
assert PeftType.PREFIX_PLUS is first is pickle.loads(pickled)
assert list(PeftType).count("PREFIX_PLUS") == 1
ids = torch.arange(6)[None]
model = get_peft_model(build(), peft_prefix_plus.PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
assert type(model.base_model) is peft_prefix_plus.PrefixPlusModel
assert not torch.equal(model(ids).logits, build()(ids).logits)
model.save_pretrained(sys.argv[1])
assert torch.equal(PeftModel.from_pretrained(build(), sys.argv[1])(ids).logits, model(ids).logits)
print("done")
"""


def test_second_import_in_a_fresh_process_works(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", _REIMPORT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "done", result.stderr
