"""The laws that hold for every architecture, attention implementation and dtype that is claimed."""

from pathlib import Path

import pytest
import torch
from helpers import INIT_TOKEN_IDS, add_prefix, draw_tokens, named_prefix_parameters, pad_rows, perturb
from peft import PeftModel
from tiny_models import ARCHITECTURES, build_model
from torch.testing import assert_close

from peft_prefix_plus.encoders import PROJECTIONS

IMPLEMENTATIONS = ("eager", "sdpa")
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-4},
    # Two roundings of a number near 4 may be 1/32 apart, and two layers of them accumulate.
    torch.bfloat16: {"atol": 0.15, "rtol": 0.05},
}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
projections = pytest.mark.parametrize("projection", PROJECTIONS)


def greedy(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: object):
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 6, "do_sample": False} | settings
    return model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


def prompt_positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@architectures
@implementations
@dtypes
def test_law_1_disabled_equals_base(name, implementation, dtype):
    model, ids = build_model(name, implementation, dtype), draw_tokens()
    base_logits, base_tokens = model(ids).logits, greedy(model, ids)
    peft_model = add_prefix(model)
    perturb(peft_model)
    assert not torch.allclose(peft_model(ids).logits, base_logits), "the prefix has no effect"
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(ids).logits, base_logits)
        assert torch.equal(greedy(peft_model, ids), base_tokens)
    assert torch.equal(peft_model.unload()(ids).logits, base_logits)


@architectures
@implementations
@dtypes
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_law_2_captured_prefix_equals_prompt(name, implementation, dtype, side):
    model, rows = build_model(name, implementation, dtype), draw_tokens()
    ids, mask = pad_rows(rows, [7, 4], side) if side else (rows, torch.ones_like(rows))
    prompt = torch.tensor(INIT_TOKEN_IDS).expand(2, -1)
    # The reference has the prompt right before each row's first token, and its padding outside of both.
    if side == "left":
        full = torch.zeros(2, 12, dtype=torch.long)
        full_mask = torch.zeros_like(full)
        for i, length in enumerate([7, 4]):
            full[i, 12 - length - 5 :] = torch.cat([prompt[i], rows[i, :length]])
            full_mask[i, 12 - length - 5 :] = 1
    else:
        full, full_mask = torch.cat([prompt, ids], dim=1), torch.cat([torch.ones_like(prompt), mask], dim=1)
    expected = model(full, attention_mask=full_mask, position_ids=prompt_positions(full_mask)).logits[:, 5:]
    # As many as fit into the sliding windows: later, the prompt leaves them, and the prefix does not.
    expected_tokens = greedy(model, full, full_mask, max_new_tokens=4)
    peft_model = add_prefix(model)
    given = {"position_ids": prompt_positions(mask)} if ARCHITECTURES[name].learned_positions else {}
    logits = peft_model(ids, attention_mask=mask, **given).logits
    assert_close(logits[mask.bool()], expected[mask.bool()], **TOLERANCE[dtype])
    if side != "right" and dtype == torch.float32:
        assert torch.equal(greedy(peft_model, ids, mask, max_new_tokens=4), expected_tokens)


@architectures
@dtypes
@pytest.mark.parametrize("dropout_mask", [False, True], ids=["whole", "masked"])
def test_law_3_eager_equals_sdpa(name, dtype, dropout_mask):
    ids, mask = pad_rows(draw_tokens(length=9), [9, 5], "right")
    logits = {}
    for implementation in IMPLEMENTATIONS:
        model = add_prefix(build_model(name, implementation, dtype), prefix_dropout=0.5 if dropout_mask else 0.0)
        perturb(model)
        model.train(dropout_mask)
        for given in (None, mask):
            torch.manual_seed(3)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            logits[implementation, given is None] = model(ids, attention_mask=given).logits
    assert_close(logits["sdpa", True], logits["eager", True], **TOLERANCE[dtype])
    assert_close(logits["sdpa", False][mask.bool()], logits["eager", False][mask.bool()], **TOLERANCE[dtype])


