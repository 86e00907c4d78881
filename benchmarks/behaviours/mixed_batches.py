"""One batch for several adapters: every row has to be what its adapter gives alone."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from .behaviour import behaviour
from .methods import Method
from .subjects import (
    add_adapter,
    assert_close,
    assert_same_tokens,
    build_adapted,
    build_causal_lm,
    check_message,
    compute_logits,
    continue_greedily,
    draw_tokens,
)

GROUP = "Adapters in one batch"


@behaviour(GROUP)
def mix_adapters_in_a_forward(method: Method, directory: Path) -> None:
    """An adapter for each row in a forward (`adapter_names`)."""
    model, names, ids, rows = _build_mixture(method)
    with torch.no_grad():
        logits = model(input_ids=ids, adapter_names=names).logits
    for i, row in enumerate(rows):
        assert_close(logits[i], compute_logits(row, ids[i : i + 1])[0])


@behaviour(GROUP)
def mix_adapters_in_generation(method: Method, directory: Path) -> None:
    """An adapter for each row in `generate`."""
    model, names, ids, rows = _build_mixture(method)
    tokens = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=6, do_sample=False)
    for i, row in enumerate(rows):
        assert_same_tokens(tokens[i : i + 1], continue_greedily(row, ids[i : i + 1]))


@behaviour(GROUP)
def mix_adapters_in_beams(method: Method, directory: Path) -> None:
    """An adapter for each row in `generate` with beams."""
    model, names, ids, rows = _build_mixture(method)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    tokens = model.generate(input_ids=ids, adapter_names=names, **settings)
    for i, row in enumerate(rows):
        assert_same_tokens(tokens[i : i + 1], row.generate(input_ids=ids[i : i + 1], **settings))


@behaviour(GROUP)
def mix_adapters_in_a_padded_batch(method: Method, directory: Path) -> None:
    """An adapter for each row of a left-padded batch in `generate`."""
    model, names, ids, rows = _build_mixture(method)
    mask = torch.ones_like(ids)
    for i in range(len(ids)):
        mask[i, :i] = 0
    tokens = model.generate(
        input_ids=ids * mask, attention_mask=mask, adapter_names=names, max_new_tokens=5, do_sample=False
    )
    for i, row in enumerate(rows):
        assert_same_tokens(tokens[i : i + 1, i:], continue_greedily(row, ids[i : i + 1, i:], steps=5))


def _build_mixture(method: Method) -> tuple[PeftModel, list[str], torch.Tensor, list[nn.Module]]:
    """A model with two adapters, a name per row, ids, and the model that each row is to be alone."""
    model = build_adapted(method)
    add_adapter(model, method, "second", size=4)
    alone = build_adapted(method, "second")
    set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name="second"), adapter_name="second")
    names = ["default", "__base__", "second", "default"]
    models = {"default": build_adapted(method), "second": alone, "__base__": build_causal_lm()}
    set_peft_model_state_dict(models["default"], get_peft_model_state_dict(model))
    return model, names, draw_tokens(len(names)), [models[name] for name in names]


@behaviour(GROUP)
def refuse_unknown_names(method: Method, directory: Path) -> None:
    """An unknown name among `adapter_names` is an error that tells it."""
    model = build_adapted(method)
    try:
        model(input_ids=draw_tokens(), adapter_names=["default", "unknown"])
    except ValueError as error:
        check_message(error, "unknown")
    else:
        raise AssertionError("There is no error.")
