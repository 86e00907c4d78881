"""Where the input stands: behind the prefix in tables, at its first real token elsewhere."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from helpers import INIT_TOKEN_IDS, add_prefix, draw_tokens, pad_rows, perturb
from peft import PeftModel, get_peft_model
from tiny_models import ARCHITECTURES, MAX_POSITIONS, build_model
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache
from zoo_models import build_inputs, build_zoo_model

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.positions import (
    PositionAligner,
    ShiftedPositionEmbedding,
    align_positions,
    stop_aligning_positions,
)

P = len(INIT_TOKEN_IDS)
TOLERANCE = {"atol": 2e-5, "rtol": 2e-4}
learned = pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.learned_positions])
rotary = pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if not a.learned_positions])


def find_shifts(model: torch.nn.Module) -> list[ShiftedPositionEmbedding]:
    return [module for module in model.modules() if isinstance(module, ShiftedPositionEmbedding)]


def count_hooks(model: torch.nn.Module) -> int:
    return sum(isinstance(hook, PositionAligner) for m in model.modules() for hook in m._forward_pre_hooks.values())


def add_second(model: PeftModel, ids: list[int]) -> None:
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=ids))


@learned
@pytest.mark.parametrize("given", [False, True], ids=["own-positions", "given-positions"])
def test_the_table_is_read_behind_the_prefix(name, given):
    model, ids = add_prefix(build_model(name)), draw_tokens()
    (table,) = find_shifts(model)
    seen = []
    table.base_layer.register_forward_hook(lambda module, args, kwargs, output: seen.append(output), with_kwargs=True)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4, 3]])
    model(ids, **({"position_ids": positions} if given else {}))
    offset = table.base_layer.weight.shape[0] - MAX_POSITIONS
    expected = table.base_layer.weight[(positions if given else positions[:1]) + P + offset]
    assert torch.equal(*torch.broadcast_tensors(seen[0], expected))


@learned
@pytest.mark.parametrize("prefix_init", ["random", "zero"])
def test_a_prefix_that_stands_nowhere_takes_no_positions(name, prefix_init):
    model = add_prefix(build_model(name), prefix_init=prefix_init, num_virtual_tokens=4)
    assert not find_shifts(model)
    model(draw_tokens(1, MAX_POSITIONS))


@rotary
def test_rotary_models_get_no_shift(name):
    assert not find_shifts(add_prefix(build_model(name)))


@learned
def test_the_last_position_can_be_used_and_the_next_one_raises(name):
    model = add_prefix(build_model(name))
    model(draw_tokens(1, MAX_POSITIONS - P))
    with pytest.raises(ValueError) as raised:
        model(draw_tokens(1, MAX_POSITIONS - P + 1))
    message = str(raised.value)
    assert f"position {MAX_POSITIONS - P}" in message and f"takes {P} positions" in message
    assert f"learned only {MAX_POSITIONS}" in message
    assert re.search(rf"Shorten .*input.* {MAX_POSITIONS - P}\b", message)
    with model.disable_adapter():
        model(draw_tokens(1, MAX_POSITIONS))


def test_a_table_that_counts_by_itself_says_when_it_ends():
    base = build_zoo_model("seq2seq", "bart", max_position_embeddings=16)
    config = PrefixPlusConfig(task_type="SEQ_2_SEQ_LM", prefix_init_token_ids=INIT_TOKEN_IDS)
    model = get_peft_model(base, config).eval()
    model(input_ids=draw_tokens(1, 16 - P), decoder_input_ids=draw_tokens(1, 16 - P))
    for lengths in ((16 - P + 1, 3), (3, 16 - P + 1)):
        ids, decoder_ids = (draw_tokens(1, length) for length in lengths)
        with pytest.raises(ValueError, match=f"position {16 - P}, the prefix takes {P} positions.* only 16"):
            model(input_ids=ids, decoder_input_ids=decoder_ids)


@learned
def test_generation_up_to_the_last_position(name):
    model, ids = add_prefix(build_model(name)), draw_tokens(1, MAX_POSITIONS - P - 4)
    settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    assert model.generate(**settings, max_new_tokens=5).shape[1] == MAX_POSITIONS - P + 1
    with pytest.raises(ValueError, match="learned only"):
        model.generate(**settings, max_new_tokens=6)


@learned
def test_several_adapters_shift_by_the_sum(name):
    model, ids = add_prefix(build_model(name)), draw_tokens()
    add_second(model, [3, 4, 6])
    (table,) = find_shifts(model)
    assert table.prefix_plus_shift == {"default": P, "other": 3}
    seen = []
    table.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    lookups = (["default"], P), (["other"], 3), (["default", "other"], P + 3), ([], 0)
    for adapters, shift in lookups:
        model.base_model.set_adapter(adapters)
        model.base_model(ids)
        offset = table.base_layer.weight.shape[0] - MAX_POSITIONS
        expected = table.base_layer.weight[torch.arange(7) + shift + offset]
        assert torch.equal(*torch.broadcast_tensors(seen.pop(), expected))


@learned
def test_disabling_and_deleting_take_the_shift_away(name):
    base, ids = build_model(name), draw_tokens()
    expected = base(ids).logits
    model = add_prefix(base)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    add_second(model, [3, 4, 6])
    model.delete_adapter("other")
    assert find_shifts(model)[0].prefix_plus_shift == {"default": P}
    model.delete_adapter("default")
    assert not find_shifts(model)
    assert torch.equal(model.base_model(ids).logits, expected)


@learned
def test_unloading_gives_back_the_table(name):
    base = build_model(name)
    modules = dict(base.named_modules())
    assert dict(add_prefix(base).unload().named_modules()) == modules


@learned
def test_lengths_by_pattern_shift_by_the_longest(name):
    model = add_prefix(build_model(name), num_virtual_tokens=P, num_virtual_tokens_pattern={r".*\.0\..*": 2})
    assert find_shifts(model)[0].prefix_plus_shift == {"default": P}


@learned
def test_a_loaded_adapter_shifts_as_before(name, tmp_path):
    model, ids = add_prefix(build_model(name)), draw_tokens()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model(name), tmp_path)
    assert find_shifts(loaded)[0].prefix_plus_shift == {"default": P}
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@learned
def test_embeddings_as_input_are_shifted_too(name):
    model, ids = add_prefix(build_model(name)), draw_tokens()
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@rotary
@pytest.mark.parametrize("as_embeddings", [False, True], ids=["ids", "embeddings"])
def test_left_padded_rows_start_at_their_first_token(name, as_embeddings):
    model = add_prefix(build_model(name))
    perturb(model)
    ids, mask = pad_rows(draw_tokens(), [7, 4], "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if as_embeddings else {"input_ids": ids}
    logits = model(**inputs, attention_mask=mask).logits
    assert torch.equal(logits, model(**inputs, attention_mask=mask, position_ids=positions).logits)
    assert_close(logits[1, 3:], model(ids[1:, 3:]).logits[0], **TOLERANCE)


def test_positions_of_the_caller_win():
    model = add_prefix(build_model("llama"))
    ids, mask = pad_rows(draw_tokens(), [7, 4], "left")
    shifted = torch.arange(7).expand(2, -1) + 3
    ones = torch.ones_like(ids)
    moved = model(ids, attention_mask=mask, position_ids=shifted).logits
    assert not torch.allclose(moved[0], model(ids, attention_mask=mask).logits[0], atol=1e-3)
    assert torch.equal(model(ids, attention_mask=ones).logits, model(ids).logits)


def test_positional_ids_are_aligned_too():
    model = add_prefix(build_model("llama")).get_base_model()
    ids, mask = pad_rows(draw_tokens(), [7, 4], "left")
    assert torch.equal(model(ids, attention_mask=mask).logits, model(input_ids=ids, attention_mask=mask).logits)


def test_the_last_positions_go_with_the_last_tokens():
    model = add_prefix(build_model("llama"))
    ids, mask = pad_rows(draw_tokens(), [7, 4], "left")
    whole = model(ids, attention_mask=mask, use_cache=True).logits
    first = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    second = model(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values).logits
    assert_close(second, whole[:, 5:], **TOLERANCE)


def test_the_hook_does_nothing_without_an_active_prefix():
    base = build_model("llama")
    ids, mask = pad_rows(draw_tokens(), [7, 4], "left")
    expected = base(ids, attention_mask=mask).logits
    model = add_prefix(base)
    with model.disable_adapter():
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


@rotary
def test_one_hook_on_each_stack_for_all_adapters_and_none_after_unloading(name):
    base = build_model(name)
    model = add_prefix(base)
    add_second(model, [3, 4])
    assert count_hooks(model) == len([base, base.base_model])
    model.unload()
    assert count_hooks(base) == 0
    assert not base._forward_pre_hooks and not base._forward_pre_hooks_with_kwargs


@rotary
def test_the_backbone_called_by_itself_gives_the_same(name):
    """As trainers do that compute the logits of some tokens only."""
    model = add_prefix(build_model(name))
    ids, mask = pad_rows(draw_tokens(), [7, 4], "left")
    base = model.get_base_model()
    expected = base(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    assert_close(base.base_model(ids, attention_mask=mask).last_hidden_state[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("model_type", ["gptj", "ctrl", "ministral3"])
def test_the_backbone_called_by_itself_gives_the_same_where_a_start_counts(model_type):
    model = add_prefix(build_zoo_model("causal", model_type))
    ids, base = draw_tokens(), model.get_base_model()
    expected = base(ids, output_hidden_states=True).hidden_states[-1]
    assert_close(base.base_model(ids).last_hidden_state, expected)


def test_the_decoder_of_a_pair_numbers_its_own_input():
    """T5Gemma: rotary positions, those of encoder and decoder in arguments of their own."""
    base, ids = build_zoo_model("seq2seq", "t5gemma"), draw_tokens()
    # What a second layer reads depends on the encoder's input, which is another one in the capture.
    base.model.decoder.layers = base.model.decoder.layers[:1]
    start = torch.tensor([INIT_TOKEN_IDS]).expand(len(ids), -1)
    expected = base(input_ids=ids, decoder_input_ids=torch.cat([start, ids], 1)).logits[:, P:]
    config = PrefixPlusConfig(prefix_init_token_ids=INIT_TOKEN_IDS, target_modules=r".*decoder.*\.self_attn")
    model = get_peft_model(base, config).eval()
    assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, expected, **TOLERANCE)
    rows, mask = (torch.nn.functional.pad(item, (2, 0)) for item in (ids, torch.ones_like(ids)))
    padded = model(input_ids=ids, decoder_input_ids=rows, decoder_attention_mask=mask).logits[:, 2:]
    assert_close(padded, expected, **TOLERANCE)


@rotary
def test_arguments_by_position_equal_those_by_name(name):
    model = get_peft_model(build_model(name), PrefixPlusConfig(prefix_init_token_ids=INIT_TOKEN_IDS)).eval()
    ids, mask = pad_rows(draw_tokens(), [7, 4], "left")
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(ids, mask).logits, expected)
    with pytest.raises(TypeError, match="multiple values"):
        model.base_model.model(ids, mask, attention_mask=mask)


def test_positions_by_position_are_moved_where_a_start_counts():
    model = get_peft_model(build_zoo_model("causal", "ctrl"), PrefixPlusConfig(prefix_init_token_ids=INIT_TOKEN_IDS))
    ids = draw_tokens()
    names = list(inspect.signature(model.base_model.model.forward).parameters)
    given = {"input_ids": ids, "position_ids": torch.arange(7)[None]}
    by_position = [given.get(name) for name in names[: names.index("position_ids") + 1]]
    assert torch.equal(model.eval()(*by_position).logits, model(ids).logits)


@rotary
@pytest.mark.parametrize("kind", ["longer than the input", "segment numbers", "a gap"])
def test_only_what_stands_before_the_first_token_is_not_counted(name, kind):
    """The distances are those that the model itself would have."""
    base, ids = build_model(name), draw_tokens()
    model, cache, mask = add_prefix(base), None, torch.ones_like(ids)
    if kind == "longer than the input":
        cache = StaticCache(config=base.config, max_cache_len=12)
        mask = torch.nn.functional.pad(mask, (0, 5))
    elif kind == "segment numbers":
        mask[:, 4:] = 2
    else:
        mask[:, 3:5] = 0
    given = model(ids, attention_mask=mask, past_key_values=cache).logits
    if kind != "a gap":
        assert_close(given, model(ids).logits, **TOLERANCE)
        return
    prompt = torch.tensor([INIT_TOKEN_IDS] * 2)
    with model.disable_adapter():
        whole = model(torch.cat([prompt, ids], 1), attention_mask=torch.cat([torch.ones_like(prompt), mask], 1)).logits
    assert_close(given[mask.bool()], whole[:, P:][mask.bool()], **TOLERANCE)


def test_a_model_that_counts_from_one_counts_so_in_training_and_generation():
    model = add_prefix(build_zoo_model("multimodal", "paligemma"))
    ids = build_inputs("multimodal", model.get_base_model(), length=9)["input_ids"]
    mask = torch.ones_like(ids)
    expected = model(ids).logits
    assert_close(model(ids, attention_mask=mask).logits, expected, **TOLERANCE)
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    generated = model.generate(ids, attention_mask=mask, **settings).logits[0]
    assert_close(generated, expected[:, -1], **TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "glm4v"])
def test_padded_text_is_continued_where_images_have_coordinates(name):
    base = build_zoo_model("multimodal", name)
    model, ids = add_prefix(base), draw_tokens(2, 9)
    padded, mask = pad_rows(ids, [9, 5], "left")
    cache = DynamicCache(config=base.config.get_text_config())
    model(padded[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
    given = model(padded[:, 7:], attention_mask=mask, past_key_values=cache).logits
    assert_close(given[1], model(ids[1:, :5]).logits[0, -2:], **TOLERANCE)


def test_other_hooks_stay():
    base = build_model("llama")
    calls = []
    base.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    align_positions(base, "one", 0)
    align_positions(base, "other", 3)
    assert count_hooks(base) == len([base, base.base_model])
    stop_aligning_positions(base)
    base(draw_tokens())
    assert count_hooks(base) == 0 and calls == [1]


def test_several_adapters_move_the_input_by_the_sum_where_a_start_counts():
    base = build_zoo_model("causal", "ctrl")
    model, ids = add_prefix(base), draw_tokens()
    add_second(model, [3, 4, 6])
    starts = []
    base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: starts.append(int(kwargs["position_ids"][0, 0])), with_kwargs=True
    )
    for adapters in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(adapters)
        model.base_model(ids)
    assert starts == [P, 3, P + 3] and count_hooks(base) == 1
    model.unload()
    assert count_hooks(base) == 0


def test_the_input_goes_on_behind_the_cache_where_a_start_counts():
    model, ids = add_prefix(build_zoo_model("causal", "ctrl")), draw_tokens()
    whole = model(ids, use_cache=True).logits
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    assert_close(second, whole[:, 5:], **TOLERANCE)


@pytest.mark.parametrize(("stack", "moves"), [("encoder", True), ("decoder", True), ("cross", False)])
def test_an_encoder_and_a_decoder_move_by_themselves(stack, moves):
    targets = {
        "encoder": r".*\.encoder\..*self_attn",
        "decoder": r".*\.decoder\..*self_attn",
        "cross": ["encoder_attn"],
    }
    config = PrefixPlusConfig(
        task_type="SEQ_2_SEQ_LM", prefix_init_token_ids=INIT_TOKEN_IDS, target_modules=targets[stack]
    )
    model = get_peft_model(build_zoo_model("seq2seq", "bart"), config)
    moved = [name for name, module in model.named_modules() if isinstance(module, ShiftedPositionEmbedding)]
    assert moved == ([f"base_model.model.model.{stack}.embed_positions"] if moves else [])


@learned
def test_tables_need_no_hook(name):
    assert count_hooks(add_prefix(build_model(name))) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_equal_the_original(name, duplicate):
    model = add_prefix(build_model(name))
    add_second(model, [3, 4])
    perturb(model)
    ids, mask = pad_rows(draw_tokens(), [7, 4], "left")
    model.base_model.set_adapter(["default", "other"])
    expected = model.base_model(ids, attention_mask=mask).logits
    twin = duplicate(model)
    assert torch.equal(twin.base_model(ids, attention_mask=mask).logits, expected)
    bare = build_model(name)(ids, attention_mask=mask).logits
    assert torch.equal(twin.unload()(ids, attention_mask=mask).logits, bare)
    assert torch.equal(model.base_model(ids, attention_mask=mask).logits, expected)