@architectures
@implementations
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["dynamic", "static", "beams", "sampling", "prompt-lookup"],
)
def test_law_4_cached_generation_equals_recomputation(name, implementation, settings, padded):
    model = add_prefix(build_model(name, implementation))
    perturb(model)
    batch_size = 1 if "prompt_lookup_num_tokens" in settings else 2
    ids, mask = pad_rows(draw_tokens(batch_size), [7, 4 if padded else 7][:batch_size], "left")
    recomputation = {key: value for key, value in settings.items() if key in ("num_beams", "do_sample", "top_k")}
    # Long enough for the tokens to leave the sliding windows.
    torch.manual_seed(4)
    expected = greedy(model, ids, mask, **recomputation, use_cache=False, max_new_tokens=12)
    torch.manual_seed(4)
    assert torch.equal(greedy(model, ids, mask, **settings, max_new_tokens=12), expected)


@architectures
@implementations
@dtypes
@pytest.mark.parametrize("side", ["left", "right"])
def test_law_5_padding_changes_nothing(name, implementation, dtype, side):
    model = add_prefix(build_model(name, implementation, dtype), prefix_init="random", num_virtual_tokens=4)
    perturb(model)
    rows, lengths = draw_tokens(batch_size=3), [7, 4, 1]
    ids, mask = pad_rows(rows, lengths, side)
    given = {"position_ids": prompt_positions(mask)} if ARCHITECTURES[name].learned_positions else {}
    logits = model(ids, attention_mask=mask, **given).logits
    for i, length in enumerate(lengths):
        alone = model(rows[i : i + 1, :length]).logits[0]
        assert_close(logits[i][mask[i].bool()], alone, **TOLERANCE[dtype])


@architectures
@implementations
@projections
def test_law_7_folded_and_loaded_equal_before(name, implementation, projection, tmp_path: Path):
    model = add_prefix(build_model(name, implementation), projection=projection, num_frozen_tokens=1)
    perturb(model)
    ids = draw_tokens()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(build_model(name, implementation), tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, expected)
    model.fold_prefix()
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "folded")
    loaded = PeftModel.from_pretrained(build_model(name, implementation), tmp_path / "folded", low_cpu_mem_usage=True)
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.active_peft_config.projection == "none"


@architectures
@implementations
@projections
def test_law_8_prefix_parameters_get_gradients_and_nothing_else(name, implementation, projection):
    model, ids = add_prefix(build_model(name, implementation), projection=projection), draw_tokens()
    perturb(model)
    model(ids, labels=ids).loss.backward()
    prefix = named_prefix_parameters(model)
    assert prefix
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in prefix:
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), parameter_name
        else:
            assert parameter.grad is None and not parameter.requires_grad, parameter_name


@architectures
@implementations
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("prefix_dropout_mode", ["token", "element"])
def test_law_9_gradient_checkpointing_changes_nothing(name, implementation, use_reentrant, prefix_dropout_mode):
    results = []
    for checkpointing in (False, True):
        model = add_prefix(
            build_model(name, implementation), prefix_dropout=0.4, prefix_dropout_mode=prefix_dropout_mode
        )
        perturb(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        ids = draw_tokens()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {key: value.grad for key, value in named_prefix_parameters(model).items()}))
    assert_close(results[1][0], results[0][0])
    for key, gradient in results[0][1].items():
        assert_close(results[1][1][key], gradient, msg=key)


@architectures
@pytest.mark.parametrize("prefix_init", ["vocab", "tokens", "random", "zero"])
@projections
def test_step_0_is_the_anchor(name, prefix_init, projection):
    settings = {"prefix_init_token_ids": [3, 4, 5, 6]} if prefix_init == "tokens" else {"num_virtual_tokens": 4}
    model = add_prefix(build_model(name), prefix_init=prefix_init, projection=projection, **settings)
    for module in model.modules():
        if hasattr(module, "anchor_keys") and hasattr(module, "compute_delta"):
            states = module()
            assert torch.equal(states.keys[0], module.anchor_keys)
            assert torch.equal(states.values[0], module.anchor_values)
            assert bool((module.scale_keys > 0).all())
