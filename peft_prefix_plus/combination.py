"""Prefix arithmetic: a new adapter out of several, by weights or by putting one behind the other."""

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .auxiliary import list_own_adapters
from .config import PrefixPlusConfig
from .encoders import DirectPrefix, PrefixEncoder
from .injection import check_adapter_name, plan_injection
from .layer import PrefixPlusLayer
from .positions import list_shifts
from .states import PrefixStates, concatenate_states
from .targets import name_targets

COMBINATION_TYPES = ("linear", "cat")


class _Source(NamedTuple):
    """One of the adapters that are combined."""

    name: str
    config: PrefixPlusConfig
    encoders: dict[str, PrefixEncoder]


def add_weighted_adapter(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    combination_type: str = "linear",
) -> None:
    """Give a model a new adapter that combines some of its adapters; see `PrefixPlusModel.add_weighted_adapter`.

    Args:
        tuner (`BaseTuner`): the tuner of a PEFT model.
        adapters (`Sequence[str]`): the adapters to combine.
        weights (`Sequence[float]`, *optional*): one for each.
        adapter_name (`str`): of the new adapter.
        combination_type (`str`): `"linear"` or `"cat"`.

    Raises:
        ValueError: if the adapters cannot be combined in this way; the model is left as it is.
    """
    weights = _read_weights(weights)
    _check_arguments(tuner, adapters, weights, adapter_name, combination_type)
    sources = [_read_source(tuner, name) for name in adapters]
    encoders = _combine_linearly(sources, weights or []) if combination_type == "linear" else _join(sources)
    _check_finite(encoders, weights)
    config = _build_config(tuner.model, sources, encoders)
    _check_plan(tuner.model, config, encoders, sources, combination_type)
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    for name, encoder in encoders.items():
        layer: Any = tuner.model.get_submodule(name)
        layer.get_encoder(adapter_name).load_state_dict(encoder.state_dict())
    _copy_other_modules(tuner.model, adapters, adapter_name)


def _check_arguments(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    combination_type: str,
) -> None:
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(
            f"`combination_type` must be one of {', '.join(COMBINATION_TYPES)}, got {combination_type!r}. The others "
            "of LoRA are for products of matrices."
        )
    if adapter_name in tuner.peft_config:
        raise ValueError(f"There is an adapter {adapter_name!r} already; delete it, or use another name.")
    check_adapter_name(adapter_name)
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"`adapters` must be a list of at least one name, got {adapters!r}.")
    own = list_own_adapters(tuner.peft_config)
    for name in adapters:
        if name not in own:
            raise ValueError(f"There is no prefix {name!r}; the model has {', '.join(own)}.")
    with_rows = [name for name in adapters if tuner.peft_config[name].trainable_token_indices]
    if with_rows:
        raise ValueError(f"{', '.join(with_rows)} trained rows of embeddings, which cannot be combined.")
    if weights is not None and len(weights) != len(adapters):
        raise ValueError(f"There are {len(adapters)} adapters, but {len(weights)} weights.")
    if combination_type == "cat" and any(weight != 1 for weight in weights or ()):
        raise ValueError(f"Prefixes that stand one behind the other have no weights, got {weights!r}. Use `None`.")
    if combination_type == "linear" and not (weights and all(math.isfinite(weight) for weight in weights)):
        raise ValueError(f"`weights` must be one finite number for each adapter, got {weights!r}.")
    _check_other_modules(tuner.model, adapters)


def _read_weights(weights: Any) -> list[float] | None:
    """The numbers in a list, an array or a tensor."""
    if weights is None:
        return None
    values = weights.tolist() if hasattr(weights, "tolist") else weights
    if not isinstance(values, list | tuple) or not all(
        isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values
    ):
        raise ValueError(f"`weights` must be a list of numbers, one for each adapter, got {weights!r:.200}.")
    return [float(value) for value in values]


def _check_finite(encoders: Mapping[str, PrefixEncoder], weights: Sequence[float] | None) -> None:
    for name, encoder in encoders.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in encoder.state_dict().values()):
            raise ValueError(
                f"With the weights {weights} the values in {name!r} would be too large. Use smaller ones."
            )


