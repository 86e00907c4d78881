"""Architectures beside plain decoders: encoders, both together, images, and decoders with a twist of their own."""

import pytest
import torch
from helpers import draw_tokens, list_lengths, named_prefix_parameters, pad_rows, perturb
from peft import PeftModel, get_peft_model
from tiny_models import MAX_POSITIONS, VOCAB_SIZE
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, RobertaConfig, RobertaForCausalLM
from zoo_models import build_inputs, build_zoo_model, draw_text

from peft_prefix_plus import PrefixPlusConfig

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
}
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def build_encoder_model(implementation: str = "sdpa", seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(**SIZES)
    model = BertForSequenceClassification(config).eval()
    model.set_attn_implementation(implementation)
    return model


def add_prefix(model: torch.nn.Module, **settings: object) -> PeftModel:
    config = PrefixPlusConfig(task_type="SEQ_CLS", prefix_init_token_ids=[4, 5, 6], **settings)
    return get_peft_model(model, config).eval()


@implementations
def test_disabled_equals_base(implementation):
    model, ids = build_encoder_model(implementation), draw_tokens()
    expected = model(ids).logits
    peft_model = add_prefix(model)
    assert not torch.allclose(peft_model(ids).logits, expected)
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(ids).logits, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_eager_equals_sdpa(dropout):
    ids, mask = pad_rows(draw_tokens(), [7, 4], "right")
    logits = []
    for implementation in ("eager", "sdpa"):
        model = add_prefix(build_encoder_model(implementation), prefix_dropout=dropout)
        perturb(model)
        for module in model.modules():
            module.training = type(module).__name__ == "PrefixDropout"
        for given in (None, mask):
            torch.manual_seed(3)
            logits.append(model(ids, attention_mask=given).logits)
    assert_close(logits[0], logits[2])
    assert_close(logits[1], logits[3])


@implementations
def test_right_padding_changes_nothing(implementation):
    model, rows = add_prefix(build_encoder_model(implementation)), draw_tokens()
    perturb(model)
    ids, mask = pad_rows(rows, [7, 4], "right")
    logits = model(ids, attention_mask=mask).logits
    assert_close(logits[1:], model(rows[1:, :4]).logits)


@implementations
def test_the_prefix_and_the_classifier_train_and_are_saved(implementation, tmp_path):
    model, ids = add_prefix(build_encoder_model(implementation)), draw_tokens()
    perturb(model)
    model(ids, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {name for name in trained if ".modules_to_save.default." in name}
    assert head
    assert trained == set(named_prefix_parameters(model)) | head
    assert all(bool(dict(model.named_parameters())[name].grad.abs().sum() > 0) for name in trained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_encoder_model(implementation), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_tokens_of_the_prefix_are_seen_from_every_position():
    model, ids = add_prefix(build_encoder_model()), draw_tokens()
    base = model.unload().bert(ids).last_hidden_state
    peft_model = add_prefix(build_encoder_model())
    changed = (peft_model.base_model.model.bert(ids).last_hidden_state - base).abs().amax(-1)
    assert bool((changed > 1e-3).all())


def test_an_encoder_as_a_decoder_starts_exactly_behind_its_reserved_positions():
    # The RoBERTa family counts positions from behind the row of the padding.
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, is_decoder=True)
    model, ids, init = RobertaForCausalLM(config).eval(), draw_tokens(), [4, 5, 6]
    expected = model(torch.cat([torch.tensor(init).expand(2, -1), ids], dim=1)).logits[:, 3:]
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=init)
    peft_model = get_peft_model(model, config).eval()
    assert_close(peft_model(ids).logits, expected, atol=2e-5, rtol=2e-4)
    fits = MAX_POSITIONS - config.num_virtual_tokens - (model.config.pad_token_id + 1)
    peft_model(draw_tokens(1, fits))
    with pytest.raises(ValueError, match=f"the input to at most {fits}"):
        peft_model(draw_tokens(1, fits + 1))


# Decoders that do more than attend to keys and values, with the settings that make it count in a tiny model.
SCALED_QUERIES = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.5,
    "original_max_position_embeddings": 3,
}
DECODERS: dict[str, dict[str, object]] = {
    "diffllama": {},
    "jetmoe": {},
    "doge": {},
    "ministral3": {"rope_parameters": SCALED_QUERIES},
    "ctrl": {},
}
decoders = pytest.mark.parametrize("model_type", DECODERS)


