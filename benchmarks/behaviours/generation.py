"""Every way of `generate` to make tokens: they have to be those that forwards without a cache give."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from .behaviour import behaviour
from .methods import Method
from .subjects import (
    assert_close,
    assert_same_tokens,
    build_adapted,
    build_causal_lm,
    compute_logits,
    continue_greedily,
    draw_tokens,
    take_steps,
)

GROUP = "Generation"
STEPS = 6


def _check_greedy(model: PeftModel, ids: torch.Tensor | None = None, **settings: Any) -> None:
    ids = draw_tokens() if ids is None else ids
    expected = continue_greedily(model, ids, steps=STEPS)
    if expected.tolist() == continue_greedily(build_causal_lm(), ids, steps=STEPS).tolist():
        raise AssertionError("The adapter has no effect.")
    tokens = model.generate(input_ids=ids, max_new_tokens=STEPS, do_sample=False, **settings)
    assert_same_tokens(tokens, expected)


@behaviour(GROUP)
def generate_greedily(method: Method, directory: Path) -> None:
    """Greedy generation."""
    _check_greedy(build_adapted(method))


@behaviour(GROUP)
def generate_without_a_cache(method: Method, directory: Path) -> None:
    """Generation without a cache (`use_cache=False`)."""
    _check_greedy(build_adapted(method), use_cache=False)


@behaviour(GROUP)
def generate_with_a_static_cache(method: Method, directory: Path) -> None:
    """Generation with a static cache."""
    _check_greedy(build_adapted(method), cache_implementation="static", disable_compile=True)


@behaviour(GROUP)
def generate_by_prompt_lookup(method: Method, directory: Path) -> None:
    """Generation by prompt lookup."""
    ids = draw_tokens(batch_size=1).repeat(1, 2)
    _check_greedy(build_adapted(method), ids, prompt_lookup_num_tokens=3)


@behaviour(GROUP)
def generate_with_an_assistant(method: Method, directory: Path) -> None:
    """Assisted generation, with the base model as the assistant."""
    _check_greedy(build_adapted(method), draw_tokens(batch_size=1), assistant_model=build_causal_lm())


@behaviour(GROUP)
def assist_another_model(method: Method, directory: Path) -> None:
    """Assisted generation, with the adapted model as the assistant."""
    base, ids = build_causal_lm(), draw_tokens(batch_size=1)
    tokens = base.generate(ids, max_new_tokens=STEPS, do_sample=False, assistant_model=build_adapted(method, seed=2))
    assert_same_tokens(tokens, continue_greedily(base, ids, steps=STEPS))


@behaviour(GROUP)
def generate_with_beams(method: Method, directory: Path) -> None:
    """Beam search: the score of the best beam is the likelihood of its tokens."""
    model, ids = build_adapted(method), draw_tokens()
    output = model.generate(
        input_ids=ids,
        max_new_tokens=STEPS,
        num_beams=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = compute_logits(model, output.sequences).log_softmax(-1)[:, ids.shape[1] - 1 : -1]
    chosen = scores.gather(-1, output.sequences[:, ids.shape[1] :, None]).squeeze(-1)
    assert_close(output.sequences_scores, chosen.mean(-1))


@behaviour(GROUP)
def generate_by_sampling(method: Method, directory: Path) -> None:
    """Sampling draws from the distribution that a forward gives."""
    model, ids = build_adapted(method), draw_tokens()
    torch.manual_seed(5)
    tokens = model.generate(input_ids=ids, max_new_tokens=STEPS, do_sample=True, top_k=0, temperature=0.7)
    torch.manual_seed(5)
    for _ in range(STEPS):
        probabilities = (compute_logits(model, ids)[:, -1] / 0.7).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    assert_same_tokens(tokens, ids)


@behaviour(GROUP)
def generate_several_samples(method: Method, directory: Path) -> None:
    """Several continuations of each row (`num_return_sequences`)."""
    model, ids = build_adapted(method), draw_tokens()
    output = model.generate(
        input_ids=ids,
        max_new_tokens=3,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.sequences.shape == (6, ids.shape[1] + 3)
    expected = compute_logits(model, output.sequences)[:, ids.shape[1] - 1 : -1]
    assert_close(torch.stack(output.logits, dim=1), expected)


@behaviour(GROUP)
def generate_from_a_padded_batch(method: Method, directory: Path) -> None:
    """A left-padded batch gives what each row gives alone."""
    model, ids = build_adapted(method), draw_tokens(batch_size=3)
    mask = torch.ones_like(ids)
    mask[1, :2], mask[2, :4] = 0, 0
    tokens = model.generate(input_ids=ids * mask, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    for row, padding in enumerate([0, 2, 4]):
        expected = continue_greedily(model, ids[row : row + 1, padding:], steps=STEPS)
        assert_same_tokens(tokens[row : row + 1, padding:], expected)


@behaviour(GROUP)
def generate_from_embeddings(method: Method, directory: Path) -> None:
    """Generation from `inputs_embeds`."""
    model, ids = build_adapted(method), draw_tokens()
    embeddings = model.get_input_embeddings()(ids)
    tokens = model.generate(inputs_embeds=embeddings, max_new_tokens=STEPS, do_sample=False)
    assert_same_tokens(tokens, continue_greedily(model, ids, steps=STEPS)[:, ids.shape[1] :])


@behaviour(GROUP)
def generate_on_from_a_cache(method: Method, directory: Path) -> None:
    """A second turn of a conversation with the cache of the first (`past_key_values`)."""
    model, ids = build_adapted(method), draw_tokens(batch_size=1)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(input_ids=ids, **settings)
    longer = torch.cat([first.sequences, draw_tokens(batch_size=1, length=4, seed=6)], dim=1)
    # Without a mask, `generate` takes what happens to be the padding token for padding.
    mask = torch.ones_like(longer)
    second = model.generate(input_ids=longer, attention_mask=mask, past_key_values=first.past_key_values, **settings)
    assert_same_tokens(second.sequences, continue_greedily(model, longer, steps=3))


@behaviour(GROUP)
def pass_a_cache_by_hand(method: Method, directory: Path) -> None:
    """Forwards with a cache of one's own give the logits of one forward over all tokens."""
    model, ids = build_adapted(method), draw_tokens()
    expected = compute_logits(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(3, dim=1)]
    assert_close(torch.cat(parts, dim=1), expected)