def _read_source(tuner: BaseTuner, adapter_name: str) -> _Source:
    encoders = {}
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, PrefixPlusLayer) and adapter_name in layer.list_adapters():
            encoder = layer.get_encoder(adapter_name)
            encoder.check_initialized()
            encoders[name] = encoder.extract()
    config: Any = tuner.peft_config[adapter_name]
    return _Source(adapter_name, config, encoders)


@torch.no_grad()
def _combine_linearly(sources: Sequence[_Source], weights: Sequence[float]) -> dict[str, DirectPrefix]:
    """Add up what training has changed, or, where the adapters start from different values, the keys and values."""
    _check_shapes(sources)
    combined, unequal = {}, None
    for name, first in sources[0].encoders.items():
        encoders = [source.encoders[name] for source in sources]
        starts_equal = all(_have_equal_starts(first, other) for other in encoders)
        unequal = unequal if starts_equal else name
        combined[name] = (_add_deltas if starts_equal else _average_states)(encoders, weights)
    if unequal is not None and not math.isclose(sum(weights), 1.0, rel_tol=1e-6):
        raise ValueError(
            f"The weights {list(weights)} sum to {sum(weights):g}, but {', '.join(s.name for s in sources)} have no "
            f"common start (in {unequal!r}): only averages of their keys and values are prefixes of the same size. "
            "Let the weights sum to 1, or combine adapters that were trained from the same start and not folded."
        )
    return combined


