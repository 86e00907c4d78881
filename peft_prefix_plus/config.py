"""The configuration of a PrefixPlus adapter."""

import copy
import dataclasses
import json
import os
import re
import reprlib
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from .architectures import AttentionGeometry
from .encoders import EMBEDDING_STEP, PROJECTIONS, PrefixEncoder, build_encoder
from .model_card import save_model_card
from .patterns import PLACE, check_pattern
from .peft_type import PREFIX_PLUS
from .weights import AdapterSource, find_local_weights, read_tensor_infos, refuse_pickle

DROPOUT_MODES = ("token", "element")
PREFIX_INITS = ("vocab", "text", "tokens", "random", "zero")
DEFAULT_NUM_VIRTUAL_TOKENS = 20
# Keyword arguments of a tokenizer that hold a token of the Hub, or may hold a password.
_SECRETS = ("token", "use_auth_token", "proxies")
# More than any model reads, and little enough that no product of sizes overflows.
MAX_SIZE = 2**24
# Beyond them, embeddings or their steps would leave what float32 can tell apart.
MIN_STEP, MAX_STEP = 1e-3, 1e3
# How PEFT and `match_module_pattern` use what stands in a configuration.
_MODULE_PATTERN = rf"(.*\.)?({PLACE})$"
_LAYERS_PATTERN = rf"(?:^|.*?\.){PLACE}\.(?P<idx>\d+)\."
_MODULE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass
class PrefixPlusConfig(PeftConfig):
    """
    Configuration of a [`PrefixPlusModel`]: trainable keys and values in front of every attention layer's own.

    Args:
        num_virtual_tokens (`int`, *optional*):
            Prefix length `P` per layer. `None` (default): the number of init tokens, or 20 when there are none.
        num_virtual_tokens_pattern (`dict[str, int]`):
            Prefix length of single layers: a module name or regular expression, matched like LoRA's `rank_pattern`,
            mapped to a length. 0 leaves a layer without a prefix.
        target_modules (`list[str]` or `str`, *optional*):
            Attention modules that get a prefix: names or name endings, or a regular expression for the whole name.
            `None` (default): all that a forward over text reaches, cross-attention of encoder-decoders included.
        exclude_modules (`list[str]` or `str`, *optional*):
            Attention modules that get none; same forms.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the layers that get a prefix. `None` (default): all.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of layers in the model, if `layers_to_transform` needs it.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved as a whole, for instance a classification head.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are trained and saved, as in LoRA: of the input embeddings, or of the tables named.
        ensure_weight_tying (`bool`):
            Keep embeddings tied that the base model ties, where the two fields above name one. Default `False`.
        projection (`str`):
            How the trained difference from the initial keys and values is produced, per layer. `"linear"` (default): a
            linear map of an embedding per virtual token. `"mlp"`: a two-layer network on it. `"none"`: a free tensor.
        projection_dim (`int`):
            Width of the projection, default 16. Unused by `"none"`.
        embedding_step (`float`, *optional*):
            How far one step of Adam moves the embeddings of virtual tokens, as a multiple of how far it moves the
            projection. `None` (default): 4; in adapters that were saved without it, 1. Unused by `"none"`.
        prefix_dropout (`float`):
            Dropout probability while training, in `[0, 1)`, default 0.
        prefix_dropout_mode (`str`):
            `"token"` (default) hides whole virtual tokens, drawn per sample, never all of them. `"element"` is
            `nn.Dropout` on keys and values.
        prefix_init (`str`):
            What the prefix is before training: the keys and values of `"vocab"` (default) tokens sampled from the
            vocabulary, of a `"text"`, of given `"tokens"`; or `"random"` or `"zero"`.
        prefix_init_text (`str`, *optional*):
            The text for `"text"`, which it implies. Step 0 then equals prompting with the text. Repeated up to
            `num_virtual_tokens` if shorter, truncated with a warning if longer.
        prefix_init_token_ids (`list[int]`, *optional*):
            The tokens for `"tokens"`, which they imply; repeated and truncated likewise.
        prefix_init_seed (`int`):
            Seed of what `"vocab"` and `"random"` draw, default 0.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer for `prefix_init_text`. `None` (default): that of the base model.
        tokenizer_kwargs (`dict`, *optional*):
            Passed to `AutoTokenizer.from_pretrained`; `add_special_tokens` (default `False`) goes to its call.
            `token`, `use_auth_token` and `proxies` are neither saved nor shown; `trust_remote_code` is refused.
        num_frozen_tokens (`int`):
            Leading virtual tokens that keep their initial value, default 0. One or more keep an attention sink intact.
        prefix_is_initialized (`bool`):
            Set in the `adapter_config.json` of a saved adapter: the weights are in the file beside it, so the
            initialization must not run. Leave it alone when you write a configuration.
    """

    num_virtual_tokens: int | None = field(
        default=None, metadata={"help": "Prefix length per layer; None: that of the init tokens, or 20."}
    )
    num_virtual_tokens_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> prefix length of that layer; 0: none."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Attention modules that get a prefix; None: all that text reaches."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Attention modules that get no prefix."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers that get a prefix; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, used with layers_to_transform."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved as a whole, e.g. a classification head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Tokens whose embeddings are trained and saved, or names of tables mapped to tokens."},
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Keep embeddings tied that the base model ties, where one is trained."}
    )
    projection: str = field(
        default="linear",
        metadata={"help": "How the trained difference is produced, per layer.", "choices": list(PROJECTIONS)},
    )
    projection_dim: int = field(default=16, metadata={"help": "Width of the per-layer projection."})
    embedding_step: float | None = field(
        default=None, metadata={"help": "How far a step moves embeddings, relative to the projection; None: 4."}
    )
    prefix_dropout: float = field(default=0.0, metadata={"help": "Dropout probability, training only."})
    prefix_dropout_mode: str = field(
        default="token",
        metadata={"help": "Drop whole virtual tokens, or single elements.", "choices": list(DROPOUT_MODES)},
    )
    prefix_init: str = field(
        default="vocab", metadata={"help": "What the prefix is before training.", "choices": list(PREFIX_INITS)}
    )
    prefix_init_text: str | None = field(
        default=None, metadata={"help": "Text whose keys and values start the prefix."}
    )
    prefix_init_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Tokens whose keys and values start the prefix."}
    )
    prefix_init_seed: int = field(default=0, metadata={"help": "Seed of the vocab and random initialization."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer for prefix_init_text; None: that of the base model."}
    )
    tokenizer_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keyword arguments for the tokenizer."}
    )
    num_frozen_tokens: int = field(
        default=0, metadata={"help": "Leading virtual tokens that keep their initial value."}
    )
    prefix_is_initialized: bool = field(
        default=False,
        metadata={"help": "Set in saved adapters: the weights exist, so the initialization must not run."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._resolved_target_modules: list[str] | str | None = None
        # Where this configuration was read, until the weights there have been compared with it.
        self.source: AdapterSource | None = None
        self._injected: dict[str, Any] | None = None
        self.peft_type = PREFIX_PLUS
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(self, name), set) and all(isinstance(item, str) for item in getattr(self, name)):
                setattr(self, name, sorted(getattr(self, name)))
        if isinstance(self.prefix_init_token_ids, tuple):
            self.prefix_init_token_ids = list(self.prefix_init_token_ids)
        if self.num_virtual_tokens_pattern is None:
            self.num_virtual_tokens_pattern = {}
        if self.embedding_step is None:
            # Adapters that were saved before this field existed were trained with 1.
            self.embedding_step = 1.0 if self.prefix_is_initialized is True else EMBEDDING_STEP
        self._check_choices()
        self._check_numbers()
        self._check_targets()
        self._check_layers()
        self._check_names()
        self._resolve_prefix_init()

    def _check_choices(self) -> None:
        for name, choices in (
            ("projection", PROJECTIONS),
            ("prefix_dropout_mode", DROPOUT_MODES),
            ("prefix_init", PREFIX_INITS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")

    def _check_numbers(self) -> None:
        if self.num_virtual_tokens is not None:
            _check_integer("num_virtual_tokens", self.num_virtual_tokens, minimum=1, maximum=MAX_SIZE)
        _check_integer("projection_dim", self.projection_dim, minimum=1, maximum=MAX_SIZE)
        _check_integer("num_frozen_tokens", self.num_frozen_tokens, minimum=0)
        _check_integer("prefix_init_seed", self.prefix_init_seed, minimum=0, maximum=2**63 - 1)
        for name in ("prefix_is_initialized", "inference_mode", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {_show(getattr(self, name))}.")
        step = self.embedding_step
        if isinstance(step, bool) or not isinstance(step, int | float) or not MIN_STEP <= step <= MAX_STEP:
            raise ValueError(f"`embedding_step` must be a number from {MIN_STEP} to {MAX_STEP}, got {_show(step)}.")
        probability = self.prefix_dropout
        if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0.0 <= probability < 1.0:
            raise ValueError(f"`prefix_dropout` must be a probability of at least 0 and below 1, got {probability!r}.")
        if not isinstance(self.num_virtual_tokens_pattern, dict):
            raise ValueError(
                "`num_virtual_tokens_pattern` must be a dict of module name or regular expression to prefix length, "
                f"got {self.num_virtual_tokens_pattern!r}."
            )
        for pattern, length in self.num_virtual_tokens_pattern.items():
            check_pattern("num_virtual_tokens_pattern", pattern, _MODULE_PATTERN)
            _check_integer(f"num_virtual_tokens_pattern[{pattern!r}]", length, minimum=0, maximum=MAX_SIZE)
        if self.num_virtual_tokens is not None:
            self.check_frozen_tokens(self.num_virtual_tokens)

    def check_frozen_tokens(self, num_virtual_tokens: int) -> None:
        """Raise a `ValueError` if `num_frozen_tokens` leaves nothing to train in a prefix of this length."""
        if self.num_frozen_tokens >= num_virtual_tokens:
            raise ValueError(
                f"`num_frozen_tokens` is {self.num_frozen_tokens}, but the prefix has {num_virtual_tokens} virtual "
                f"tokens: nothing is left to train. Use at most {num_virtual_tokens - 1}, or a longer prefix."
            )

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_pattern(name, value)
            elif value is not None and not _is_list_of_strings(value):
                raise ValueError(
                    f"`{name}` must be a list of module names or a regular expression, got {_show(value)}."
                )
        names = self.modules_to_save
        if names is not None and not (_is_list_of_strings(names) and all(map(_MODULE_NAME.fullmatch, names))):
            raise ValueError(f"`modules_to_save` must be a list of module names, got {_show(names)}.")

        tables = self.trainable_token_indices
        rows = [tables] if isinstance(tables, list) else tables.values() if isinstance(tables, dict) else []
        if not (tables is None or rows) or not all(map(_is_list_of_tokens, rows)):
            raise ValueError(
                "`trainable_token_indices` must be a list of token ids, at least one, or names of tables mapped to "
                f"such lists, got {_show(tables)}."
            )

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` cannot be used with a regular expression in `target_modules`; write the layers "
                "into the expression, or give `target_modules` as a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` is only used with `layers_to_transform`; set that, or remove it.")
        indices = self.layers_to_transform
        if indices is not None:
            listed = indices if isinstance(indices, list) else [indices]
            if not listed:
                raise ValueError(
                    "`layers_to_transform` is empty: no layer would get a prefix. Use `None` for all layers."
                )
            for index in listed:
                _check_integer("layers_to_transform", index, minimum=0)
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        if patterns is not None and not _is_list_of_strings(patterns):
            raise ValueError(f"`layers_pattern` must be a name or a list of names, got {_show(patterns)}.")
        for pattern in patterns or ():
            check_pattern("layers_pattern", pattern, _LAYERS_PATTERN)

    def _check_names(self) -> None:
        """Check what other libraries take from a configuration, so that a file cannot make them do what it likes."""
        for name in ("base_model_name_or_path", "revision", "peft_version", "tokenizer_name_or_path"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                # Saved configurations hold no paths.
                setattr(self, name, os.fspath(value))
            elif value is not None and not isinstance(value, str):
                raise ValueError(f"`{name}` must be a string, got {_show(value)}.")
        mapping = self.auto_mapping
        if mapping is not None and not (
            isinstance(mapping, dict) and all(isinstance(value, str | bool | None) for value in mapping.values())
        ):
            raise ValueError(f"`auto_mapping` must be a dict of names, got {_show(mapping)}.")
        kwargs = self.tokenizer_kwargs
        if kwargs is not None and not (isinstance(kwargs, dict) and all(isinstance(key, str) for key in kwargs)):
            raise ValueError(f"`tokenizer_kwargs` must be a dict of keyword arguments, got {_show(kwargs)}.")
        try:
            json.dumps(remove_secrets(kwargs))
        except TypeError as error:
            raise ValueError(f"`tokenizer_kwargs` cannot be saved as JSON ({error}), got {_show(kwargs)}.") from error
        if (kwargs or {}).get("trust_remote_code"):
            raise ValueError(
                "`tokenizer_kwargs` has `trust_remote_code`, which would run code for everybody who uses this "
                "configuration. Tokenize the text with that tokenizer yourself, and set `prefix_init_token_ids`."
            )

    def _resolve_prefix_init(self) -> None:
        if self.prefix_init_text is not None and self.prefix_init_token_ids is not None:
            raise ValueError("Give either `prefix_init_text` or `prefix_init_token_ids`, not both.")
        for implied, name in (("text", "prefix_init_text"), ("tokens", "prefix_init_token_ids")):
            given = getattr(self, name) is not None
            if given and self.prefix_init == "vocab":
                self.prefix_init = implied
            if given and self.prefix_init != implied:
                raise ValueError(
                    f"`{name}` is for `prefix_init={implied!r}`, but that is {self.prefix_init!r}; remove one."
                )
            if not given and self.prefix_init == implied:
                raise ValueError(f"`prefix_init={implied!r}` needs `{name}`.")
        if self.prefix_init_text is not None and not isinstance(self.prefix_init_text, str):
            raise ValueError(f"`prefix_init_text` must be a string, got {self.prefix_init_text!r}.")
        if self.prefix_init_token_ids is not None:
            ids = self.prefix_init_token_ids
            if not isinstance(ids, list) or not ids:
                raise ValueError(f"`prefix_init_token_ids` must be a list of at least one token id, got {ids!r}.")
            for token_id in ids:
                _check_integer("prefix_init_token_ids", token_id, minimum=0)

    @property
    def initializes_from_tokens(self) -> bool:
        """Whether the prefix starts as the keys and values of real tokens, which stand at real positions."""
        return self.prefix_init in ("vocab", "text", "tokens")

    @property
    def max_num_virtual_tokens(self) -> int:
        """The longest prefix that any module may get."""
        own = DEFAULT_NUM_VIRTUAL_TOKENS if self.num_virtual_tokens is None else self.num_virtual_tokens
        return max([own, *self.num_virtual_tokens_pattern.values()])

    def resolve_num_virtual_tokens(self, module_name: str) -> int:
        """Return the prefix length of one module, 0 for none.

        Args:
            module_name (`str`): the module's name in the base model.
        """
        for pattern, length in self.num_virtual_tokens_pattern.items():
            if match_module_pattern(pattern, module_name):
                return length
        return DEFAULT_NUM_VIRTUAL_TOKENS if self.num_virtual_tokens is None else self.num_virtual_tokens

    def build_encoder(self, geometry: AttentionGeometry, num_virtual_tokens: int) -> PrefixEncoder:
        """Build the encoder of one module, not yet initialized.

        Args:
            geometry ([`AttentionGeometry`]): of the attention module.
            num_virtual_tokens (`int`): its prefix length.
        """
        assert self.embedding_step is not None  # resolved by `__post_init__`
        return build_encoder(
            self.projection,
            geometry,
            num_virtual_tokens,
            self.num_frozen_tokens,
            self.projection_dim,
            self.embedding_step,
        )

    def remember_resolved(self, resolved: "PrefixPlusConfig") -> None:
        """Take over what an injection has found out, so that a saved adapter is injected in the same way.

        The length becomes visible in `num_virtual_tokens`. `target_modules` stays as the user wrote it, so that the
        same object can serve another architecture; what it meant here is written by [`save_pretrained`].
        """
        self.num_virtual_tokens = resolved.num_virtual_tokens
        self._resolved_target_modules = resolved.target_modules
        self.remember_injected()

    def remember_injected(self) -> None:
        """Note what the fields are while an adapter has this configuration."""
        self._injected = self._read_own_fields()

    @property
    def is_as_injected(self) -> bool:
        """Whether no field of the method was changed since an adapter got this configuration."""
        return self._injected == self._read_own_fields()

    def _read_own_fields(self) -> dict[str, Any]:
        others = {field.name for field in dataclasses.fields(PeftConfig)} | {"prefix_is_initialized"}
        own = [field.name for field in dataclasses.fields(self) if field.name not in others]
        return {name: copy.deepcopy(getattr(self, name)) for name in own}

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["tokenizer_kwargs"] = remove_secrets(self.tokenizer_kwargs)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def to_dict(self) -> dict[str, Any]:
        """All fields, without what gives access to something; see `PeftConfig.to_dict`."""
        return {**super().to_dict(), "tokenizer_kwargs": remove_secrets(self.tokenizer_kwargs)}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` and a model card; see `PeftConfig.save_pretrained`.

        Raises:
            ValueError: if the weights have just been written as a pickle, which is removed.
        """
        # Only `PeftModel.save_pretrained` passes this argument. It has written the weights by now.
        saved_by_peft = "auto_mapping_dict" in kwargs
        if saved_by_peft:
            refuse_pickle(save_directory)
        targets = self._resolved_target_modules if self.target_modules is None else self.target_modules
        saved = dataclasses.replace(self, prefix_is_initialized=True, target_modules=targets)
        super(PrefixPlusConfig, saved).save_pretrained(save_directory, **kwargs)
        save_model_card(save_directory, saved_by_peft)

    def remember_source(self, model_id: str, subfolder: str | None, download_kwargs: dict[str, Any]) -> None:
        """Note where this configuration was read. Its weights are there, so the initialization must not run.

        Args:
            model_id (`str`): a directory or a repository of the Hub.
            subfolder (`str`, *optional*): below it.
            download_kwargs (`dict`): for `huggingface_hub.hf_hub_download`.

        Raises:
            ValueError: if there is a weights file in the directory, and it is damaged.
        """
        self.prefix_is_initialized = True
        self.source = AdapterSource(os.fspath(model_id), subfolder, download_kwargs)
        path = find_local_weights(self.source.folder)
        if path is not None:
            read_tensor_infos(path)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read a configuration file; see `PeftConfig.from_json_file`."""
        try:
            attributes = super().from_json_file(path_json_file, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path_json_file} does not hold a JSON object ({error}). Download or copy the adapter once more."
            ) from error
        if not isinstance(attributes, dict):
            raise ValueError(f"{path_json_file} must hold a JSON object, found {type(attributes).__name__}.")
        if "peft_type" not in attributes:
            raise ValueError(f"{path_json_file} does not name a `peft_type`, so it is not the file of an adapter.")
        return attributes


def remove_secrets(tokenizer_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Keyword arguments of a tokenizer without those that give access to something."""
    if tokenizer_kwargs is None:
        return None
    return {name: value for name, value in tokenizer_kwargs.items() if name not in _SECRETS}


def match_module_pattern(pattern: str, module_name: str) -> bool:
    """Whether a key of `num_virtual_tokens_pattern` means a module: the rule of LoRA's `rank_pattern`."""
    return re.match(_MODULE_PATTERN.replace(PLACE, pattern), module_name) is not None


def _check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {_show(value)}.")
    if maximum is not None and value > maximum:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be an integer of at most {maximum}, got {_show(value)}.")


def _is_list_of_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_list_of_tokens(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(type(item) is int and item >= 0 for item in value)


def _show(value: object) -> str:
    """What an error says about a value that may be of any size."""
    return reprlib.repr(value) if isinstance(value, int) else f"{value!r:.200}"
