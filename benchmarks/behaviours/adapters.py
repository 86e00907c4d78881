"""Adapters on one model: adding, switching, mixing, deleting, saving."""

from pathlib import Path

import torch

from .behaviour import behaviour
from .methods import Method
from .subjects import assert_close, assert_differ, build_causal_lm, draw_tokens, perturb


@behaviour("Adapters")
def add_and_delete_a_second_adapter(method: Method, directory: Path) -> None:
    """Add a second adapter, switch to it, delete it."""
    model = method.apply(build_causal_lm())
    perturb(model)
    ids = draw_tokens()
    first = model(ids).logits
    model.add_adapter("second", method.build_config(size=6, task_type="CAUSAL_LM"))
    perturb(model, "second", seed=3)
    model.set_adapter("second")
    assert_differ(model.eval()(ids).logits, first)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert_close(model(ids).logits, first)
    assert not any("second" in name.split(".") for name, _ in model.named_parameters())


@behaviour("Adapters")
def disable_the_adapter(method: Method, directory: Path) -> None:
    """`disable_adapter()` is the base model."""
    base, ids = build_causal_lm(), draw_tokens()
    expected = base(ids).logits.clone()
    model = method.apply(base)
    perturb(model)
    assert_differ(model(ids).logits, expected)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