def _check_shapes(sources: Sequence[_Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        different = sorted(first.encoders.keys() ^ other.encoders.keys())
        if different:
            raise ValueError(
                f"{first.name!r} and {other.name!r} have prefixes in different modules, for instance only one of them "
                f"in {different[0]!r}. Use `combination_type='cat'`."
            )
        for name, encoder in first.encoders.items():
            lengths = encoder.num_virtual_tokens, other.encoders[name].num_virtual_tokens
            if lengths[0] != lengths[1]:
                raise ValueError(
                    f"{first.name!r} has {lengths[0]} virtual tokens in {name!r}, {other.name!r} has {lengths[1]}. "
                    "Use `combination_type='cat'`, or prefixes of equal length."
                )


def _have_equal_starts(encoder: PrefixEncoder, other: PrefixEncoder) -> bool:
    pairs = zip(encoder.get_start().values(), other.get_start().values(), strict=True)
    return all(torch.equal(own, its) for own, its in pairs)


def _add_deltas(encoders: Sequence[PrefixEncoder], weights: Sequence[float]) -> DirectPrefix:
    """`anchor + scale * (w_1 delta_1 + w_2 delta_2 + ...)`, with the deltas as what remains to be trained."""
    result = _build_direct(encoders)
    result.load_state_dict(encoders[0].get_start(), strict=False)
    for encoder, weight in zip(encoders, weights, strict=True):
        for parameter, delta in zip((result.delta_keys, result.delta_values), encoder.compute_delta(), strict=True):
            # Frozen tokens have no delta, and the result has no more of them than any of the others.
            parameter[:, parameter.shape[1] - delta.shape[1] :] += weight * delta
    return result


def _average_states(encoders: Sequence[PrefixEncoder], weights: Sequence[float]) -> DirectPrefix:
    """`w_1 [K_1 ; V_1] + w_2 [K_2 ; V_2] + ...`, which is where the result starts."""
    states = [encoder() for encoder in encoders]
    keys = _add_up([state.keys for state in states], weights)
    values = _add_up([state.values for state in states], weights)
    result = _build_direct(encoders)
    result.initialize(PrefixStates(keys, values), _average_scales(encoders))
    return result


def _add_up(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(dim=0)


def _average_scales(encoders: Sequence[PrefixEncoder]) -> PrefixStates:
    keys, values = ([getattr(encoder, f"scale_{name}") for encoder in encoders] for name in ("keys", "values"))
    return PrefixStates(torch.stack(keys).mean(dim=0)[None], torch.stack(values).mean(dim=0)[None])


def _build_direct(encoders: Sequence[PrefixEncoder]) -> DirectPrefix:
    first = encoders[0]
    num_frozen = min(encoder.num_virtual_tokens - encoder.num_trained_tokens for encoder in encoders)
    return DirectPrefix(first.geometry, first.num_virtual_tokens, num_frozen).to(first.anchor_keys.device)


@torch.no_grad()
def _join(sources: Sequence[_Source]) -> dict[str, DirectPrefix]:
    """Put the prefixes of each module one behind the other; not every adapter needs one in every module."""
    num_frozen = _count_frozen(sources)
    joined = {}
    for name in dict.fromkeys(name for source in sources for name in source.encoders):
        encoders = [source.encoders[name] for source in sources if name in source.encoders]
        states = concatenate_states([encoder() for encoder in encoders])
        result = DirectPrefix(encoders[0].geometry, states.num_virtual_tokens, num_frozen)
        joined[name] = result.to(encoders[0].anchor_keys.device)
        joined[name].initialize(states, _average_scales(encoders))
    return joined


def _count_frozen(sources: Sequence[_Source]) -> int:
    """Frozen tokens lead a prefix, in all modules: those of the first adapter stay frozen if it leads everywhere."""
    leads = all(source.encoders.keys() <= sources[0].encoders.keys() for source in sources)
    return sources[0].config.num_frozen_tokens if leads else 0


def _build_config(model: nn.Module, sources: Sequence[_Source], encoders: dict[str, DirectPrefix]) -> PrefixPlusConfig:
    """Describe the new adapter so that it can be loaded again; what is not said by its tensors is the first one's."""
    lengths = {name: encoder.num_virtual_tokens for name, encoder in encoders.items()}
    longest = max(lengths.values())
    # The longest names first: the end of one may be the whole of another.
    others = sorted((name for name in lengths if lengths[name] != longest), key=len, reverse=True)
    frozen = {encoder.num_virtual_tokens - encoder.num_trained_tokens for encoder in encoders.values()}
    modules_to_save = sorted({name for source in sources for name in source.config.modules_to_save or ()})
    config = dataclasses.replace(
        sources[0].config,
        projection="none",
        num_virtual_tokens=longest,
        num_virtual_tokens_pattern={re.escape(name): lengths[name] for name in others},
        num_frozen_tokens=min(frozen),
        target_modules=name_targets(model, list(lengths)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=modules_to_save or None,
        prefix_is_initialized=True,
    )
    config.inference_mode = False
    return config


def _check_plan(
    model: Any,
    config: PrefixPlusConfig,
    encoders: dict[str, DirectPrefix],
    sources: Sequence[_Source],
    combination_type: str,
) -> None:
    """Check that the configuration will put the same prefixes in the same places, and move the input as far."""
    plan = plan_injection(config, model)
    wanted = {name: encoder.num_virtual_tokens for name, encoder in encoders.items()}
    if plan.lengths != wanted:
        raise ValueError(f"No configuration describes the modules of the combination: {plan.lengths} and {wanted}.")
    longest = max(plan.lengths.values()) if config.initializes_from_tokens else 0
    for table, _, lengths in list_shifts(model):
        shifts = [int(lengths.get(source.name, 0)) for source in sources]
        planned = longest if table is None else plan.position_shifts.get(table, 0)
        wanted_shifts = {sum(shifts)} if combination_type == "cat" else set(shifts)
        if wanted_shifts != {planned}:
            raise ValueError(
                f"The adapters move the input by {shifts} positions, which one adapter cannot repeat: it moves the "
                "input behind its longest prefix if that started from real tokens, otherwise not at all. Combine "
                "adapters of one `prefix_init` and with equal lengths in all layers, or use several active adapters."
            )


def _list_wrappers(model: nn.Module, adapters: Sequence[str]) -> list[tuple[ModulesToSaveWrapper, list[str]]]:
    """Modules that are saved as a whole with one of the adapters, and with which of them."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    owned = [(wrapper, [name for name in adapters if name in wrapper.modules_to_save]) for wrapper in wrappers]
    return [(wrapper, owners) for wrapper, owners in owned if owners]


def _check_other_modules(model: nn.Module, adapters: Sequence[str]) -> None:
    for wrapper, owners in _list_wrappers(model, adapters):
        if len(owners) > 1:
            raise ValueError(
                f"{', '.join(owners)} each have a {type(wrapper.original_module).__name__} of their own in "
                "`modules_to_save`, and these cannot be combined."
            )


def _copy_other_modules(model: nn.Module, adapters: Sequence[str], adapter_name: str) -> None:
    for wrapper, owners in _list_wrappers(model, adapters):
        wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[owners[0]].state_dict())
