"""Mixed batches: every row equals the row on its own with its adapter."""

import threading

import pytest
import torch
from helpers import add_prefix, draw_tokens, pad_rows, perturb
from peft import PeftModel, PeftModelForSequenceClassification
from tiny_models import ARCHITECTURES, build_model
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel
from zoo_models import build_zoo_model, draw_text

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer
from peft_prefix_plus.states import PrefixStates, RowSelection, select_rows

ROWS = ["short", "__base__", "long", "short", "folded"]


def build_mixed(name: str, implementation: str = "sdpa", **overrides: object) -> PeftModel:
    """A model with three adapters of different lengths and projections, on different layers."""
    model = get_model(name, implementation, **overrides)
    perturb(model)
    return model.eval()


def get_model(name: str, implementation: str, **overrides: object) -> PeftModel:
    base = build_model(name, implementation, **overrides)
    model = PeftModel(base, build_config(prefix_init_token_ids=[4, 9, 2]), adapter_name="short")
    model.add_adapter("long", build_config(prefix_init_token_ids=[7, 3, 8, 30, 31, 11], projection="linear"))
    model.add_adapter("folded", build_config(prefix_init_token_ids=[21, 22, 5], layers_to_transform=[1]))
    model.base_model.fold_prefix("folded")
    return model


def build_config(**settings: object) -> PrefixPlusConfig:
    return PrefixPlusConfig(task_type="CAUSAL_LM", projection_dim=8, **settings)


