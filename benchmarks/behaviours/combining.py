"""Adapters that take each other's place in a loaded model, and adapters that are made of others."""

from pathlib import Path

import torch
from peft import PeftModel

from .behaviour import behaviour
from .methods import Method
from .subjects import (
    add_adapter,
    assert_close,
    assert_decreases,
    assert_differ,
    assert_same_tokens,
    build_adapted,
    build_causal_lm,
    check_message,
    compute_logits,
    continue_greedily,
    draw_tokens,
    take_steps,
)


def _save_two(method: Method, directory: Path, sizes: tuple[int, int] = (4, 4)) -> tuple[str, str]:
    """Two adapters of their own weights, each in a directory."""
    paths = []
    for seed, size in enumerate(sizes, start=2):
        paths.append(str(directory / f"adapter-{seed}"))
        build_adapted(method, size=size, seed=seed).save_pretrained(paths[-1])
    return paths[0], paths[1]


def _load(path: str) -> PeftModel:
    return PeftModel.from_pretrained(build_causal_lm(), path).eval()


def _check_swaps(method: Method, directory: Path, sizes: tuple[int, int]) -> None:
    first, second = _save_two(method, directory, sizes)
    model = _load(first)
    before, expected = compute_logits(model), compute_logits(_load(second))
    assert_differ(before, expected)
    method.hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
    assert_close(compute_logits(model), expected)
    method.hotswap_adapter(model, first, adapter_name="default", torch_device="cpu")
    assert_close(compute_logits(model), before)


@behaviour("Hot-swapping")
def swap_an_adapter(method: Method, directory: Path) -> None:
    """`hotswap_adapter`: a saved adapter takes the place of a loaded one, and back."""
    _check_swaps(method, directory, (4, 4))


@behaviour("Hot-swapping")
def swap_adapters_of_other_sizes(method: Method, directory: Path) -> None:
    """Adapters of other lengths or ranks: a longer one, then a shorter one."""
    _check_swaps(method, directory, (4, 6))


@behaviour("Hot-swapping")
def swap_one_of_several_adapters(method: Method, directory: Path) -> None:
    """The other adapters of the model stay as they are."""
    _, second = _save_two(method, directory)
    model = build_adapted(method)
    before = compute_logits(model)
    add_adapter(model, method, "default2", size=4, seed=5)
    method.hotswap_adapter(model, second, adapter_name="default2", torch_device="cpu")
    assert_close(compute_logits(model), before)
    model.set_adapter("default2")
    assert_close(compute_logits(model), compute_logits(_load(second)))


@behaviour("Hot-swapping")
def generate_after_a_swap(method: Method, directory: Path) -> None:
    """Generation with a cache, and without the adapter, after a swap."""
    first, second = _save_two(method, directory)
    model, ids = _load(first), draw_tokens()
    method.hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert_same_tokens(tokens, continue_greedily(_load(second), ids))
    with model.disable_adapter():
        assert_close(compute_logits(model), compute_logits(build_causal_lm()))


@behaviour("Hot-swapping")
def save_after_a_swap(method: Method, directory: Path) -> None:
    """What is saved after a swap, of another length or rank, is the new adapter."""
    first, second = _save_two(method, directory, (4, 6))
    model = _load(first)
    method.hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
    model.save_pretrained(directory / "again")
    assert_close(compute_logits(_load(str(directory / "again"))), compute_logits(_load(second)))


def _swap_while_compiled(method: Method, model: PeftModel, path: str) -> None:
    """Swap an adapter in after compiling: no graph may be compiled again."""
    torch.compiler.reset()
    compiled, ids = torch.compile(model, backend="eager"), draw_tokens()
    expected = compute_logits(_load(path))
    with torch.no_grad():
        assert_differ(compiled(input_ids=ids).logits, expected)
        method.hotswap_adapter(compiled, path, adapter_name="default", torch_device="cpu")
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_close(compiled(input_ids=ids).logits, expected)


@behaviour("Hot-swapping")
def swap_in_a_compiled_model(method: Method, directory: Path) -> None:
    """In a compiled model, without compiling again: adapters of one size."""
    first, second = _save_two(method, directory)
    _swap_while_compiled(method, _load(first), second)


@behaviour("Hot-swapping")
def swap_other_sizes_in_a_compiled_model(method: Method, directory: Path) -> None:
    """In a compiled model, without compiling again: adapters of other sizes, after preparing it."""
    first, second = _save_two(method, directory, (4, 6))
    model = _load(first)
    before = compute_logits(model)
    method.prepare_for_hotswap(model, 8)
    assert_close(compute_logits(model), before)
    _swap_while_compiled(method, model, second)


