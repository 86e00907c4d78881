"""A cache that keeps the prefix in front of its tokens holds, and gives, what the cache of transformers does."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import add_prefix, add_second, draw_tokens, perturb
from peft import PeftModel
from tiny_models import build_model
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from peft_prefix_plus.attention import prefixed_cache

Change = Callable[[DynamicCache], None]


@pytest.fixture(params=["copied", "in place"])
def growth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to add tokens: few are copied, many get spare rows."""
    if request.param == "in place":
        monkeypatch.setattr(prefixed_cache, "_MIN_BYTES_TO_GROW", 0)
    return str(request.param)


def build(name: str = "llama", implementation: str = "sdpa", **settings: object) -> PeftModel:
    model = build_model(name)
    model.set_attn_implementation(implementation)
    prefixed = add_prefix(model, **settings)
    perturb(prefixed)
    return prefixed


def step(model: PeftModel, cache: DynamicCache, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(tokens, past_key_values=cache, attention_mask=mask).logits.detach()


def run_twice(model: PeftModel, change: Change, batch: int = 2, mask: Tensor | None = None) -> None:
    """Read text, change the cache and read on; beside it the same with gradients, which leave the cache as it is."""
    caches, logits = (DynamicCache(), DynamicCache()), []
    tokens = draw_tokens(batch, 30)
    for cache, enabled in zip(caches, (False, True), strict=True):
        with torch.set_grad_enabled(enabled):
            own = [step(model, cache, tokens[:, :9], None if mask is None else mask[:, :9])]
            own += [step(model, cache, tokens[:, 9:11], None if mask is None else mask[:, :11])]
            change(cache)
            for position in range(11, 30):
                length = cache.get_seq_length() + 1
                part = tokens[: cache.layers[0].keys.shape[0], position : position + 1]
                own.append(step(model, cache, part, None if mask is None else mask[:, :length]))
        logits.append(own)
    assert_caches_equal(*caches)
    for given, expected in zip(*logits, strict=True):
        assert_close(given, expected, atol=1e-5, rtol=1e-4)


def assert_caches_equal(joined: DynamicCache, plain: DynamicCache) -> None:
    assert {type(layer) for layer in (*joined.layers, *plain.layers)} == {DynamicLayer}
    assert not any(layer in prefixed_cache._storages for layer in plain.layers)
    assert joined.get_seq_length() == plain.get_seq_length()
    for given, expected in zip(joined.layers, plain.layers, strict=True):
        assert_close(given.keys, expected.keys.detach(), atol=1e-5, rtol=1e-4)
        assert_close(given.values, expected.values.detach(), atol=1e-5, rtol=1e-4)


def is_joined(cache: DynamicCache) -> bool:
    storages = [prefixed_cache._storages.get(layer) for layer in cache.layers]
    return all(storage and storage.is_shown_by(layer) for storage, layer in zip(storages, cache.layers, strict=True))


def leave(cache: DynamicCache) -> None:
    """No change."""


def reorder(cache: DynamicCache) -> None:
    cache.reorder_cache(torch.tensor([1, 1]))


def crop(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.crop(-3)


def select(cache: DynamicCache) -> None:
    cache.batch_select_indices(torch.tensor([1]))


def replace(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys * 2, layer.values + 1


@pytest.mark.parametrize("change", [leave, reorder, crop, select, replace])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_reading_on_is_the_same(growth: str, change: Change, implementation: str) -> None:
    run_twice(build(implementation=implementation), change)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "phi"])
def test_on_other_architectures(growth: str, name: str) -> None:
    model = build(name)
    cache, tokens = DynamicCache(config=model.config.get_text_config()), draw_tokens(2, 12)
    with torch.no_grad():
        given = [step(model, cache, part) for part in tokens.split([7, 1, 1, 2, 1], dim=1)]
    assert_close(torch.cat(given, 1), model(tokens).logits, atol=1e-5, rtol=1e-4)


def test_left_padding(growth: str) -> None:
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :4] = 0
    run_twice(build(), leave, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_attends_in_groups(growth: str, dtype: torch.dtype) -> None:
    model = build_model("llama").to(dtype)
    prefixed = add_prefix(model)
    perturb(prefixed)
    cache, tokens = DynamicCache(config=model.config), draw_tokens(2, 12)
    with torch.no_grad():
        given = torch.cat([step(prefixed, cache, part) for part in tokens.split([8, 1, 1, 1, 1], dim=1)], 1)
        assert is_joined(cache)
        assert_close(given, prefixed(tokens).logits, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)


def test_what_was_read_is_never_written_to(growth: str) -> None:
    model, cache, tokens = build(), DynamicCache(), draw_tokens(2, 20)
    with torch.no_grad():
        for part in tokens[:, :9].split([6, 1, 1, 1], dim=1):
            step(model, cache, part)
        views = [(layer.keys, layer.values) for layer in cache.layers]
        copies = [(keys.clone(), values.clone()) for keys, values in views]
        crop(cache)
        for position in range(9, 20):
            step(model, cache, tokens[:, position : position + 1])
    for view, kept in zip(views, copies, strict=True):
        assert_close(view, kept, atol=0, rtol=0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda cache: shallow(cache)], ids=["deep", "shallow"])
