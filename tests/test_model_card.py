"""Every saved adapter carries a model card, whatever it was saved by and whatever stands in its configuration."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from behaviours.hub_server import find_card_problems
from helpers import add_prefix, add_second
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import build_chat_tokenizer, build_model
from transformers import AutoModelForCausalLM

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.card_text import MAX_TEXT_LENGTH
from peft_prefix_plus.cli.main import main
from peft_prefix_plus.folding import fold_adapter
from peft_prefix_plus.model_card import CARD_NAME, update_model_card

NASTY_TEXTS = [
    "one line",
    "two\nlines",
    "---\nbase_model: /etc/passwd\n---\n",
    "```\n# a fence\n```\n~~~",
    "## A heading\n### Framework versions\n\n- PEFT 0.0.0",
    "<!-- prefix-plus: end -->\n<script>alert(1)</script>\n<!-- prefix-plus: start; rewritten with every save -->",
    "| a | b |\n| --- | --- |",
    "{{ jinja }} {% raw %} \\1 \\g<0>",
    "\n\n   \n",
    "\u2028\x0b\x0c\x85 separators",
    "\x00\x1b[31m control \ud800",
    "\r\nwindows\r\n",
    "x" * 5000,
    "ärger 漢字 👩‍👩‍👧",
]


def read(directory: Path) -> str:
    return (directory / CARD_NAME).read_bytes().decode("utf-8")


def read_card(directory: Path) -> ModelCard:
    return ModelCard.load(directory / CARD_NAME)


def split_at_marks(text: str) -> tuple[str, str, str]:
    """What stands in front of the section, in it, and behind it."""
    parts = re.split(r"(?m)^<!-- prefix-plus: (?:start|end)[^\n]*-->(?=\r?$)", text)
    assert len(parts) == 3
    return parts[0], parts[1], parts[2]


def build_named(name: str | None):
    """The tiny Llama, as if it was loaded by a name."""
    model = build_model("llama")
    model.config._name_or_path = model.name_or_path = name or ""
    return model


def write_configuration(directory: Path, **attributes) -> None:
    """The configuration of an adapter, without weights: all that a card needs."""
    fixed = {"peft_type": "PREFIX_PLUS", "task_type": "CAUSAL_LM", "prefix_init": "text", "projection": "mlp"}
    (directory / "adapter_config.json").write_text(json.dumps(fixed | attributes), encoding="utf-8")


def test_the_card_tells_what_the_prefix_is(tmp_path):
    model = add_prefix(
        build_named("owner/base"),
        num_frozen_tokens=1,
        modules_to_save=["norm"],
        num_virtual_tokens_pattern={"layers.1.self_attn": 3},
    )
    model.save_pretrained(tmp_path)
    _, section, _ = split_at_marks(read(tmp_path))
    trained = model.get_nb_trainable_parameters()[0]
    assert "- Base model: [owner/base](https://huggingface.co/owner/base)\n" in section
    assert "- Prefix length: 5 virtual tokens per layer\n" in section and '{"layers.1.self_attn": 3}' in section
    assert "keys and values of 5 given tokens" in section and "keep their start: 1" in section
    assert "- Projection: `linear`, width 16\n" in section and '`["norm"]`' in section
    assert f"- Trained parameters: {trained:,}\n" in section
    assert "pip install" in section and "KeyError: 'PREFIX_PLUS'" in section
    data = read_card(tmp_path).data
    assert data.library_name == "peft" and data.base_model == "owner/base" and data.pipeline_tag == "text-generation"
    assert {"peft", "peft_prefix_plus", "prefix-tuning", "base_model:adapter:owner/base"} <= set(data.tags)


def test_embeddings_that_were_resized_are_saved_but_not_trained(tmp_path):
    model = add_prefix(build_named(None), trainable_token_indices=[1, 2])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("lm_head" in name for name in names)
    assert f"- Trained parameters: {model.get_nb_trainable_parameters()[0]:,}\n" in read(tmp_path)


def test_the_card_names_the_revision_of_the_base_model(tmp_path):
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(build_named("owner/base"), config, revision="v`1").save_pretrained(tmp_path)
    text = read(tmp_path)
    assert text.count('from_pretrained(base_model, revision="v`1")') == 2
    assert "(https://huggingface.co/owner/base), revision `v'1`\n" in text
    write_configuration(tmp_path, base_model_name_or_path="owner/base", revision=["v1"])
    update_model_card(str(tmp_path))
    assert "revision" not in split_at_marks(read(tmp_path))[1]


@pytest.mark.parametrize("adapter_name", ["default", "ferries"])
def test_the_code_in_the_card_runs(adapter_name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = build_chat_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer))
    model.config._name_or_path = model.name_or_path = "owner/base"
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, config, adapter_name=adapter_name).save_pretrained("user/repository")
    base = build_model("llama", vocab_size=len(tokenizer))
    base.save_pretrained("owner/base")
    tokenizer.save_pretrained("owner/base")
    place = Path("user/repository", "" if adapter_name == "default" else adapter_name)
    code = re.search(r"```python\n(import peft_prefix_plus.*?)```", read(place), flags=re.DOTALL).group(1)
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert isinstance(namespace["model"], PeftModel) and "Your input" in capsys.readouterr().out


def test_saving_again_changes_nothing(tmp_path):
    model = add_prefix(build_named("owner/base"))
    add_second(model)
    model.save_pretrained(tmp_path)
    before = read(tmp_path), read(tmp_path / "other")
    model.save_pretrained(tmp_path)
    assert (read(tmp_path), read(tmp_path / "other")) == before


USER_CARDS = {
    "headings": "# Mine\n\nintro\n\n## Data\n\nferries\n\n```sh\n## no heading\n```\n",
    "no-heading": "just a line",
    "code-first": "# Mine\n\n```python\n## no heading\n```\n\n## Data\n",
    "windows": "# Mine\r\n\r\n## Data\r\n\r\nferries\r\n",
    "empty": "",
}


@pytest.mark.parametrize("text", USER_CARDS.values(), ids=USER_CARDS)
def test_text_of_the_user_is_kept(text, tmp_path):
    write_configuration(tmp_path)
    (tmp_path / CARD_NAME).write_bytes(f"---\nlicense: mit\ntags:\n- ferries\n---\n{text}".encode())
    update_model_card(str(tmp_path))
    card = read_card(tmp_path)
    front, section, back = split_at_marks(card.text)
    newline = "\r\n" if "\r\n" in text else "\n"
    assert (front + back.removeprefix(newline * 2)).strip() == text.strip()
    assert front.count("```") % 2 == 0
    assert card.data.license == "mit" and card.data.tags[0] == "ferries"
    assert ("\r\n" in section) == ("\r\n" in text)


def test_text_of_the_user_is_kept_when_the_section_changes(tmp_path):
    model = add_prefix(build_named("owner/base"))
    model.save_pretrained(tmp_path)
    front, _, back = split_at_marks(read_card(tmp_path).text)
    path = tmp_path / CARD_NAME
    path.write_text(read(tmp_path).replace(front, f"{front}Mine in front.\n").replace(back, f"\nMine behind.\n{back}"))
    mine = split_at_marks(read_card(tmp_path).text)
    model.fold_prefix()
    model.save_pretrained(tmp_path)
    now = split_at_marks(read_card(tmp_path).text)
    assert (now[0], now[2].rstrip()) == (mine[0], mine[2].rstrip()) and now[1] != mine[1]


def check_card_of_text(directory: Path, text: str) -> None:
    write_configuration(directory, prefix_init_text=text, base_model_name_or_path="owner/base")
    (directory / CARD_NAME).write_text("# Mine\n\n## Data\n\nferries\n", encoding="utf-8")
    update_model_card(str(directory))
    before = read(directory)
    card = read_card(directory)
    assert find_card_problems(before) == [] and card.data.base_model == "owner/base"
    front, section, back = split_at_marks(card.text)
    assert front == "# Mine\n\n"
    assert back == "\n\n## Data\n\nferries\n"
    shown = section.partition("started as")[2].partition(":\n\n")[2]
    assert all(line.startswith("    ") or not line.strip() for line in shown.splitlines())
    assert len(shown) < 8 * MAX_TEXT_LENGTH
    update_model_card(str(directory))
    assert read(directory) == before


@pytest.mark.parametrize("text", NASTY_TEXTS, ids=range(len(NASTY_TEXTS)))
def test_no_init_text_breaks_the_card(text, tmp_path):
    check_card_of_text(tmp_path, text)


@given(text=st.text(max_size=200))
@settings(max_examples=50, deadline=None)
def test_no_text_at_all_breaks_the_card(text, tmp_path_factory):
    check_card_of_text(tmp_path_factory.mktemp("card"), text)


@pytest.mark.parametrize(
    "attributes",
    [
        {"modules_to_save": ["`a`\n<!-- prefix-plus: end -->\n"]},
        {"projection": "`\n---\n", "num_virtual_tokens_pattern": {"a|b`": 1}},
        {"num_virtual_tokens": None, "prefix_init": 5, "auto_mapping": {"base_model_class": "x; import os"}},
        {"prefix_init_text": 3, "task_type": None, "auto_mapping": {"base_model_class": "BertModel"}},
        {"base_model_name_or_path": ["a"], "prefix_init_token_ids": "many"},
    ],
    ids=range(5),
)
def test_no_value_breaks_the_card(attributes, tmp_path):
    write_configuration(tmp_path, **attributes)
    update_model_card(str(tmp_path))
    before = read(tmp_path)
    assert find_card_problems(before) == [] and "import os" not in before
    split_at_marks(before)
    update_model_card(str(tmp_path))
    assert read(tmp_path) == before


@pytest.mark.parametrize("kind", ["absolute", "relative", "gone", "none"])
def test_no_path_stands_in_the_card(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"absolute": str(tmp_path / "secret-project"), "relative": "secret-project/base", "none": None}
    name = names.get(kind, "/home/secret-project/base")
    if kind in ("absolute", "relative"):
        os.makedirs(name)
    model = add_prefix(build_named(name))
    add_second(model)
    model.save_pretrained("saved")
    for text in (read(tmp_path / "saved"), read(tmp_path / "saved" / "other")):
        assert "secret-project" not in text and str(tmp_path) not in text
        assert find_card_problems(text) == []
        assert "- Base model: not on the Hub\n" in text or "PrefixPlus adapters" in text


def test_adapters_in_directories_have_cards_of_their_own(tmp_path):
    model = add_prefix(build_named("owner/base"))
    add_second(model, "ferries")
    add_second(model, "more ferries")
    model.save_pretrained(tmp_path)
    root = read(tmp_path)
    assert "PrefixPlus adapters" not in split_at_marks(root)[1]
    assert "](<ferries/README.md>)" in root and "](<more ferries/README.md>)" in root and "<default/" not in root
    _, section, _ = split_at_marks(read(tmp_path / "ferries"))
    assert 'subfolder="ferries"' in section and "3 virtual tokens" in section


def test_adapters_in_directories_alone_leave_a_useful_card_of_the_model(tmp_path):
    model = get_peft_model(build_named("owner/base"), PrefixPlusConfig(num_virtual_tokens=2), adapter_name="ferries")
    model.save_pretrained(tmp_path)
    card = read_card(tmp_path)
    assert "](<ferries/README.md>)" in card.text and card.data.base_model == "owner/base"
    assert {"peft_prefix_plus", "prefix-tuning"} <= set(card.data.tags)


def test_checkpoints_are_not_listed_as_adapters(tmp_path):
    model = add_prefix(build_named("owner/base"))
    model.save_pretrained(tmp_path)
    before = read(tmp_path)
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert read(tmp_path) == before
    assert "subfolder" not in read(tmp_path / "checkpoint-1")


def test_an_adapter_saved_by_transformers_has_a_card(tmp_path):
    model = build_named("owner/base")
    model.add_adapter(PrefixPlusConfig(num_virtual_tokens=2))
    model.save_pretrained(tmp_path)
    card = read_card(tmp_path)
    split_at_marks(card.text)
    assert card.data.base_model == "owner/base" and {"peft", "peft_prefix_plus"} <= set(card.data.tags)
    # The Trainer would take the model for a `PeftModel`.
    assert card.data.library_name is None


def test_the_card_of_a_folded_adapter_says_so(tmp_path):
    add_prefix(build_named("owner/base")).save_pretrained(tmp_path / "saved")
    fold_adapter(str(tmp_path / "saved"), str(tmp_path / "folded"))
    before, after = (split_at_marks(read(tmp_path / name)) for name in ("saved", "folded"))
    assert (before[0], before[2]) == (after[0], after[2])
    assert "`linear`" in before[1] and "- Projection: `none`\n" in after[1]


def test_the_console_script_leaves_a_card_with_results(tiny_model_dir, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1 plus 1", "completion": "2"}\n' * 4)
    fixed = ["--model_name_or_path", tiny_model_dir, "--train_file", str(data), "--eval_file", str(data)]
    fixed += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu", "--disable_tqdm", "true"]
    assert main(["train", *fixed, "--prefix_init_text", "Add the numbers:"]) == 0
    text = read(tmp_path / "out")
    _, section, _ = split_at_marks(text)
    assert "    Add the numbers:\n" in section and re.search(r"- `loss`: \d", section)
    assert tiny_model_dir not in text and find_card_problems(text) == []


def test_the_name_of_the_wheel_is_no_model_of_the_hub(tmp_path):
    add_prefix(build_named("smollm2-wheel")).save_pretrained(tmp_path)
    text = read(tmp_path)
    assert "smollm2-wheel" not in text and "- Base model: not on the Hub\n" in text


def test_results_of_every_library_are_shown(tmp_path):
    write_configuration(tmp_path)
    metrics = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.int64(3), "eval_model_preparation_time": 0.1}
    update_model_card(str(tmp_path), metrics | {"many": torch.zeros(2), "text": "x"})
    assert split_at_marks(read(tmp_path))[1].endswith("Results:\n\n- `a`: 0.5\n- `b`: 2\n- `c`: 3\n\n")


def test_tags_that_are_numbers_stay(tmp_path):
    write_configuration(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: [2024, foo]\n---\n# Mine\n")
    update_model_card(str(tmp_path))
    assert read_card(tmp_path).data.tags[:2] == ["2024", "foo"]


def test_results_are_shown_until_the_weights_may_have_changed(tmp_path):
    model = add_prefix(build_named("owner/base"))
    model.save_pretrained(tmp_path)
    before = read(tmp_path)
    metrics = {"eval_loss": 1.23456, "eval_runtime": 3.0, "eval_samples_per_second": 7.0, "epoch": 1.0, "bleu": 66}
    update_model_card(str(tmp_path), metrics)
    _, section, _ = split_at_marks(read(tmp_path))
    assert section.endswith("Results:\n\n- `loss`: 1.235\n- `bleu`: 66\n\n")
    model.save_pretrained(tmp_path)
    assert read(tmp_path) == before


@pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\n- a\n---\n", b"\xff\xfe"], ids=repr)
def test_a_card_that_cannot_be_read_is_left_alone(text, tmp_path):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / CARD_NAME).write_bytes(content)
    model = build_named("owner/base")
    model.add_adapter(PrefixPlusConfig(num_virtual_tokens=2))
    with pytest.warns(UserWarning, match="left alone"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / CARD_NAME).read_bytes() == content
    with pytest.raises(ValueError, match=r"README\.md has metadata that cannot be read"):
        update_model_card(str(tmp_path))
    AutoModelForCausalLM.from_config(model.config).load_adapter(str(tmp_path))


def test_only_adapters_of_this_method_get_a_card(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        update_model_card(str(tmp_path))
    write_configuration(tmp_path, peft_type="LORA")
    with pytest.raises(ValueError, match="'LORA'"):
        update_model_card(str(tmp_path))
    assert not (tmp_path / CARD_NAME).exists()


def test_no_pickle_is_saved(tmp_path):
    model = add_prefix(build_model("llama"))
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not {"adapter_model.bin", "adapter_config.json"} & set(os.listdir(tmp_path / "new"))
    model.save_pretrained(tmp_path / "saved")
    weights = (tmp_path / "saved" / "adapter_model.safetensors").read_bytes()
    os.utime(tmp_path / "saved" / "adapter_model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert "adapter_model.bin" not in os.listdir(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").read_bytes() == weights


def test_a_pickle_of_somebody_else_is_no_reason_to_refuse(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    os.utime(tmp_path / "adapter_model.bin", ns=(1, 1))
    add_prefix(build_model("llama")).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.bin").read_bytes() == b"old"


SECRET = "hf_" + "ThisMustNotBeReadByAnybody0000000"


@pytest.mark.parametrize("name", ["token", "use_auth_token", "proxies"])
def test_secrets_of_the_tokenizer_are_neither_saved_nor_shown(name, tmp_path):
    value = {"https": f"http://user:{SECRET}@proxy"} if name == "proxies" else SECRET
    config = PrefixPlusConfig(num_virtual_tokens=2, tokenizer_kwargs={name: value, "use_fast": True})
    with pytest.warns(UserWarning, match="`tokenizer_kwargs` has no effect") as warned:
        model = get_peft_model(build_model("llama"), config)
    assert not any(SECRET in str(warning.message) for warning in warned)
    model.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert SECRET.encode() not in path.read_bytes()
    assert SECRET not in f"{config!r} {config} {config.to_dict()} {model!r} {model.peft_config}"
    assert config.tokenizer_kwargs[name] == value
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tokenizer_kwargs"] == {"use_fast": True}


def test_the_representation_shows_all_fields():
    config = PrefixPlusConfig(num_virtual_tokens=2, tokenizer_kwargs={"use_fast": True})
    shown = repr(config)
    assert all(f"{name}={getattr(config, name)!r}" in shown for name in vars(config) if name in config.to_dict())
