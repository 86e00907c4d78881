"""Ways to damage the files of a saved adapter, drawn by hypothesis."""

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_prefix_plus import PrefixPlusConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIELDS = [field.name for field in dataclasses.fields(PrefixPlusConfig) if field.name != "peft_type"]
SLOW_PATTERNS = [
    "(a+)+$",
    "(.*)*x",
    "(.*.*)*self_attn!",
    "(a|a)*b",
    "(?:.*\\.)+(?:.*\\.)+!",
    ".*.*.*.*.*.*.*.*!",
    "(.?){60}!",
]
ODD_STRINGS = [
    "",
    " ",
    "os.system",
    "../../../etc/passwd",
    "no/where",
    "\ud800",
    "\x00",
    "é" * 50,
    "x" * 20_000,
    "all-linear",
    "dummy-target-modules",
    "self_attn",
    "attn",
    "q_proj",
    "norm",
    "model",
    "default",
    "mlp",
    ".*",
    "(",
    "lm_head",
    "a{99999999999999}",
    "(" * 300 + ")" * 300,
    "(?P<idx>1)",
    "a)(b",
    "(?i)attn",
    "\\1",
    "none",
    "linear",
    "mlp",
    "zero",
    "random",
    "text",
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
    *SLOW_PATTERNS,
]
TASKS = [None, "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
NUMBERS = [-1, 0, 1, 2, 3, 4, 6, 64, 10**6, 10**9, 2**31, 2**63, 2**64, 10**18, 10**30, -(10**30)]
ODD_NUMBERS = [0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")]
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_STRINGS)
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.sampled_from(ODD_STRINGS), scalars, max_size=3),
    st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner), max_leaves=6
    ),
)
# What could make another library do something.
HOSTILE: list[dict[str, Any]] = [
    {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}, "task_type": None},
    {"auto_mapping": {"base_model_class": "pipeline", "parent_library": "transformers"}, "task_type": None},
    {"auto_mapping": {"base_model_class": ["x"], "parent_library": {"a": 1}}, "task_type": None},
    {
        "prefix_init": "text",
        "prefix_init_text": "a",
        "prefix_init_token_ids": None,
        "prefix_is_initialized": False,
        "tokenizer_name_or_path": "no/where",
        "tokenizer_kwargs": {"trust_remote_code": True},
    },
    {
        "prefix_init": "text",
        "prefix_init_text": "a",
        "prefix_init_token_ids": None,
        "prefix_is_initialized": False,
        "tokenizer_name_or_path": "no/where",
    },
    {"num_virtual_tokens": 10**9},
    {"num_virtual_tokens": 2**24},
    {"num_virtual_tokens": 2**24 - 1, "projection": "none"},
    {"projection_dim": 10**9},
    {"projection_dim": 2**24},
    {"num_virtual_tokens_pattern": {".*": 10**9}},
    {"num_virtual_tokens_pattern": {"self_attn": 2**24}},
    {"layers_to_transform": [0, 10**9]},
    {"layers_to_transform": 0, "layers_pattern": "(.*)*"},
    {"layers_to_transform": [0], "layers_pattern": ["layers"]},
    {"modules_to_save": ["q_proj"]},
    {"modules_to_save": ["model"]},
    {"modules_to_save": [""]},
    {"modules_to_save": ["attn"]},
    {"modules_to_save": ["mlp"]},
    {"modules_to_save": ["nothing"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["(.*)*x"]},
    {"target_modules": ["x"] * 1000},
    {"target_modules": ["self_attn"] * 30},
    *({"task_type": task_type} for task_type in TASKS),
    {"trainable_token_indices": [0, 1]},
    {"target_parameters": ["weight"]},
    {"runtime_config": {}},
    {"source": "x"},
    {"base_model_name_or_path": "no/where", "revision": "x" * 300},
    {"inference_mode": True},
    {"is_prompt_learning": True},
]


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a directory, with a name that tells what it was."""

    name: str
    apply: Callable[[Path], None]

    def __repr__(self) -> str:
        return self.name


def change_config(name: str, change: Callable[[dict], Any]) -> Change:
    def apply(directory: Path) -> None:
        path = directory / CONFIG
        try:
            settings = json.loads(path.read_text())
        except (ValueError, OSError, RecursionError):
            return
        if isinstance(settings, dict):
            change(settings)
            path.write_text(json.dumps(settings))

    return Change(name, apply)


def change_bytes(file: str, name: str, change: Callable[[bytes], bytes]) -> Change:
    def apply(directory: Path) -> None:
        path = directory / file
        if path.is_file():
            path.write_bytes(change(path.read_bytes()))

    return Change(f"{file}: {name}", apply)


def change_tensors(name: str, change: Callable[[dict], Any]) -> Change:
    def apply(directory: Path) -> None:
        path = directory / WEIGHTS
        try:
            weights = load_file(path)
        except Exception:
            return
        change(weights)
        save_file({key: tensor.contiguous().clone() for key, tensor in weights.items()}, path)

    return Change(name, apply)


def change_header(name: str, change: Callable[[dict], Any]) -> Change:
    def rewrite(data: bytes) -> bytes:
        try:
            size = struct.unpack("<Q", data[:8])[0]
            header = json.loads(data[8 : 8 + size])
            change(header)
        except (ValueError, KeyError, struct.error, TypeError):
            return data
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return change_bytes(WEIGHTS, name, rewrite)


def replace_by_directory(file: str) -> Change:
    def apply(directory: Path) -> None:
        remove(directory / file)
        (directory / file).mkdir()

    return Change(f"{file}: a directory", apply)


def remove_file(file: str) -> Change:
    return Change(f"{file}: removed", lambda directory: remove(directory / file))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


class Exploit:
    """Runs code when it is unpickled by a loader that lets it."""

    def __reduce__(self) -> tuple:
        return exec, ("import os; os.environ['PREFIX_PLUS_EXPLOITED'] = '1'",)


def pickle_weights(name: str, make: Callable[[dict], Any], legacy: bool = False) -> Change:
    """Weights in the older format of PEFT, which is a pickle."""

    def apply(directory: Path) -> None:
        path = directory / WEIGHTS
        try:
            weights = load_file(path)
        except Exception:
            return
        remove(path)
        torch.save(make(weights), directory / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)

    return Change(f"adapter_model.bin: {name}", apply)


def edit_bytes(file: str, draw_position: st.SearchStrategy[int]) -> st.SearchStrategy[Change]:
    """Cuts and flips anywhere in a file; positions are taken modulo its length."""

    def cut(position: int) -> Change:
        return change_bytes(file, f"cut at {position}", lambda data: data[: position % (len(data) + 1)])

    def flip(position: int, mask: int) -> Change:
        def change(data: bytes) -> bytes:
            changed = bytearray(data)
            if changed:
                changed[position % len(changed)] ^= mask
            return bytes(changed)

        return change_bytes(file, f"byte {position} ^ {mask}", change)

    def insert(position: int, junk: bytes) -> Change:
        return change_bytes(
            file,
            f"{junk!r} at {position}",
            lambda data: data[: position % (len(data) + 1)] + junk + data[position % (len(data) + 1) :],
        )

    return st.one_of(
        st.builds(cut, draw_position),
        st.builds(flip, draw_position, st.integers(1, 255)),
        st.builds(
            insert, draw_position, st.sampled_from([b"\x00", b"}", b"{", b'"', b"\xff\xff", b"1", b" ", b",", b"e9"])
        ),
    )


def _nest(data: bytes) -> bytes:
    return b'{"peft_type": "PREFIX_PLUS", "auto_mapping": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


RAW_CONFIGS = {
    "empty": lambda data: b"",
    "nested": _nest,
    "list": lambda data: b"[]",
    "null": lambda data: b"null",
    "number": lambda data: b"7",
    "string": lambda data: b'"peft_type"',
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "utf-16": lambda data: data.decode(errors="replace").encode("utf-16"),
    "duplicate": lambda data: data.rstrip()[:-1] + b', "num_virtual_tokens": 7}',
    "duplicate of itself": lambda data: data.rstrip()[:-1] + b', "projection": "mlp", "projection": "none"}',
    "long number": lambda data: b'{"peft_type": "PREFIX_PLUS", "num_virtual_tokens": ' + b"9" * 10_000 + b"}",
    "only the type": lambda data: b'{"peft_type": "PREFIX_PLUS"}',
}
config_changes = st.one_of(
    st.builds(lambda key: change_config(f"no {key}", lambda s: s.pop(key, None)), st.sampled_from(FIELDS)),
    st.builds(
        lambda key, value: change_config(f"{key}={value!r:.80}", lambda s: s.update({key: value})),
        st.sampled_from(FIELDS),
        values,
    ),
    st.builds(lambda d: change_config(f"{d!r:.120}", lambda s: s.update(d)), st.sampled_from(HOSTILE)),
    st.builds(
        lambda k, v: change_config(f"{k!r:.20}={v!r:.50}", lambda s: s.update({k: v})), st.text(max_size=8), values
    ),
    st.builds(
        lambda value: change_config(f"peft_type={value!r:.50}", lambda s: s.update(peft_type=value)),
        values.filter(lambda value: value not in ("", "PREFIX_PLUS")),
    ),
    st.builds(lambda name: change_bytes(CONFIG, name, RAW_CONFIGS[name]), st.sampled_from(sorted(RAW_CONFIGS))),
    edit_bytes(CONFIG, st.integers(0, 3000)),
    st.sampled_from([replace_by_directory(CONFIG), remove_file(CONFIG)]),
)


def _pick(weights: dict, index: int) -> str:
    return sorted(weights)[index % len(weights)] if weights else ""


def _on_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> st.SearchStrategy[Change]:
    def build(index: int) -> Change:
        def apply(weights: dict) -> None:
            if weights:
                weights[_pick(weights, index)] = change(weights[_pick(weights, index)])

        return change_tensors(f"{name} of tensor {index}", apply)

    return st.builds(build, st.integers(0, 40))


def _put(value: float, position: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone() if tensor.is_floating_point() and tensor.numel() else torch.zeros(3)
        tensor.view(-1)[position % tensor.numel()] = value
        return tensor

    return change


def _rename(index: int, name: str) -> Change:
    def apply(weights: dict) -> None:
        if weights:
            weights[name.replace("@", _pick(weights, index))] = weights.pop(_pick(weights, index))

    return change_tensors(f"tensor {index} is called {name!r:.40}", apply)


def _set_header(index: int, key: str, value: Any) -> Change:
    def change(header: dict) -> None:
        names = [name for name in sorted(header) if name != "__metadata__"]
        header[names[index % len(names)]][key] = value

    return change_header(f"header of tensor {index}: {key}={value!r:.40}", change)


DTYPES = [
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
]
BASE = "base_model.model."
FOREIGN = [
    "x",
    "",
    BASE,
    "a.b.c",
    BASE + "model.norm.weight",
    BASE + "model.layers.0.mlp.gate_proj.weight",
    "norm.weight",
    BASE + "model.layers.9.self_attn.prefix_plus_encoder.anchor_keys",
    BASE + "model.layers.0.self_attn.q_proj.lora_A.weight",
    BASE + "model.layers.0.self_attn.prefix_plus_encoder.default.anchor_keys",
    BASE + "lm_head.weight",
    "é" * 30,
]
RAW_WEIGHTS = {
    "empty": lambda data: b"",
    "claims 2^60 bytes of header": lambda data: struct.pack("<Q", 2**60) + data[8:],
    "claims 2^64 - 1 bytes of header": lambda data: b"\xff" * 8 + data[8:],
    "claims 90 MB of header": lambda data: struct.pack("<Q", 90 * 2**20) + data[8:],
    "no header": lambda data: struct.pack("<Q", 0) + data,
    "no tensors": lambda data: struct.pack("<Q", 2) + b"{}",
    "spaces": lambda data: struct.pack("<Q", 1000) + b" " * 1000 + data,
    "pickle": lambda data: b"\x80\x04\x95.",
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "junk behind": lambda data: data + b"\x00" * 100,
}
PICKLES = [
    pickle_weights("as it was", lambda weights: weights),
    pickle_weights("legacy", lambda weights: weights, legacy=True),
    pickle_weights("code", lambda weights: {"x": Exploit()}),
    pickle_weights("list", lambda weights: list(weights.values())),
    pickle_weights("numbers", lambda weights: dict.fromkeys(weights, 1.0)),
    pickle_weights("integers as names", lambda weights: dict(enumerate(weights.values()))),
    pickle_weights("huge", lambda weights: {key: torch.zeros(1).expand(10**12) for key in weights}),
    pickle_weights("code in legacy", lambda weights: {"x": Exploit()}, legacy=True),
]
weight_changes = st.one_of(
    edit_bytes(WEIGHTS, st.integers(0, 30_000)),
    edit_bytes(WEIGHTS, st.integers(0, 400)),
    st.builds(lambda name: change_bytes(WEIGHTS, name, RAW_WEIGHTS[name]), st.sampled_from(sorted(RAW_WEIGHTS))),
    st.builds(
        _set_header,
        st.integers(0, 40),
        st.just("dtype"),
        st.sampled_from(["F32", "F64", "I8", "X", "", 5, None, "F8_E4M3"]),
    ),
    st.builds(
        _set_header,
        st.integers(0, 40),
        st.just("shape"),
        st.sampled_from([[], [0], [2**62, 4], [-1], [1.5], "x", None, [1] * 500]),
    ),
    st.builds(
        _set_header,
        st.integers(0, 40),
        st.just("data_offsets"),
        st.sampled_from([[0, 0], [0, 2**60], [5, 1], [-1, 4], [0], None]),
    ),
    st.builds(lambda value: change_header(f"metadata {value!r:.40}", lambda h: h.update(__metadata__=value)), values),
    _on_tensor("transposed", lambda tensor: tensor.transpose(0, -1) if tensor.dim() else tensor),
    _on_tensor("flat", lambda tensor: tensor.reshape(-1)),
    _on_tensor("one more", lambda tensor: torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor),
    _on_tensor("none left", lambda tensor: tensor[:0] if tensor.dim() else tensor),
    _on_tensor("scalar", lambda tensor: torch.tensor(1.0)),
    st.sampled_from(DTYPES).flatmap(lambda dtype: _on_tensor(f"{dtype}", lambda tensor: tensor.to(dtype))),
    st.builds(
        lambda dtype: change_tensors(f"all {dtype}", lambda w: w.update({k: t.to(dtype) for k, t in w.items()})),
        st.sampled_from(DTYPES),
    ),
    st.tuples(
        st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e38, 0.0, 1.5]), st.integers(0, 500)
    ).flatmap(lambda pair: _on_tensor(f"{pair[0]} at {pair[1]}", _put(*pair))),
    _on_tensor("1e300", lambda tensor: torch.full(tensor.shape, 1e300, dtype=torch.float64)),
    st.builds(
        lambda index: change_tensors(f"no tensor {index}", lambda w: w.pop(_pick(w, index), None)), st.integers(0, 40)
    ),
    st.builds(_rename, st.integers(0, 40), st.sampled_from([*FOREIGN, "@x", "x@", "@.default", BASE + "@"])),
    st.builds(
        lambda name: change_tensors(f"and {name!r:.60}", lambda w: w.update({name: torch.ones(3)})),
        st.sampled_from(FOREIGN),
    ),
    st.builds(
        lambda name: change_tensors(f"and {name!r:.60}", lambda w: w.update({name: torch.ones(16)})),
        st.sampled_from(FOREIGN),
    ),
    st.sampled_from(
        [change_tensors("no tensors", dict.clear), replace_by_directory(WEIGHTS), remove_file(WEIGHTS), *PICKLES]
    ),
)


def _grow(axis_size: int, new_size: int) -> Callable[[dict], None]:
    """Repeat or cut every axis of one size."""

    def apply(weights: dict) -> None:
        for name, tensor in weights.items():
            for axis, size in enumerate(tensor.shape):
                if size == axis_size:
                    index = torch.arange(new_size) % size
                    weights[name] = weights[name].index_select(axis, index)

    return apply


def resize(field: str, old: int, new: int) -> list[Change]:
    """Both files say a new size."""
    return [
        change_config(f"{field}={new}", lambda settings: settings.update({field: new})),
        change_tensors(f"axes of {old} become {new}", _grow(old, new)),
    ]