def test_copies_go_their_own_ways(growth: str, clone: Callable[[DynamicCache], DynamicCache]) -> None:
    model, tokens = build(), draw_tokens(2, 13)
    cache = DynamicCache()
    with torch.no_grad():
        step(model, cache, tokens[:, :8])
        step(model, cache, tokens[:, 8:9])
        other, different = clone(cache), (tokens + 1) % 32
        for position in range(9, 13):
            here = slice(position, position + 1)
            given, of_other = step(model, cache, tokens[:, here]), step(model, other, different[:, here])
        assert_close(given, model(tokens).logits[:, -1:], atol=1e-5, rtol=1e-4)
        mixed = torch.cat([tokens[:, :9], different[:, 9:]], 1)
        assert_close(of_other, model(mixed).logits[:, -1:], atol=1e-5, rtol=1e-4)


def shallow(cache: DynamicCache) -> DynamicCache:
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def test_one_cache_for_several_adapters(growth: str) -> None:
    """The tokens in the cache are what the first adapter made of them; the prefix is that of the one in use."""
    model = build()
    add_second(model, prefix_init="vocab", num_virtual_tokens=3)
    results = []
    for enabled in (False, True):
        cache, tokens = DynamicCache(), draw_tokens(2, 12)
        with torch.set_grad_enabled(enabled):
            own = [step(model, cache, tokens[:, :8]), step(model, cache, tokens[:, 8:9])]
            model.set_adapter("other")
            own.append(step(model, cache, tokens[:, 9:10]))
            with model.disable_adapter():
                own.append(step(model, cache, tokens[:, 10:11]))
            model.set_adapter("default")
            own.append(step(model, cache, tokens[:, 11:12]))
        results.append(own)
    for given, expected in zip(*results, strict=True):
        assert_close(given, expected, atol=1e-5, rtol=1e-4)