def run_alone(model: PeftModel, adapter_name: str, run):
    """Run with one adapter for all rows."""
    if adapter_name == "__base__":
        with model.disable_adapter():
            return run(model)
    model.set_adapter(adapter_name)
    return run(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_every_row_equals_the_row_on_its_own(name, implementation):
    model = build_mixed(name, implementation)
    ids, mask = pad_rows(draw_tokens(5, 9), [9, 5, 7, 3, 8], "left")
    mixed = model(ids, attention_mask=mask, adapter_names=ROWS).logits
    assert not torch.allclose(mixed[0], mixed[3], atol=1e-2)
    for row, adapter_name in enumerate(ROWS):
        own, own_mask = ids[row : row + 1], mask[row : row + 1]
        alone = run_alone(model, adapter_name, lambda m, i=own, k=own_mask: m(i, attention_mask=k).logits)
        visible = mask[row].bool()
        torch.testing.assert_close(mixed[row][visible], alone[0][visible], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "returned", "static", "no cache"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text"])
def test_generation_gives_the_tokens_of_every_row_on_its_own(name, settings):
    model = build_mixed(name)
    ids, mask = pad_rows(draw_tokens(5, 9), [9, 5, 7, 3, 8], "left")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | settings
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=ROWS, **settings)
    mixed = mixed.view(5, -1, mixed.shape[-1])
    for row, adapter_name in enumerate(ROWS):
        own, own_mask = ids[row : row + 1], mask[row : row + 1]
        alone = run_alone(
            model, adapter_name, lambda m, i=own, k=own_mask: m.generate(input_ids=i, attention_mask=k, **settings)
        )
        assert torch.equal(mixed[row], alone), adapter_name


def test_nothing_is_left_of_a_mixed_batch():
    model = build_mixed("gpt2")
    hooks = [(name, len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    model.set_adapter("long")
    ids = draw_tokens(2, 6)
    expected = model(ids).logits
    model(ids, adapter_names=["short", "__base__"])
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="2 names, but the batch has 3 rows"):
        model(draw_tokens(3, 6), adapter_names=["short", "__base__"])
    assert torch.equal(model(ids).logits, expected)
    assert [(name, len(module._forward_pre_hooks)) for name, module in model.named_modules()] == hooks
    with model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(model(ids, adapter_names=["__base__", "__base__"]).logits, base)


def test_equal_lengths_need_no_mask():
    model = add_prefix(build_model("llama"), projection="none")
    model.add_adapter("other", build_config(prefix_init_token_ids=[1, 2, 3, 4, 5]))
    layer = next(module for module in model.modules() if isinstance(module, PrefixPlusLayer))
    states = [PrefixStates(*(torch.randn(1, 2, 3, 4) for _ in range(2))) for _ in range(2)]
    assert select_rows(states, RowSelection(torch.tensor([1, 0]), True)).mask is None
    assert layer.rows is None


def test_shorter_prefixes_end_right_before_the_text():
    states = [PrefixStates(*(torch.randn(1, 2, length, 4) for _ in range(2))) for length in (1, 3)]
    mixed = select_rows(states, RowSelection(torch.tensor([0, 1, -1]), False))
    assert mixed.mask.tolist() == [[False, False, True], [True] * 3, [False] * 3]
    assert torch.equal(mixed.keys[0, :, 2:], states[0].keys[0])
    assert torch.equal(mixed.values[1], states[1].values[0])


def test_calls_inside_of_a_mixed_generation_leave_its_rows_alone():
    model, ids = build_mixed("gpt2"), draw_tokens(2, 6)
    rows = ["long", "__base__"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "input_ids": ids}
    expected = model.generate(adapter_names=rows, **settings)
    plain = model(ids).logits
    inner = []

    def call_back(input_ids, scores):
        inner.append(model(ids).logits)
        model(ids[:1], adapter_names=["short"])
        return scores

    given = model.generate(adapter_names=rows, logits_processor=[call_back], **settings)
    assert torch.equal(given, expected)
    assert all(torch.equal(logits, plain) for logits in inner)


def test_two_threads_cannot_disturb_a_mixed_batch():
    model, ids = build_mixed("llama"), draw_tokens(2, 6)
    refused = []

    def call(**names) -> None:
        try:
            model(ids, **names)
        except RuntimeError as error:
            refused.append(str(error))

    def call_back(input_ids, scores):
        for names in ({}, {"adapter_names": ["short", "long"]}):
            thread = threading.Thread(target=call, kwargs=names)
            thread.start()
            thread.join()
        return scores

    settings = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "logits_processor": [call_back]}
    model.generate(input_ids=ids, adapter_names=["long", "__base__"], **settings)
    assert len(refused) == 2 and all("Two threads" in message for message in refused)
    refused.clear()
    model.generate(input_ids=ids, **settings)
    assert len(refused) == 1
    call(adapter_names=["short", "long"])
    assert len(refused) == 1


@pytest.mark.parametrize("names", [["short"], ["short", "long"]])
@pytest.mark.parametrize("call", ["forward", "generate", "bare"])
def test_names_for_fewer_rows_are_not_spread_over_the_batch(call, names):
    model, ids = build_mixed("llama"), draw_tokens(4, 6)
    if call == "bare":
        model, call = (
            PeftModel(build_model("llama"), build_config(num_virtual_tokens=3), adapter_name="short"),
            "forward",
        )
        names = ["short"] * len(names)
        model.eval()
    with pytest.raises(ValueError, match=f"{len(names)} names, but the batch has 4 rows"):
        getattr(model, call)(input_ids=ids, adapter_names=names)
    getattr(model, call)(input_ids=ids, adapter_names=["short"] * 4)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["short", "absent"], ValueError, "absent"),
        ("short", TypeError, "must be a list"),
        ([], ValueError, "short, long, folded"),
        ([1, 2], TypeError, "must be a list"),
    ],
)
def test_wrong_names_are_refused(names, error, message):
    model = build_mixed("llama")
    with pytest.raises(error, match=message):
        model(draw_tokens(2, 6), adapter_names=names)


def test_training_is_refused():
    model = build_mixed("llama").train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model(draw_tokens(2, 6), adapter_names=["short", "long"])


# ALiBi, attention without the interface, several calls a layer, latent attention, a state, positions of other kinds.
OTHER_TYPES = [
    "bloom",
    "falcon",
    "mpt",
    "gptj",
    "codegen",
    "ctrl",
    "doge",
    "diffllama",
    "deepseek_v3",
    "jamba",
    "xglm",
]
OTHER_TYPES += ["gpt_neo", "biogpt", "qwen3_next"]


