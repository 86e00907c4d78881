"""Training in a loop of one's own."""

from pathlib import Path

import torch
from torch import nn

from .behaviour import behaviour
from .methods import Method
from .subjects import (
    add_adapter,
    assert_close,
    assert_decreases,
    assert_differ,
    build_adapted,
    build_causal_lm,
    compute_logits,
    draw_tokens,
    take_steps,
)

GROUP = "A training loop of one's own"


def _compute_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    ids = draw_tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@behaviour(GROUP)
def train_in_a_loop(method: Method, directory: Path) -> None:
    """The loss decreases; only the adapter is trained, and all of it gets gradients."""
    model = method.apply(build_causal_lm())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert_decreases(take_steps(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    for name, parameter in model.named_parameters():
        if (name in trained) == torch.equal(parameter, before[name]):
            raise AssertionError(f"{name} did not change, or must not.")


@behaviour(GROUP)
def checkpoint_gradients_in_a_loop(method: Method, directory: Path) -> None:
    """Gradient checkpointing, reentrant and not, gives the same gradients."""
    expected = _compute_gradients(build_adapted(method))
    for reentrant in (False, True):
        model = build_adapted(method)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        gradients = _compute_gradients(model)
        for name, gradient in expected.items():
            assert_close(gradients[name], gradient, tolerance=1e-5)


@behaviour(GROUP)
def take_the_base_model_as_reference(method: Method, directory: Path) -> None:
    """The base model as the reference within a step (`disable_adapter()` between forward and backward)."""
    expected = _compute_gradients(build_adapted(method))
    model, ids = build_adapted(method).train(), draw_tokens()
    reference = compute_logits(build_causal_lm())
    loss = model(input_ids=ids, labels=ids).loss
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, reference)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected[name])


@behaviour(GROUP)
def train_two_adapters_in_turn(method: Method, directory: Path) -> None:
    """Two adapters trained in turn do not touch each other."""
    model = build_adapted(method)
    add_adapter(model, method, "second")
    first = compute_logits(model)
    model.set_adapter("second")
    assert_decreases(take_steps(model))
    second = compute_logits(model)
    model.set_adapter("default")
    assert torch.equal(compute_logits(model), first)
    assert_decreases(take_steps(model))
    assert_differ(compute_logits(model), first)
    model.set_adapter("second")
    assert torch.equal(compute_logits(model), second)


@behaviour(GROUP)
def train_with_a_frozen_second_adapter(method: Method, directory: Path) -> None:
    """Train one adapter on top of another that is active and frozen."""
    model = build_adapted(method)
    add_adapter(model, method, "second")
    frozen = {name: p.clone() for name, p in model.named_parameters() if "default" in name.split(".")}
    model.base_model.set_adapter(["default", "second"])
    model.set_requires_grad("default", requires_grad=False)
    assert_decreases(take_steps(model))
    parameters = dict(model.named_parameters())
    assert frozen and all(torch.equal(parameters[name], tensor) for name, tensor in frozen.items())


@behaviour(GROUP)
def train_under_autocast_in_a_loop(method: Method, directory: Path) -> None:
    """Training under `torch.autocast` in bfloat16."""
    model = method.apply(build_causal_lm())
    forward = model.forward
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(forward)
    assert_decreases(take_steps(model))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@behaviour(GROUP)
def accumulate_gradients_in_a_loop(method: Method, directory: Path) -> None:
    """Gradients of two halves add up to those of the batch."""
    expected = _compute_gradients(build_adapted(method))
    model = build_adapted(method).train()
    for row in draw_tokens().split(1):
        (model(input_ids=row, labels=row).loss / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected[name])


@behaviour(GROUP)
def pad_on_the_right(method: Method, directory: Path) -> None:
    """Padding on the right changes no logits of the real tokens."""
    _check_padding(method, pads=(0, 3))


@behaviour(GROUP)
def pad_on_the_left(method: Method, directory: Path) -> None:
    """Padding on the left changes no logits of the real tokens."""
    _check_padding(method, pads=(3, 0))


def _check_padding(method: Method, pads: tuple[int, int]) -> None:
    model, ids = build_adapted(method), draw_tokens()
    expected = compute_logits(model)
    padded, mask = (nn.functional.pad(tensor, pads) for tensor in (ids, torch.ones_like(ids)))
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask).logits
    assert_close(logits[mask.bool()], expected.flatten(0, 1))


@behaviour(GROUP)
def compile_the_forward(method: Method, directory: Path) -> None:
    """`torch.compile`: a compiled forward gives the same logits, and the same gradients."""
    model, ids = build_adapted(method), draw_tokens()
    expected, gradients = compute_logits(model), _compute_gradients(build_adapted(method).eval())
    compiled = torch.compile(model, backend="eager")
    output = compiled(input_ids=ids, labels=ids)
    assert_close(output.logits, expected)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, gradients[name])