@behaviour(GROUP)
def stream_tokens(method: Method, directory: Path) -> None:
    """Generation into a streamer."""

    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    collector = Collector()
    ids = draw_tokens(batch_size=1)
    model = build_adapted(method)
    model.generate(input_ids=ids, max_new_tokens=STEPS, do_sample=False, streamer=collector)
    assert collector.tokens == [*continue_greedily(model, ids, steps=STEPS)[0].tolist(), -1]


@behaviour(GROUP)
def generate_in_batches_that_change(method: Method, directory: Path) -> None:
    """Continuous batching (`generate_batch`)."""
    model = build_adapted(method)
    prompts = [row.tolist()[: 7 - i] for i, row in enumerate(draw_tokens())]
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=4, num_blocks=24, max_batch_tokens=16)
    results = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    generated = [results[name].generated_tokens for name in sorted(results)]
    expected = [continue_greedily(model, torch.tensor([p]), steps=3)[0, len(p) :].tolist() for p in prompts]
    if sorted(generated) != sorted(expected):
        raise AssertionError("The tokens are wrong.")


@behaviour(GROUP)
def generate_between_training_steps(method: Method, directory: Path) -> None:
    """Generate between training steps, in training mode and after `eval()`."""
    model = method.apply(build_causal_lm())
    for _ in range(2):
        take_steps(model, steps=2)
        tokens = model.generate(input_ids=draw_tokens(), max_new_tokens=STEPS, do_sample=False)
        assert model.training
        assert_same_tokens(tokens, continue_greedily(model, draw_tokens(), steps=STEPS))
        model.eval()
        _check_equal_to_forwards(model)


def _check_equal_to_forwards(model: PeftModel) -> None:
    tokens = model.generate(input_ids=draw_tokens(), max_new_tokens=STEPS, do_sample=False)
    assert_same_tokens(tokens, continue_greedily(model, draw_tokens(), steps=STEPS))