@pytest.mark.parametrize("model_type", OTHER_TYPES)
@torch.no_grad()
def test_every_row_equals_the_row_on_its_own_on_other_architectures(model_type):
    model = add_three_adapters(build_zoo_model("causal", model_type), "CAUSAL_LM")
    ids = draw_text(5)
    mixed = model(ids, adapter_names=ROWS).logits
    for row, adapter_name in enumerate(ROWS):
        alone = run_alone(model, adapter_name, lambda m, i=ids[row : row + 1]: m(i).logits)
        torch.testing.assert_close(mixed[row], alone[0], atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("model_type", ["bart", "t5", "m2m_100", "pegasus", "marian"])
@torch.no_grad()
def test_encoder_decoders_generate_the_tokens_of_every_row_on_its_own(model_type, num_beams):
    model = add_three_adapters(build_zoo_model("seq2seq", model_type), "SEQ_2_SEQ_LM")
    ids, mask = pad_rows(draw_text(5, 9), [9, 5, 7, 3, 8], "right")
    settings = {"max_new_tokens": 5, "num_beams": num_beams, "do_sample": False}
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=ROWS, **settings)
    for row, adapter_name in enumerate(ROWS):
        own, own_mask = ids[row : row + 1], mask[row : row + 1]
        alone = run_alone(
            model, adapter_name, lambda m, i=own, k=own_mask: m.generate(input_ids=i, attention_mask=k, **settings)
        )
        assert torch.equal(mixed[row][: alone.shape[1]], alone[0]), adapter_name


def add_three_adapters(base: PreTrainedModel, task_type: str) -> PeftModel:
    settings = {"task_type": task_type, "projection": "none"}
    model = PeftModel(base, PrefixPlusConfig(num_virtual_tokens=3, **settings), adapter_name="short")
    model.add_adapter("long", PrefixPlusConfig(num_virtual_tokens=6, prefix_init_seed=1, **settings))
    model.add_adapter("folded", PrefixPlusConfig(num_virtual_tokens=3, prefix_init="random", **settings))
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "deberta-v2"])
@torch.no_grad()
def test_every_row_equals_the_row_on_its_own_in_encoders(model_type):
    model = add_three_adapters(build_zoo_model("encoder", model_type), "FEATURE_EXTRACTION")
    ids = draw_text(5)
    mixed = model(input_ids=ids, adapter_names=ROWS)[0]
    for row, adapter_name in enumerate(ROWS):
        alone = run_alone(model, adapter_name, lambda m, i=ids[row : row + 1]: m(input_ids=i)[0])
        torch.testing.assert_close(mixed[row], alone[0], atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("active", ["default", "headless"])
@torch.no_grad()
def test_rows_get_the_classification_head_of_their_adapter(active):
    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    base = BertForSequenceClassification(config).eval()
    model = PeftModelForSequenceClassification(base, PrefixPlusConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    model.add_adapter("other", PrefixPlusConfig(task_type="SEQ_CLS", num_virtual_tokens=5))
    model.add_adapter("headless", PrefixPlusConfig(num_virtual_tokens=2))
    for name, parameter in model.named_parameters():
        if "classifier" in name and "original" not in name:
            torch.nn.init.normal_(parameter)
    model.set_adapter(active)
    model.eval()
    rows, ids = ["other", "default", "__base__", "headless"], draw_tokens(4, 6)
    mixed = model(ids, adapter_names=rows).logits
    for row, adapter_name in enumerate(rows):
        alone = run_alone(model, adapter_name, lambda m, i=ids[row : row + 1]: m(i).logits)
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-4, rtol=1e-4)


def test_images_in_the_text_of_a_mixed_batch():
    """Their rows are patches, of which there are more than rows of text."""
    base = build_zoo_model("multimodal", "qwen2_vl")
    vision, ids = base.config.vision_config, draw_text()
    places = torch.full((len(ids), 16 // vision.spatial_merge_size**2), base.config.image_token_id)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    batch = {
        "input_ids": torch.cat([ids[:, :1], places, ids[:, 1:]], dim=1),
        "pixel_values": torch.randn(len(ids) * 16, patch, generator=torch.Generator().manual_seed(3)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(ids)),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == base.config.image_token_id).int()
    model = add_prefix(base)
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=[3, 4, 6]))
    model.eval()
    mixed = model(**batch, adapter_names=["default", "other"]).logits
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(**batch).logits[row], atol=1e-4, rtol=1e-4)
