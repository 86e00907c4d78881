"""What the model card of an adapter says."""

import importlib.metadata
import json
import re
import unicodedata
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from .peft_type import MEMBER_NAME

MAX_TEXT_LENGTH = 1000
_MODEL_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_NOT_RESULTS = ("epoch", "model_preparation_time", "runtime", "samples_per_second", "steps_per_second")


def write_section(
    attributes: Mapping[str, Any],
    base_model: str | None,
    repo_id: str | None,
    subfolder: str | None,
    num_trained: int | None,
    metrics: Mapping[str, Any],
) -> str:
    """Write what a card says about a prefix.

    Args:
        attributes (`Mapping[str, Any]`): what `adapter_config.json` holds; any value may be wrong.
        base_model (`str`, *optional*): its name on the Hub, if it has one.
        repo_id (`str`, *optional*): the repository of the adapter, if it is known.
        subfolder (`str`, *optional*): directory of the adapter in it.
        num_trained (`int`, *optional*): number of trained parameters, if it is known.
        metrics (`Mapping[str, float]`): results.

    Returns:
        `str`: Markdown, from a heading of the second level on.
    """
    lines = [
        "## Use this prefix",
        "",
        f"This adapter needs the package `peft-prefix-plus` (it was saved with version {_find_version()}).",
        "Install it from a clone of its repository with `pip install .`, and import it before PEFT reads the adapter.",
        f"Without the import PEFT stops with `KeyError: '{MEMBER_NAME}'`.",
        "",
        *_write_snippet(attributes, base_model, repo_id, subfolder),
        "",
        *_write_facts(attributes, base_model, num_trained),
        *_write_text(attributes.get("prefix_init_text")),
        *_write_results(metrics),
    ]
    return "\n".join(lines)


def _find_version() -> str:
    return importlib.metadata.version("peft-prefix-plus")


def _write_snippet(
    attributes: Mapping[str, Any], base_model: str | None, repo_id: str | None, subfolder: str | None
) -> list[str]:
    mapping = attributes.get("auto_mapping") or {}
    found = re.fullmatch(r"[A-Za-z]\w*", str(mapping.get("base_model_class")))
    model_class = _MODEL_CLASSES.get(str(attributes.get("task_type"))) or (found.group() if found else "AutoModel")
    generates = model_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    place = "" if subfolder is None else f", subfolder={json.dumps(subfolder)}"
    adapter = json.dumps(repo_id or "user/repository")
    revision = _find_revision(attributes, base_model)
    base = "base_model" if revision is None else f"base_model, revision={json.dumps(revision)}"
    lines = [
        "```python",
        "import peft_prefix_plus  # registers the method",
        "from peft import PeftModel",
        f"from transformers import {model_class}{', AutoTokenizer' if generates else ''}",
        "",
        f"base_model = {json.dumps(base_model or 'path/of/the/base/model')}",
        f"adapter = {adapter}" + ("" if repo_id else "  # or a directory"),
        f"model = {model_class}.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(model, adapter{place})",
    ]
    if generates:
        lines += [
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({base})",
            'inputs = tokenizer("Your input", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))",
        ]
    return [*lines, "```"]


def _find_revision(attributes: Mapping[str, Any], base_model: str | None) -> str | None:
    """The revision of a base model on the Hub that the adapter is for, if it names one."""
    revision = attributes.get("revision")
    return revision if base_model and isinstance(revision, str) and revision else None


def _write_facts(attributes: Mapping[str, Any], base_model: str | None, num_trained: int | None) -> list[str]:
    link = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "not on the Hub"
    revision = _find_revision(attributes, base_model)
    lines = [
        f"- Base model: {link}" + ("" if revision is None else f", revision {_quote(revision)}"),
        f"- Prefix length: {attributes.get('num_virtual_tokens')} virtual tokens per layer",
    ]
    if attributes.get("num_virtual_tokens_pattern"):
        lines.append(f"- Other lengths: {_quote(attributes['num_virtual_tokens_pattern'])}")
    lines.append(f"- Start: {_describe_start(attributes)}")
    projection = attributes.get("projection")
    width = "" if projection == "none" else f", width {attributes.get('projection_dim')}"
    lines.append(f"- Projection: {_quote(projection)}{width}")
    if attributes.get("num_frozen_tokens"):
        lines.append(f"- Virtual tokens that keep their start: {attributes['num_frozen_tokens']}")
    if attributes.get("modules_to_save"):
        lines.append(f"- Modules that are trained as a whole: {_quote(attributes['modules_to_save'])}")
    if num_trained is not None:
        lines.append(f"- Trained parameters: {num_trained:,}")
    return lines


def _describe_start(attributes: Mapping[str, Any]) -> str:
    token_ids = attributes.get("prefix_init_token_ids")
    starts = {
        "text": "keys and values of the text below",
        "tokens": f"keys and values of {len(token_ids) if isinstance(token_ids, list) else 0} given tokens",
        "vocab": f"keys and values of tokens drawn from the vocabulary, seed {attributes.get('prefix_init_seed')}",
        "random": f"random keys and values, seed {attributes.get('prefix_init_seed')}",
        "zero": "zeros",
    }
    return starts.get(str(attributes.get("prefix_init")), "unknown")


def _write_text(text: object) -> list[str]:
    """Show a text as indented code, in which nothing means anything: no fence to close, no mark, no metadata."""
    if not isinstance(text, str) or not text.strip():
        return []
    shown = text[:MAX_TEXT_LENGTH]
    rest = f", the first {len(shown):,} of {len(text):,} characters" if len(text) > len(shown) else ""
    lines = [f"    {replace_controls(line)}".rstrip() for line in shown.strip("\r\n").splitlines()]
    return ["", f"The text that the prefix started as{rest}:", "", *lines]


def _write_results(metrics: Mapping[str, Any]) -> list[str]:
    names = {name: name.removeprefix("eval_") for name in metrics}
    shown = {names[name]: value for name, value in metrics.items() if names[name] not in _NOT_RESULTS}
    numbers = {name: value.item() if _is_scalar(value) else value for name, value in shown.items()}
    # Those of numpy are, too.
    lines = [f"- {_quote(name)}: {value:.4g}" for name, value in numbers.items() if isinstance(value, Real)]
    return ["", "Results:", "", *lines] if lines else []


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _quote(value: object) -> str:
    """Return a value as code, on one line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "`" + replace_controls(" ".join(text.split())).replace("`", "'") + "`"


def replace_controls(text: str) -> str:
    """Take out of a text what no file should hold."""
    return "".join(c if c == "\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
