"""The model card, `README.md`, that stands beside every saved adapter: what the prefix is, and how to load it."""

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .base_models import WHEEL_MODEL
from .card_text import replace_controls, write_section
from .peft_type import MEMBER_NAME
from .weights import read_tensor_infos

CARD_NAME = "README.md"
TAGS = ("peft", "peft_prefix_plus", "prefix-tuning")
_SECTION, _LIST = "prefix-plus", "prefix-plus adapters"
_BASE_MODEL_TAG = "base_model:adapter:"


def update_model_card(adapter_dir: str, metrics: Mapping[str, float] | None = None) -> None:
    """Write the section on the prefix into the model card of a saved adapter, or a new card.

    What else the card says stays as it is. Saving an adapter does the same without metrics.

    Args:
        adapter_dir (`str`): directory of a saved adapter.
        metrics (`Mapping[str, float]`, *optional*): results, such as `trainer.evaluate()` returns them.

    Raises:
        ValueError: if there is no PrefixPlus adapter, or the card that is there cannot be read.
    """
    _update_card(adapter_dir, metrics=metrics)


def push_model_card(
    repo_id: str,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write the section on the prefix into the model card of an adapter on the Hub.

    `model.push_to_hub` and `trainer.push_to_hub` put a card of transformers in the place of the one that was saved.
    The text of that card is kept.

    Args:
        repo_id (`str`): the repository.
        subfolder (`str`, *optional*): directory of the adapter in it.
        revision (`str`, *optional*): a branch; the main one by default.
        token (`str` or `bool`, *optional*): as everywhere in `huggingface_hub`.
        metrics (`Mapping[str, float]`, *optional*): as for [`update_model_card`].

    Raises:
        ValueError: if there is no PrefixPlus adapter, or the card that is there cannot be read.
    """
    folder = f"{subfolder}/" if subfolder else ""
    with tempfile.TemporaryDirectory() as directory:
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME):
            try:
                hf_hub_download(repo_id, folder + name, revision=revision, token=token, local_dir=directory)
            except RemoteEntryNotFoundError:
                # The configuration is asked for below; a card or weights may be missing.
                continue
        adapter_dir = os.path.join(directory, subfolder or "")
        _update_card(adapter_dir, repo_id, subfolder, library_name="peft", metrics=metrics)
        HfApi().upload_file(
            path_or_fileobj=os.path.join(adapter_dir, CARD_NAME),
            path_in_repo=folder + CARD_NAME,
            repo_id=repo_id,
            revision=revision,
            token=token,
            commit_message="Update the model card",
        )


def save_model_card(adapter_dir: str, saved_by_peft: bool) -> None:
    """Leave a model card while an adapter is saved. A card that cannot be read is left alone, with a warning.

    Args:
        adapter_dir (`str`): where `adapter_config.json` has just been written.
        saved_by_peft (`bool`): whether `PeftModel.save_pretrained` does so, which has written the weights by then, and
            the card of the whole model.
    """
    try:
        if not saved_by_peft:
            # The Trainer takes models with `library_name: peft` for a `PeftModel`, and this one may be another.
            _update_card(adapter_dir, has_weights=False)
        elif _is_written_by_peft(os.path.join(adapter_dir, CARD_NAME)):
            _update_card(adapter_dir, library_name="peft")
        else:
            parent, subfolder = os.path.split(os.path.abspath(adapter_dir))
            _update_card(adapter_dir, subfolder=subfolder, library_name="peft")
            if _is_written_by_peft(os.path.join(parent, CARD_NAME)):
                _list_adapters(parent)
    except ValueError as error:
        warnings.warn(f"The model card in {adapter_dir} was left alone: {error}", stacklevel=3)


def _update_card(
    adapter_dir: str,
    repo_id: str | None = None,
    subfolder: str | None = None,
    library_name: str | None = None,
    has_weights: bool = True,
    metrics: Mapping[str, float] | None = None,
) -> None:
    attributes = _read_attributes(adapter_dir)
    weights_path = os.path.join(adapter_dir, SAFETENSORS_WEIGHTS_NAME)
    has_weights = has_weights and os.path.isfile(weights_path)
    num_trained = _count_trained(weights_path, attributes.get("modules_to_save")) if has_weights else None
    base_model = attributes.get("base_model_name_or_path")
    base_model = base_model if is_hub_model(base_model) else None
    section = write_section(attributes, base_model, repo_id, subfolder, num_trained, metrics or {})
    card = _load_card(os.path.join(adapter_dir, CARD_NAME))
    _update_metadata(card, base_model, attributes.get("task_type"), library_name)
    card.text = _place_section(card.text, section, _SECTION)
    card.save(os.path.join(adapter_dir, CARD_NAME))


def _read_attributes(adapter_dir: str) -> dict[str, Any]:
    path = os.path.join(adapter_dir, CONFIG_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            attributes = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no {CONFIG_NAME} that could be read; expected a saved adapter.") from error
    peft_type = attributes.get("peft_type") if isinstance(attributes, dict) else None
    if peft_type != MEMBER_NAME:
        raise ValueError(f"{CONFIG_NAME} is of type {peft_type!r}; only the card of a {MEMBER_NAME} is written.")
    return dict(attributes)


def _count_trained(weights_path: str, modules_to_save: Sequence[str] | None) -> int:
    """Number of trained parameters in a weights file.

    What tells where the prefix started is not trained, nor are embeddings, which PEFT saves when they were resized.
    """
    infos = read_tensor_infos(weights_path)
    return sum(math.prod(info.shape) for name, info in infos.items() if _is_trained(name, modules_to_save or ()))


def _is_trained(name: str, modules_to_save: Sequence[str]) -> bool:
    module, _, attribute = name.rpartition(".")
    if module.endswith("prefix_plus_encoder"):
        return not attribute.startswith(("anchor_", "scale_", "embedding_step"))
    return attribute == "trainable_tokens_delta" or any(f"{end}." in name for end in modules_to_save)


def is_hub_model(name: object) -> bool:
    """Whether a name can be that of a model on the Hub: it has the form, and no other meaning on this machine."""
    if not isinstance(name, str) or name == WHEEL_MODEL or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _load_card(path: str) -> ModelCard:
    if not os.path.isfile(path):
        return ModelCard("---\n{}\n---\n\n# PrefixPlus adapter\n")
    try:
        card: ModelCard = ModelCard.load(path)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} has metadata that cannot be read ({error}). Mend the lines between `---`."
        ) from error
    return card


def _update_metadata(card: ModelCard, base_model: str | None, task_type: object, library_name: str | None) -> None:
    """Say in the metadata what the adapter is; the Hub refuses cards whose base model is a path."""
    given = card.data.get("base_model")
    if not all(is_hub_model(name) for name in (given if isinstance(given, list) else [given])):
        card.data.pop("base_model", None)
    if base_model is not None and not card.data.get("base_model"):
        card.data["base_model"] = base_model
    if library_name is not None:
        card.data["library_name"] = library_name
    if task_type == "CAUSAL_LM" and not card.data.get("pipeline_tag"):
        card.data["pipeline_tag"] = "text-generation"
    tags = [tag for tag in map(str, card.data.get("tags") or []) if not _names_directory(tag)]
    card.data["tags"] = tags + [tag for tag in TAGS if tag not in tags]


def _names_directory(tag: str) -> bool:
    return tag.startswith(_BASE_MODEL_TAG) and not is_hub_model(tag.removeprefix(_BASE_MODEL_TAG))


def _place_section(text: str, section: str, name: str) -> str:
    """Replace a section between its marks, or put a new one in front of the first heading of the second level."""
    start, end = f"<!-- {name}: start; rewritten with every save -->", f"<!-- {name}: end -->"
    newline = "\r\n" if "\r\n" in text else "\n"
    block = f"{start}\n\n{section}\n\n{end}".replace("\n", newline)
    old = re.search(rf"^{re.escape(start)}\r?$.*?^{re.escape(end)}\r?$", text, flags=re.DOTALL | re.MULTILINE)
    if old is not None:
        return text[: old.start()] + block + text[old.end() :]
    heading = re.search(r"^##+ ", _hide(text), flags=re.MULTILINE)
    if heading is None:
        return text.rstrip() + newline * 2 + block + newline
    return text[: heading.start()] + block + newline * 2 + text[heading.start() :]


def _hide(text: str) -> str:
    """Blank out fenced code, where a line that starts with `##` is no heading, and the sections that are here."""
    hidden = r"^(```+|~~~+).*?^\1|^<!-- prefix-plus[^\n]*: start;.*?^<!-- prefix-plus[^\n]*: end -->"
    return re.sub(hidden, lambda match: " " * len(match.group()), text, flags=re.DOTALL | re.MULTILINE)


def _is_written_by_peft(path: str) -> bool:
    """Whether PEFT wrote or updated a card: it leaves its version there, and only in the card of the whole model."""
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8-sig") as file:
        return f"- PEFT {peft.__version__}" in file.read().splitlines()


def _list_adapters(directory: str) -> None:
    """Say in the card of a whole model which adapters its directories hold."""
    names, base_models = [], set()
    for name in sorted(os.listdir(directory)):
        try:
            attributes = _read_attributes(os.path.join(directory, name))
        except ValueError:
            continue
        names.append(name)
        base_models.add(attributes.get("base_model_name_or_path"))
    section = ["## PrefixPlus adapters", "", "Each directory has a card that tells how to load it:", ""]
    section += [f"- [{replace_controls(name)}](<{name}/{CARD_NAME}>)" for name in names]
    path = os.path.join(directory, CARD_NAME)
    card = _load_card(path)
    base_model = base_models.pop() if len(base_models) == 1 else None
    _update_metadata(card, base_model if is_hub_model(base_model) else None, None, None)
    card.text = _place_section(card.text, "\n".join(section), _LIST)
    card.save(path)