def build_decoder(model_type: str, implementation: str = "sdpa") -> PreTrainedModel:
    model = build_zoo_model("causal", model_type, implementation, **DECODERS[model_type])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("self_attn.A"):
                # Doge's keys are equally biased before training.
                parameter += torch.rand(parameter.shape, generator=generator)
    return model


def prompt_decoder(model: PreTrainedModel, **settings: object) -> PeftModel:
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=[4, 5, 6], **settings)
    return get_peft_model(model, config).eval()


@decoders
@implementations
@pytest.mark.parametrize("lengths", [[7, 7], [7, 4], [7, 1]], ids=str)
@torch.no_grad()
def test_a_captured_prefix_equals_the_prompt(model_type, implementation, lengths):
    base, rows, prompt = build_decoder(model_type, implementation), draw_text(), torch.tensor([[4, 5, 6]])
    expected = [
        base(torch.cat([prompt, row[None, :length]], dim=1)).logits[0, 3:]
        for row, length in zip(rows, lengths, strict=True)
    ]
    ids, mask = pad_rows(rows, lengths, "left")
    logits = prompt_decoder(base)(ids, attention_mask=mask).logits
    for i in range(2):
        assert_close(logits[i][mask[i].bool()], expected[i], atol=2e-5, rtol=2e-4)


@decoders
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_cached_generation_equals_recomputation(model_type, settings):
    model = prompt_decoder(build_decoder(model_type))
    perturb(model)
    ids, mask = pad_rows(draw_text(), [7, 4], "left")
    common = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    expected = model.generate(**common, num_beams=settings.get("num_beams", 1), use_cache=False)
    assert torch.equal(model.generate(**common, **settings), expected)


@decoders
def test_eager_equals_sdpa_where_virtual_tokens_are_hidden(model_type):
    ids, mask = pad_rows(draw_text(), [7, 4], "right")
    logits = []
    for implementation in ("eager", "sdpa"):
        model = prompt_decoder(build_decoder(model_type, implementation), prefix_dropout=0.5)
        perturb(model)
        for module in model.modules():
            module.training = type(module).__name__ == "PrefixDropout"
        for given in (None, mask):
            torch.manual_seed(3)
            logits.append(model(ids, attention_mask=given).logits)
    assert not torch.allclose(logits[0], model.eval()(ids).logits, atol=1e-3)
    assert_close(logits[0], logits[2], atol=2e-5, rtol=2e-4)
    assert_close(logits[1][mask.bool()], logits[3][mask.bool()], atol=2e-5, rtol=2e-4)


@decoders
@implementations
def test_prefix_parameters_of_decoders_get_gradients_and_the_base_model_comes_back(model_type, implementation):
    base, ids = build_decoder(model_type, implementation), draw_text()
    expected = base(ids).logits
    model = prompt_decoder(base)
    perturb(model)
    model(ids, labels=ids).loss.backward()
    prefix = named_prefix_parameters(model)
    assert prefix and all(bool(parameter.grad.abs().sum() > 0) for parameter in prefix.values())
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.unload()(ids).logits, expected)


@pytest.mark.parametrize("model_type", ["ministral3", "ctrl"])
def test_where_a_text_starts_counts_so_the_input_moves_behind_the_prefix(model_type):
    base, ids = build_decoder(model_type), draw_text()
    moved = {"position_ids": torch.arange(3, 10)[None]}
    assert not torch.allclose(base(ids, **moved).logits, base(ids).logits, atol=1e-3)
    model = prompt_decoder(base)
    # Positions of the caller move, too.
    assert torch.equal(model(ids, position_ids=torch.arange(7)[None]).logits, model(ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(ids, **moved).logits, base(ids, **moved).logits)
    # A prefix that stands nowhere takes no positions.
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init="random", num_virtual_tokens=3))
    seen = []
    stack = model.get_base_model().base_model
    stack.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    for adapters, start in (("default", 3), ("other", 0)):
        model.set_adapter(adapters)
        model(ids)
        assert seen.pop().tolist() == [list(range(start, start + 7))]


# Encoder-decoders: (how the encoder's, the decoder's and the crossing attention are targeted), by type.
KINDS = {
    "bart": {
        "encoder": r".*\.encoder\..*self_attn",
        "decoder": r".*\.decoder\..*self_attn",
        "cross": ["encoder_attn"],
    },
    "t5": {
        "encoder": r"encoder\..*SelfAttention",
        "decoder": r"decoder\..*SelfAttention",
        "cross": ["EncDecAttention"],
    },
}
seq2seq = pytest.mark.parametrize("model_type", KINDS)
kinds = pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])


