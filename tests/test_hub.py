"""What is downloaded from the Hub and uploaded to it, who may, and what must not leak; the server is on loopback."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from behaviours.hub import BASE, PUSH, _build_adapted, _build_trainer, _load_base
from behaviours.hub_client import OWNER, STRANGER_TOKEN, TOKEN, get_directory, get_hub, in_client
from behaviours.methods import METHODS
from behaviours.subjects import compute_logits, save_base_model
from helpers import Snapshot
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.model_card import push_model_card

METHOD = METHODS["PrefixPlus"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def push(directory: Path, name: str, **settings) -> PeftModel:
    model = _build_adapted(METHOD, directory)
    model.push_to_hub(f"{OWNER}/{name}", **PUSH, **settings)
    return model


def put(directory: Path, name: str, **files) -> str:
    """An adapter on the Hub with some files put in the place of others; `None` takes one away."""
    _build_adapted(METHOD, directory).save_pretrained(directory / name)
    contents: dict[str, bytes | None] = {path.name: path.read_bytes() for path in (directory / name).iterdir()}
    contents |= files
    repo_id = f"{OWNER}/{name}"
    get_hub().put(repo_id, {key: value for key, value in contents.items() if value is not None})
    return repo_id


def list_asked(since: int) -> set[str]:
    """Files that were asked for after some requests, found or not."""
    paths = [request.path for request in get_hub().requests[since:]]
    return {path.partition("/resolve/")[2].partition("/")[2] for path in paths if "/resolve/" in path}


def load_by_peft(repo_id: str, directory: Path, **kwargs) -> torch.nn.Module:
    return PeftModel.from_pretrained(_load_base(directory), repo_id, **kwargs)


def load_by_transformers(repo_id: str, directory: Path, **kwargs) -> torch.nn.Module:
    model = _load_base(directory)
    model.load_adapter(repo_id, adapter_kwargs=kwargs)
    return model


both_ways = pytest.mark.parametrize("load", [load_by_peft, load_by_transformers])


@in_client
def test_the_server_answers_as_the_hub_does(tmp_path):
    hub, api = get_hub(), HfApi(token=TOKEN)
    hub.put(f"{OWNER}/open", {"a.txt": b"a"})
    hub.put(f"{OWNER}/private", {"a.txt": b"a"}, private=True)
    hub.put(f"{OWNER}/gated", {"a.txt": b"a"}, gated=True)
    for error, repo_id, settings in (
        (RepositoryNotFoundError, f"{OWNER}/absent", {}),
        (RepositoryNotFoundError, f"{OWNER}/private", {"token": False}),
        (RepositoryNotFoundError, f"{OWNER}/private", {"token": STRANGER_TOKEN}),
        (GatedRepoError, f"{OWNER}/gated", {"token": STRANGER_TOKEN}),
        (RevisionNotFoundError, f"{OWNER}/open", {"revision": "absent"}),
        (HfHubHTTPError, f"{OWNER}/open", {"token": "hf_unknown"}),
    ):
        with pytest.raises(error):
            hf_hub_download(repo_id, "a.txt", **settings)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(f"{OWNER}/open", "b.txt")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=STRANGER_TOKEN).upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id=f"{OWNER}/open")
    assert api.whoami()["name"] == OWNER
    assert Path(hf_hub_download(f"{OWNER}/private", "a.txt", token=TOKEN)).read_bytes() == b"a"
    with pytest.raises(ValueError, match="base_model"):
        api.upload_file(
            path_or_fileobj=b"---\nbase_model: /home/me\n---\n", path_in_repo="README.md", repo_id=f"{OWNER}/open"
        )


@in_client
def test_large_files_are_uploaded_once_and_without_the_token(tmp_path):
    since = len(get_hub().requests)
    model = push(tmp_path, "once")
    model.push_to_hub(f"{OWNER}/once-more", **PUSH)
    stored = [r for r in get_hub().requests[since:] if r.path.startswith("/lfs/")]
    assert [r.method for r in stored if r.method == "PUT"] == ["PUT"]
    load_by_peft(f"{OWNER}/once", tmp_path, token=TOKEN)
    stored = [r for r in get_hub().requests[since:] if r.path.startswith("/lfs/")]
    assert any(r.method == "GET" for r in stored) and all(r.user is None for r in stored)


@both_ways
@in_client
def test_loading_asks_for_nothing_but_the_adapter(load, tmp_path):
    repo_id = put(tmp_path, f"asked-{load.__name__}", **{"adapter_model.bin": b"?", "tokenizer.json": b"{}"})
    base = _load_base(tmp_path)
    since = len(get_hub().requests)
    if load is load_by_peft:
        PeftModel.from_pretrained(base, repo_id)
    else:
        base.load_adapter(repo_id)
    assert list_asked(since) <= {CONFIG, WEIGHTS, f"{WEIGHTS}.index.json"}
    assert set(get_hub().downloads(since)) <= {f"{repo_id}/{CONFIG}", f"{repo_id}/{WEIGHTS}"}
    since = len(get_hub().requests)
    PeftConfig.from_pretrained(repo_id)
    assert list_asked(since) <= {CONFIG}


@both_ways
@in_client
def test_a_private_adapter_needs_the_token(load, tmp_path):
    name = f"private-{load.__name__}"
    model = push(tmp_path, name, private=True)
    for token in (None, STRANGER_TOKEN):
        with pytest.raises((ValueError, OSError)):
            load(f"{OWNER}/{name}", tmp_path, token=token)
    loaded = load(f"{OWNER}/{name}", tmp_path, token=TOKEN)
    assert torch.equal(compute_logits(loaded), compute_logits(model))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@both_ways
@in_client
def test_a_malicious_pickle_does_not_run(load, tmp_path):
    trap = tmp_path / "sprung"
    torch.save({"weights": Trap(trap)}, tmp_path / "archive")
    for kind, content in (("archive", (tmp_path / "archive").read_bytes()), ("pickle", pickle.dumps(Trap(trap)))):
        repo_id = put(tmp_path, f"{kind}-{load.__name__}", **{WEIGHTS: None, "adapter_model.bin": content})
        with pytest.raises(Exception, match=r"(?i)weights_only|not a complete|unpickl|safetensors"):
            load(repo_id, tmp_path)
        assert not trap.exists()


@both_ways
@in_client
def test_a_malicious_configuration_initializes_nothing(load, tmp_path):
    name = f"malicious-{load.__name__}"
    repo_id = put(tmp_path, name)
    hub = get_hub()
    hub.put("evil/tokenizer", {"tokenizer_config.json": b"{}"})
    files = hub.repositories[repo_id].files()
    attributes = json.loads(files[CONFIG]) | {
        "prefix_is_initialized": False,
        "prefix_init": "text",
        "prefix_init_text": "text",
        "tokenizer_name_or_path": "evil/tokenizer",
    }
    files[CONFIG] = json.dumps(attributes).encode()
    since = len(hub.requests)
    assert compute_logits(load(repo_id, tmp_path)).isfinite().all()
    assert not any("evil" in request.path for request in hub.requests[since:])
    files[CONFIG] = json.dumps(attributes | {"tokenizer_kwargs": {"trust_remote_code": True}}).encode()
    hub.put(f"{repo_id}-code", files)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(f"{repo_id}-code", tmp_path)
    assert not any("evil" in request.path for request in hub.requests[since:])


@in_client
def test_adapters_that_cannot_be_loaded_leave_the_model_alone(tmp_path):
    push(tmp_path, "fine")
    hub = get_hub()
    hub.put(f"{OWNER}/gated-adapter", hub.repositories[f"{OWNER}/fine"].files(), gated=True)
    put(tmp_path, "weightless", **{WEIGHTS: None})
    put(tmp_path, "cut", **{WEIGHTS: b"12345678"})
    model = _load_base(tmp_path)
    snapshot = Snapshot(model)
    for repo_id, settings in (
        (f"{OWNER}/absent", {}),
        (f"{OWNER}/fine", {"revision": "absent"}),
        (f"{OWNER}/fine", {"subfolder": "absent"}),
        (f"{OWNER}/gated-adapter", {}),
        (f"{OWNER}/weightless", {}),
        (f"{OWNER}/cut", {}),
    ):
        with pytest.raises((ValueError, OSError)):
            PeftModel.from_pretrained(model, repo_id, **settings)
        snapshot.assert_unchanged(model)


def search_tokens() -> list[Path]:
    """Files of the process that have a token in them: its log, its cache, and what it has written."""
    found = []
    for path in get_directory().rglob("*"):
        if path.is_file() and any(token.encode() in path.read_bytes() for token in (TOKEN, STRANGER_TOKEN)):
            found.append(path)
    return found


@in_client
def test_the_token_is_nowhere(tmp_path):
    place = get_directory() / "searched"
    base = _load_base(tmp_path)
    model = get_peft_model(
        base,
        PrefixPlusConfig(
            task_type="CAUSAL_LM", prefix_init_text="text", tokenizer_kwargs={"token": TOKEN, "use_fast": True}
        ),
    )
    model.push_to_hub(f"{OWNER}/secret", private=True, token=TOKEN)
    model.save_pretrained(place / "saved")
    push_model_card(f"{OWNER}/secret", token=TOKEN)
    # Not by `hub_token`, which the Trainer would write into training_args.bin.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        trainer = _build_trainer(METHOD, place, f"{OWNER}/secret", save_strategy="no", hub_token=None)
        trainer.push_to_hub()
    print(model, model.peft_config, model.active_peft_config.to_dict())
    for repo_id, token in ((f"{OWNER}/secret", STRANGER_TOKEN), (f"{OWNER}/absent", TOKEN), ("evil/absent", TOKEN)):
        for fail in (
            lambda: PeftModel.from_pretrained(_load_base(tmp_path), repo_id, token=token),  # noqa: B023
            lambda: _load_base(tmp_path).load_adapter(repo_id, adapter_kwargs={"token": token}),  # noqa: B023
            lambda: AutoPeftModelForCausalLM.from_pretrained(repo_id, token=token),  # noqa: B023
            lambda: push_model_card(repo_id, token=token),  # noqa: B023
            lambda: get_peft_model(
                _load_base(tmp_path),
                PrefixPlusConfig(
                    prefix_init_text="text",
                    tokenizer_name_or_path=repo_id,  # noqa: B023
                    tokenizer_kwargs={"token": token},  # noqa: B023
                ),
            ),
        ):
            with pytest.raises((ValueError, OSError)) as info:
                fail()
            print(info.getrepr(style="short", chain=True))
            assert token not in repr(info.value) and token not in str(info.value.__cause__)
    sys.stdout.flush()
    loaded = PeftModel.from_pretrained(_load_base(tmp_path), f"{OWNER}/secret", token=TOKEN)
    print(loaded.peft_config, vars(loaded.active_peft_config).keys())
    loaded.save_pretrained(place / "again")
    sys.stdout.flush()
    assert b"secret" in (get_directory() / "log").read_bytes()
    found = search_tokens()
    assert not found, found
    uploaded = get_hub().repositories[f"{OWNER}/secret"].commits.values()
    assert not any(TOKEN.encode() in content for files in uploaded for content in files.values())


def read_card(repo_id: str, name: str = "README.md", revision: str = "main") -> ModelCard:
    return ModelCard(get_hub().repositories[repo_id].files(revision)[name].decode())


@in_client
def test_the_card_is_kept_when_a_saved_adapter_is_uploaded(tmp_path):
    repo_id = f"{OWNER}/uploaded"
    _build_adapted(METHOD, tmp_path).save_pretrained(tmp_path / "saved")
    api = HfApi(token=TOKEN)
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=tmp_path / "saved")
    card = read_card(repo_id)
    assert "## Use this prefix" in card.text and card.data.base_model == BASE and card.data.library_name == "peft"


@in_client
def test_the_card_of_a_base_model_without_a_name_is_accepted(tmp_path):
    repo_id, place = f"{OWNER}/nameless", save_base_model(tmp_path / "base")
    model = METHOD.apply(AutoModelForCausalLM.from_pretrained(place))
    model.save_pretrained(tmp_path / "saved")
    api = HfApi(token=TOKEN)
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=tmp_path / "saved")
    assert str(tmp_path) not in str(read_card(repo_id))


@in_client
def test_the_card_is_written_after_a_push(tmp_path):
    repo_id = f"{OWNER}/card"
    push(tmp_path, "card")
    push_model_card(repo_id, token=TOKEN)
    card, messages = read_card(repo_id), list(get_hub().repositories[repo_id].messages)
    assert "## Use this prefix" in card.text and f'adapter = "{repo_id}"\n' in card.text
    assert "Trained parameters" in card.text
    assert card.data.base_model == BASE and card.data.library_name == "peft"
    push_model_card(repo_id, token=TOKEN)
    assert get_hub().repositories[repo_id].messages == messages
    push_model_card(repo_id, token=TOKEN, metrics={"eval_loss": 0.5})
    assert "- `loss`: 0.5\n" in read_card(repo_id).text
    # `push_to_hub` takes the card that is on the Hub over.
    push(tmp_path, "card")
    assert "## Use this prefix" in read_card(repo_id).text


@in_client
def test_the_card_of_a_revision_and_of_a_subfolder(tmp_path):
    repo_id = f"{OWNER}/places"
    model = push(tmp_path, "places")
    model.add_adapter("second", METHOD.build_config(size=3, task_type="CAUSAL_LM"))
    model.push_to_hub(repo_id, revision="more", **PUSH)
    main = get_hub().repositories[repo_id].files()
    push_model_card(repo_id, subfolder="second", revision="more", token=TOKEN)
    assert get_hub().repositories[repo_id].files() == main
    text = read_card(repo_id, "second/README.md", "more").text
    assert 'subfolder="second")' in text and f'adapter = "{repo_id}"\n' in text
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        push_model_card(repo_id, subfolder="absent", token=TOKEN)


@in_client
def test_the_card_of_the_trainer_keeps_its_results(tmp_path):
    repo_id = f"{OWNER}/trained"
    trainer = _build_trainer(METHOD, tmp_path, repo_id, save_strategy="no")
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    before = read_card(repo_id)
    assert "following results on the evaluation set" in before.text
    push_model_card(repo_id, token=TOKEN)
    card = read_card(repo_id)
    assert "## Use this prefix" in card.text and card.data.library_name == "peft"
    assert card.text.split("<!-- prefix-plus: start")[0] == before.text.split("## Model description")[0]
    assert before.text.split("## Model description")[1] in card.text


@in_client
def test_a_base_model_from_a_directory_is_no_obstacle_after_save_model(tmp_path):
    repo_id, place = f"{OWNER}/from-directory", save_base_model(tmp_path / "base")
    model = METHOD.apply(AutoModelForCausalLM.from_pretrained(place))
    settings = {"report_to": "none", "use_cpu": True, "hub_model_id": repo_id, "hub_token": TOKEN}
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "output"), **settings))
    # PEFT gives the path as the base model, for every method.
    with pytest.raises(ValueError, match="base_model"):
        trainer.push_to_hub()
    trainer.save_model()
    HfApi(token=TOKEN).upload_folder(repo_id=repo_id, folder_path=tmp_path / "output", ignore_patterns="*.bin")
    assert str(tmp_path) not in str(read_card(repo_id))


@in_client
def test_the_trainer_pushes_an_adapter_that_transformers_added(tmp_path):
    repo_id, model = f"{OWNER}/native", _load_base(tmp_path)
    model.add_adapter(METHOD.build_config(size=3))
    arguments = TrainingArguments(
        str(tmp_path / "output"), report_to="none", use_cpu=True, hub_model_id=repo_id, hub_token=TOKEN
    )
    trainer = Trainer(model, arguments)
    trainer.push_to_hub()
    trainer.push_to_hub()
    assert {CONFIG, WEIGHTS} <= set(get_hub().repositories[repo_id].files())
    assert torch.equal(compute_logits(load_by_transformers(repo_id, tmp_path)), compute_logits(model))


@in_client
def test_a_pipeline_takes_the_name_of_an_adapter(tmp_path):
    hub = get_hub()
    model = push(tmp_path, "piped")
    tokenizer = {name: content for name, content in hub.repositories[BASE].files().items() if "token" in name}
    hub.repositories[f"{OWNER}/piped"].files().update(tokenizer)
    generate = pipeline("text-generation", model=f"{OWNER}/piped", device="cpu")
    ids = generate.tokenizer("text", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(generate.model(ids).logits, model(ids).logits, atol=1e-5)


WITHOUT_IMPORT = """
import sys
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, pipeline
base, adapter = sys.argv[1:]
ways = {
    "PeftConfig": lambda: PeftConfig.from_pretrained(adapter),
    "PeftModel": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "load_adapter": lambda: AutoModelForCausalLM.from_pretrained(base).load_adapter(adapter),
    "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(adapter),
    "pipeline": lambda: pipeline("text-generation", model=adapter, device="cpu"),
}
for name, way in ways.items():
    try:
        way()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
import peft_prefix_plus
for name, way in ways.items():
    way()
print("cured")
"""


@pytest.mark.slow
def test_the_error_without_the_import(tmp_path):
    base = save_base_model(tmp_path / "base")
    METHOD.apply(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "adapter")
    for path in Path(base).glob("token*"):
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-c", WITHOUT_IMPORT, base, str(tmp_path / "adapter")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ways = ["PeftConfig", "PeftModel", "AutoPeftModel", "load_adapter", "AutoModel", "pipeline"]
    assert lines == [f"{way}: KeyError: 'PREFIX_PLUS'" for way in ways] + ["cured"]