@behaviour("Hot-swapping")
def refuse_an_adapter_that_does_not_fit(method: Method, directory: Path) -> None:
    """An adapter for more layers than the loaded one is refused, and the model is left as it was."""
    build_adapted(method, layers_to_transform=[0]).save_pretrained(directory / "few")
    build_adapted(method, seed=3).save_pretrained(directory / "all")
    model = _load(str(directory / "few"))
    before = compute_logits(model)
    try:
        method.hotswap_adapter(model, str(directory / "all"), adapter_name="default", torch_device="cpu")
    except (ValueError, RuntimeError) as error:
        check_message(error, "layers.1")
    else:
        raise AssertionError("It is not refused.")
    assert_close(compute_logits(model), before)


def _build_two(method: Method, sizes: tuple[int, int] = (4, 4)) -> PeftModel:
    model = build_adapted(method, size=sizes[0])
    add_adapter(model, method, "second", size=sizes[1])
    return model


def _compute_logits_of(model: PeftModel, adapter_name: str) -> torch.Tensor:
    model.set_adapter(adapter_name)
    return compute_logits(model)


@behaviour("Arithmetic")
def weigh_adapters(method: Method, directory: Path) -> None:
    """`add_weighted_adapter`: weights of one and zero give the first adapter; others give something between."""
    model = _build_two(method)
    first, second = _compute_logits_of(model, "default"), _compute_logits_of(model, "second")
    model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "copy", combination_type="linear")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="linear")
    assert_close(_compute_logits_of(model, "copy"), first)
    for other in (first, second, compute_logits(build_causal_lm())):
        assert_differ(_compute_logits_of(model, "mean"), other)


@behaviour("Arithmetic")
def subtract_an_adapter(method: Method, directory: Path) -> None:
    """A negative weight takes back what a positive one has added: nothing is left of either adapter."""
    model = _build_two(method)
    rests = []
    for name in ("default", "second"):
        model.add_weighted_adapter([name], [1.0], f"{name}-copy", combination_type="linear")
        model.add_weighted_adapter([name, f"{name}-copy"], [1.0, -1.0], f"{name}-rest", combination_type="linear")
        rests.append(_compute_logits_of(model, f"{name}-rest"))
        assert_differ(rests[-1], _compute_logits_of(model, name))
    assert_close(rests[0], rests[1])


@behaviour("Arithmetic")
def concatenate_adapters(method: Method, directory: Path) -> None:
    """`combination_type="cat"` equals both adapters at once, also with different sizes."""
    model = _build_two(method, (4, 6))
    model.base_model.set_adapter(["default", "second"])
    both = compute_logits(model)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    assert_close(_compute_logits_of(model, "both"), both)
    assert_differ(both, _compute_logits_of(model, "default"))


@behaviour("Arithmetic")
def save_a_combination(method: Method, directory: Path) -> None:
    """A combination is saved and loaded without the adapters that it was made of."""
    model = _build_two(method, (4, 6))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    expected = _compute_logits_of(model, "both")
    model.delete_adapter("default")
    model.delete_adapter("second")
    assert_close(_compute_logits_of(model, "both"), expected)
    model.save_pretrained(directory)
    assert_close(compute_logits(_load(str(directory / "both"))), expected)


@behaviour("Arithmetic")
def train_a_combination(method: Method, directory: Path) -> None:
    """A combination is trained on, and the adapters that it was made of are not."""
    model = _build_two(method)
    first = _compute_logits_of(model, "default")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="linear")
    model.set_adapter("mean")
    assert {name.split(".").count("mean") for name, p in model.named_parameters() if p.requires_grad} == {1}
    assert_decreases(take_steps(model))
    assert_close(_compute_logits_of(model, "default"), first)


@behaviour("Arithmetic")
def refuse_a_combination_that_does_not_fit(method: Method, directory: Path) -> None:
    """Unknown adapters, and weighing adapters of different sizes, give an error that says so."""
    model = _build_two(method, (4, 6))
    for adapters, word in ((["default", "nobody"], "nobody"), (["default", "second"], "")):
        try:
            model.add_weighted_adapter(adapters, [0.5, 0.5], "new", combination_type="linear")
        except ValueError as error:
            check_message(error, word)
        else:
            raise AssertionError("It is not refused.")
    assert set(model.peft_config) == {"default", "second"}