def test_mixed_batches(growth: str) -> None:
    model = build()
    add_second(model, prefix_init="vocab", num_virtual_tokens=3)
    tokens, names = draw_tokens(3, 8), ["default", "other", "__base__"]
    given = model.generate(input_ids=tokens, adapter_names=names, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for row, name in enumerate(names):
        alone = model.generate(
            input_ids=tokens[row : row + 1], adapter_names=[name], max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert given[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_inference_mode_then_no_grad(growth: str) -> None:
    model, cache, tokens = build(), DynamicCache(), draw_tokens(2, 14)
    with torch.inference_mode():
        for part in tokens[:, :9].split([6, 1, 1, 1], dim=1):
            step(model, cache, part)
    with torch.no_grad():
        given = [step(model, cache, tokens[:, position : position + 1]) for position in range(9, 14)]
        assert_close(torch.cat(given, 1), model(tokens).logits[:, 9:], atol=1e-5, rtol=1e-4)


def test_gradients_through_a_cache_that_was_joined(growth: str) -> None:
    model, tokens = build(), draw_tokens(2, 12)
    gradients = []
    for enabled in (False, True):
        cache = DynamicCache()
        with torch.set_grad_enabled(enabled):
            step(model, cache, tokens[:, :7])
            step(model, cache, tokens[:, 7:8])
        for layer in cache.layers if enabled else ():
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        model.zero_grad()
        model(tokens[:, 8:], past_key_values=cache).logits.square().sum().backward()
        assert not is_joined(cache)
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for given, expected in zip(*gradients, strict=True):
        assert_close(given, expected, atol=1e-4, rtol=1e-3)


def test_many_tokens_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixed_cache, "_MIN_BYTES_TO_GROW", 0)
    model, cache, places = build(), DynamicCache(), set()
    with torch.no_grad():
        for token in draw_tokens(2, 40).split(1, dim=1):
            step(model, cache, token)
            places.add(cache.layers[0].keys.data_ptr())
    assert len(places) < 15


def test_a_long_prefix_is_not_copied_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixed_cache, "_MAX_COPIED_ROWS", 9)
    model, cache, tokens = build(), DynamicCache(), draw_tokens(2, 9)
    with torch.no_grad():
        given = [step(model, cache, token) for token in tokens.split(1, dim=1)]
    assert not is_joined(cache)
    assert_close(torch.cat(given, 1), model(tokens).logits, atol=1e-5, rtol=1e-4)


def test_rows_that_do_not_fit_are_refused(growth: str) -> None:
    model, cache = build(), DynamicCache()
    with torch.no_grad():
        for length in (6, 1, 1):
            step(model, cache, draw_tokens(2, length))
        with pytest.raises(RuntimeError):
            step(model, cache, draw_tokens(1, 1))


def test_tokens_that_others_replace_are_joined_no_more() -> None:
    model, cache = build(), DynamicCache()
    with torch.no_grad():
        step(model, cache, draw_tokens(2, 6))
        step(model, cache, draw_tokens(2, 1))
        assert is_joined(cache)
        reorder(cache)
        step(model, cache, draw_tokens(2, 1))
    assert not is_joined(cache)


def test_a_cache_that_is_reset_begins_anew() -> None:
    model, cache = build(), DynamicCache()
    with torch.no_grad():
        expected = step(model, cache, draw_tokens(2, 6))
        step(model, cache, draw_tokens(2, 1))
        cache.reset()
        again = step(model, cache, draw_tokens(2, 6))
    assert is_joined(cache) and torch.equal(again, expected)


def test_a_cache_stays_what_it_was_for_others(growth: str) -> None:
    """Whoever holds a layer sees it grow, there is nothing more in it, and a cache that is gone leaves nothing."""
    model = build()
    cache = DynamicCache(config=model.config)
    held, plain = cache.layers[0], DynamicCache()
    for own, enabled in ((cache, False), (plain, True)):
        with torch.set_grad_enabled(enabled):
            for length in (60, 1, 1):
                step(model, own, draw_tokens(2, length))
    for layer in plain.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    assert held is cache.layers[0] and held.get_seq_length() == 62
    assert vars(cache.layers[0]).keys() == vars(plain.layers[0]).keys()
    assert_close(pickle.loads(pickle.dumps(held)).keys, held.keys)
    layers = weakref.WeakSet(cache.layers)
    del held, layer, own, cache
    gc.collect()
    assert not layers


def test_losses_on_tokens_survive_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixed_cache, "_MIN_BYTES_TO_GROW", 0)
    model, cache = build(), DynamicCache()
    weight = torch.ones((), requires_grad=True)
    with torch.no_grad():
        for length in (30, 1, 1):
            step(model, cache, draw_tokens(2, length))
    keys = cache.layers[0].keys
    loss = (keys * weight).sum()
    with torch.no_grad():
        step(model, cache, draw_tokens(2, 1))
    loss.backward()
    assert_close(weight.grad, keys.sum())


def test_memory_that_others_exchange_is_noticed(growth: str) -> None:
    def exchange(cache: DynamicCache) -> None:
        for layer in cache.layers:
            layer.keys.data = layer.keys.data * 2

    run_twice(build(), exchange)


def test_generate_joins() -> None:
    model = build()
    output = model.generate(
        input_ids=draw_tokens(2, 8), max_new_tokens=4, return_dict_in_generate=True, pad_token_id=0
    )
    assert is_joined(output.past_key_values)