def build_seq2seq(model_type: str, **settings: object) -> PeftModel:
    settings = {"prefix_init_token_ids": [4, 5, 6]} | settings
    config = PrefixPlusConfig(task_type="SEQ_2_SEQ_LM", **settings)
    return get_peft_model(build_zoo_model("seq2seq", model_type), config).eval()


def tell_kind(name: str) -> str:
    if "encoder_attn" in name or "EncDecAttention" in name:
        return "cross"
    return "decoder" if "decoder." in name else "encoder"


def draw_pair() -> dict[str, torch.Tensor]:
    return {"input_ids": draw_text(), "decoder_input_ids": draw_text(2, 5).flip(0)}


@seq2seq
def test_all_three_kinds_of_attention_carry_prefixes(model_type):
    model = build_seq2seq(model_type)
    assert sorted(map(tell_kind, list_lengths(model))) == ["cross"] * 2 + ["decoder"] * 2 + ["encoder"] * 2
    perturb(model)
    model(**draw_pair(), labels=draw_pair()["decoder_input_ids"]).loss.backward()
    prefix = named_prefix_parameters(model)
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in prefix.values())


@seq2seq
@kinds
def test_each_kind_can_be_chosen_alone_and_left_out(model_type, kind):
    target, inputs = KINDS[model_type][kind], draw_pair()
    base = build_zoo_model("seq2seq", model_type)
    expected = base(**inputs)
    alone, others = build_seq2seq(model_type, target_modules=target), build_seq2seq(model_type, exclude_modules=target)
    assert [tell_kind(name) for name in list_lengths(alone)] == [kind] * 2
    assert sorted({tell_kind(name) for name in list_lengths(others)}) == sorted(
        {"encoder", "decoder", "cross"} - {kind}
    )
    output = alone(**inputs)
    assert not torch.allclose(output.logits, expected.logits, atol=1e-3)
    same_encoder = torch.equal(output.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    assert same_encoder is (kind != "encoder")
    with others.disable_adapter():
        assert torch.equal(others(**inputs).logits, expected.logits)


@seq2seq
def test_padding_of_the_encoders_input_changes_nothing(model_type):
    model, inputs = build_seq2seq(model_type), draw_pair()
    perturb(model)
    ids, mask = pad_rows(inputs["input_ids"], [7, 4], "right")
    padded = model(input_ids=ids, attention_mask=mask, decoder_input_ids=inputs["decoder_input_ids"]).logits
    alone = model(input_ids=ids[1:, :4], decoder_input_ids=inputs["decoder_input_ids"][1:]).logits
    assert_close(padded[1:], alone, atol=2e-5, rtol=2e-4)


@seq2seq
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_an_encoder_decoder_generates_with_its_cache_as_without(model_type, settings):
    model = build_seq2seq(model_type)
    perturb(model)
    common = {"input_ids": draw_text(), "do_sample": False, "max_new_tokens": 8}
    expected = model.generate(**common, num_beams=settings.get("num_beams", 1), use_cache=False)
    assert expected.shape[1] == 9
    assert torch.equal(model.generate(**common, **settings), expected)


def test_a_prefix_of_the_decoder_equals_a_prompt_of_the_decoder():
    # T5 adds biases of relative positions, which a prefix does not get.
    base, prompt, ids = build_zoo_model("seq2seq", "bart"), torch.tensor([[4, 5, 6]]), draw_text(1)
    expected = base(input_ids=prompt, decoder_input_ids=torch.cat([prompt, ids], dim=1)).logits[:, 3:]
    model = build_seq2seq("bart", target_modules=KINDS["bart"]["decoder"])
    assert_close(model(input_ids=prompt, decoder_input_ids=ids).logits, expected, atol=2e-5, rtol=2e-4)


@seq2seq
def test_a_prefix_of_the_crossing_attention_equals_more_encoder_states(model_type):
    base, prompt, inputs = build_zoo_model("seq2seq", model_type), torch.tensor([[4, 5, 6]]), draw_pair()
    encode = base.get_encoder()
    states = torch.cat([encode(prompt)[0].expand(2, -1, -1), encode(inputs["input_ids"])[0]], dim=1)
    expected = base(encoder_outputs=(states,), decoder_input_ids=inputs["decoder_input_ids"]).logits
    # The later layers' keys are of the same encoder states, so the prefix is exact in every layer.
    model = build_seq2seq(model_type, target_modules=KINDS[model_type]["cross"])
    assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("settings", [{"prefix_init_token_ids": [4, 5, 6]}, {"prefix_init": "random"}], ids=str)
def test_a_decoder_without_an_encoder_leaves_its_crossing_attention_out(settings):
    base = build_zoo_model("causal", "gpt2", add_cross_attention=True)
    model = get_peft_model(base, PrefixPlusConfig(task_type="CAUSAL_LM", **settings))
    assert list(list_lengths(model)) == ["transformer.h.0.attn", "transformer.h.1.attn"]


# Images, which are no tokens.


def add_vision_prefix(model: PreTrainedModel, **settings: object) -> PeftModel:
    return get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=3, **settings)).eval()


