"""Rows become examples, examples become inputs with the loss on the completion only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import build_chat_tokenizer
from tokenizers.processors import TemplateProcessing

from peft_prefix_plus.examples import (
    IGNORED_LABEL,
    Example,
    load_examples,
    tokenize_examples,
    tokenize_prompts,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_chat_tokenizer()


def write_rows(path: Path, rows: list) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2+2=", "completion": "4"}, Example("2+2=", ("4",))),
        ({"source": "a | b", "references": ["x", "y"]}, Example("a | b\n", ("x", "y"))),
        ({"source": "a", "reference": "x"}, Example("a\n", ("x",))),
        ({"text": "once"}, Example("", ("once",))),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            Example("[user]hi\n[assistant]", ("ho",)),
        ),
    ],
)
def test_every_format_becomes_an_example(tmp_path, tokenizer, row, expected):
    assert load_examples(write_rows(tmp_path / "rows.jsonl", [row, "", row]), tokenizer) == [expected, expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source,reference\na,b\nc,d, e\n", "line 3 has more fields"),
        ("other,columns\na,b,c\n", "line 2 has more fields"),
        ('source,reference\na,"b\nc,d\n', "unexpected end of data"),
        ('source,reference\na,"b" said he\n', "cannot be read as CSV behind line 1"),
        (f"text\n{'a' * 200_000}\n", "cannot be read as CSV behind line 1"),
    ],
)
def test_csv_that_would_lose_text_is_refused(tmp_path, tokenizer, text, message):
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path / "rows.csv"), tokenizer)


def test_a_csv_with_an_index_column_is_read(tmp_path, tokenizer):
    (tmp_path / "rows.csv").write_text(",source,reference\n0,a,b\n", encoding="utf-8")
    assert load_examples(str(tmp_path / "rows.csv"), tokenizer) == [Example("a\n", ("b",))]


def test_csv_equals_json_lines(tmp_path, tokenizer):
    (tmp_path / "rows.csv").write_text('prompt,completion\n"a, b",c\nd,"e\nf"\n', encoding="utf-8")
    rows = [{"prompt": "a, b", "completion": "c"}, {"prompt": "d", "completion": "e\nf"}]
    expected = load_examples(write_rows(tmp_path / "rows.jsonl", rows), tokenizer)
    assert load_examples(str(tmp_path / "rows.csv"), tokenizer) == expected


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_the_mark_of_an_encoding_is_no_text(tmp_path, tokenizer, name):
    text = "source,reference\na,b\n" if name.endswith(".csv") else '{"source": "a", "reference": "b"}\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert load_examples(str(tmp_path / name), tokenizer) == [Example("a\n", ("b",))]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_file_in_another_encoding_is_named(tmp_path, tokenizer, name):
    text = "source,reference\né,b\n" if name.endswith(".csv") else '{"source": "é", "reference": "b"}\n'
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{name} is not in UTF-8"):
        load_examples(str(tmp_path / name), tokenizer)


def test_a_data_set_equals_its_rows_in_a_file(tmp_path, tokenizer):
    rows = [{"source": f"s{i}", "references": [f"a{i}", f"b{i}"]} for i in range(3)]
    directory = tmp_path / "data"
    directory.mkdir()
    path = write_rows(directory / "validation.jsonl", rows)
    assert load_examples(str(directory), tokenizer, split="validation") == load_examples(path, tokenizer)


def test_limit_and_template(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [{"source": str(i), "references": ["x"]} for i in range(5)])
    examples = load_examples(path, tokenizer, prompt_template="<{source}>", limit=2)
    assert [example.prompt for example in examples] == ["<0>", "<1>"]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (["{'prompt': 1}"], ["line 1", "not JSON", "one object a line"]),
        (["[1, 2]"], ["line 1", "list"]),
        ([{"text": "a"}, {"question": "b"}], ["row 2", "question", "'prompt': str"]),
        ([{"prompt": 3, "completion": "a"}], ["row 1", "prompt", "3"]),
        ([{"prompt": "a", "completion": " "}], ["row 1", "not empty"]),
        ([{"source": "a", "references": []}], ["row 1", "at least one reference"]),
        ([{"messages": [{"role": "user", "content": "a"}]}], ["row 1", "assistant"]),
        ([{"messages": "hi"}], ["row 1", "messages"]),
        ([], ["no rows"]),
    ],
)
def test_a_bad_row_is_named(tmp_path, tokenizer, rows, parts):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError) as error:
        load_examples(path, tokenizer)
    assert all(part in str(error.value) for part in [path, *parts]), str(error.value)


def test_a_missing_file_and_a_template_without_source_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="There is no file"):
        load_examples(str(tmp_path / "nothing.jsonl"), tokenizer)
    with pytest.raises(ValueError, match=r"must contain '\{source\}'"):
        load_examples(str(tmp_path / "nothing.jsonl"), tokenizer, prompt_template="x")


def test_chat_needs_a_template(tmp_path, tokenizer):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    bare = build_chat_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        load_examples(write_rows(tmp_path / "rows.jsonl", [row]), bare)


def test_a_chat_that_the_template_refuses_is_named_with_its_row(tmp_path):
    strict = build_chat_tokenizer()
    strict.chat_template = "{{ raise_exception('no system role') }}"
    row = {"messages": [{"role": "system", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    with pytest.raises(ValueError, match=r"row 1: the model's chat template refuses .* no system role"):
        load_examples(write_rows(tmp_path / "rows.jsonl", [row]), strict)


def test_a_tokenizer_that_ends_no_text_is_named():
    endless = build_chat_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no token that ends a text"):
        tokenize_examples([Example("a", ("b",))], endless)


def test_the_loss_is_on_the_completion_and_the_end_of_sequence(tokenizer):
    (row,) = tokenize_examples([Example("ab", ("cde",))], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "abcde</s>"
    assert row["labels"][:2] == [IGNORED_LABEL] * 2
    assert row["labels"][2:] == row["input_ids"][2:]


def test_every_reference_is_an_input_and_plain_text_starts_a_sequence(tokenizer):
    rows = tokenize_examples([Example("a", ("b", "c")), Example("", ("d",))], tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["ab</s>", "ac</s>", "<s>d</s>"]


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_prompts_begin_as_the_tokenizer_begins_every_text_and_are_open_at_the_end(template):
    tokenizer = build_chat_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    whole, begun, nothing = tokenize_prompts(["abc", "<s>abc", ""], tokenizer)
    assert [*whole, *([special[1][1]] if template.endswith("</s>") else [])] == tokenizer("abc")["input_ids"]
    assert begun == [special[0][1], *whole[-3:]]
    assert nothing == [special[0][1]]
    (row,) = tokenize_examples([Example("abc", ("de",))], tokenizer)
    assert row["input_ids"][: len(whole)] == whole
    assert tokenizer.decode(row["input_ids"][len(whole) :]) == "de</s>"
    assert row["labels"].count(IGNORED_LABEL) == len(whole)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ((1, ("a",)), "prompt"),
        (("a", "text"), "list of at least one reference, got 'text'"),
        (("a", ()), "at least one"),
        (("a", ("b", " ")), "not empty"),
        (("a", ("b", None)), "None"),
        (("a \ud83d", ("b",)), "half a character .* at position 2"),
    ],
)
def test_an_example_that_would_not_be_what_was_meant_is_refused(fields, part):
    with pytest.raises(ValueError, match=part):
        Example(*fields)
    assert Example("a", ["b"]) == Example("a", ("b",))


def test_files_are_read_and_demonstrations_written_without_the_libraries_of_extras(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "once"}])
    script = f"""
import sys
sys.modules |= dict.fromkeys(["datasets", "evaluate", "sacrebleu", "rouge_score"])
import peft_prefix_plus.demonstrations
from peft_prefix_plus.examples import Example, load_examples
assert load_examples({path!r}, None) == [Example("", ("once",))]
load_examples("someone/data", None)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ValueError" in result.stderr and "pip install datasets" in result.stderr.splitlines()[-1]


def test_a_long_prompt_loses_its_start_and_never_all_of_itself(tokenizer):
    examples = [Example("abcdef", ("xyz",)), Example("ab", ("uvwxyz",))]
    long, longer = tokenize_examples(examples, tokenizer, max_length=6)
    assert tokenizer.decode(long["input_ids"]) == "efxyz</s>"
    assert tokenizer.decode(longer["input_ids"]) == "buvwxy"
    assert long["labels"].count(IGNORED_LABEL) == 2
    assert longer["labels"].count(IGNORED_LABEL) == 1