def compute_states(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=images)[0]


@pytest.mark.parametrize("model_type", ["vit", "clip_vision_model"])
@pytest.mark.parametrize("prefix_init", ["vocab", "random", "zero"])
def test_a_vision_model_carries_a_prefix(model_type, prefix_init, tmp_path):
    base = build_zoo_model("vision", model_type)
    images = build_inputs("vision", base)["pixel_values"]
    expected = compute_states(base, images)
    model = add_vision_prefix(base, prefix_init=prefix_init)
    assert len(list_lengths(model)) == 2 and set(list_lengths(model).values()) == {3}
    assert not torch.allclose(compute_states(model, images), expected, atol=1e-3)
    perturb(model)
    compute_states(model, images).square().mean().backward()
    prefix = named_prefix_parameters(model)
    assert prefix and all(bool(parameter.grad.abs().sum() > 0) for parameter in prefix.values())
    with model.disable_adapter():
        assert torch.equal(compute_states(model, images), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_zoo_model("vision", model_type), tmp_path)
    assert torch.equal(compute_states(loaded, images), compute_states(model, images))


def build_llava(**settings: object) -> PeftModel:
    config = PrefixPlusConfig(task_type="CAUSAL_LM", prefix_init_token_ids=[4, 5, 6], **settings)
    return get_peft_model(build_zoo_model("multimodal", "llava"), config).eval()


def draw_text_with_image(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    text = draw_text()
    image = torch.full((2, 16), model.config.image_token_id)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    return {"input_ids": torch.cat([text[:, :2], image, text[:, 2:]], dim=1), "pixel_values": pixels}


def test_a_multimodal_model_gets_its_prefix_in_front_of_text_and_images():
    base, prompt = build_zoo_model("multimodal", "llava"), torch.tensor([[4, 5, 6]] * 2)
    model = build_llava()
    assert list(list_lengths(model)) == [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
    for inputs in ({"input_ids": draw_text()}, draw_text_with_image(base)):
        whole = inputs | {"input_ids": torch.cat([prompt, inputs["input_ids"]], dim=1)}
        assert_close(model(**inputs).logits, base(**whole).logits[:, 3:], atol=2e-5, rtol=2e-4)


def test_the_vision_tower_gets_a_prefix_when_it_is_asked_for():
    base = build_zoo_model("multimodal", "llava")
    inputs, text = draw_text_with_image(base), draw_text()
    model = build_llava(target_modules=r".*vision_tower.*self_attn")
    assert list(list_lengths(model)) == [f"model.vision_tower.encoder.layers.{i}.self_attn" for i in range(2)]
    perturb(model)
    assert torch.equal(model(input_ids=text).logits, base(input_ids=text).logits), "there is no image to see it"
    changed = (model(**inputs).logits - base(**inputs).logits).abs().amax(-1)
    assert not changed[:, :2].any() and bool((changed[:, 2:] > 1e-3).all()), "the image stands at the third token"
    both = build_llava(target_modules=["self_attn"])
    assert len(list_lengths(both)) == 4
    perturb(both)
    both(**inputs).logits.square().mean().backward()
    trained = {name: parameter for name, parameter in both.named_parameters() if parameter.requires_grad}
    # LLaVA reads the image off the layer before the last one.
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    assert all("vision_tower.encoder.layers.1" in name for name in unused) and len(unused) < len(trained) / 2
