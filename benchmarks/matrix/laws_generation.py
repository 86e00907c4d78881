"""What generation in some mode must give: the tokens that recomputation without a cache gives."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from checks import NotApplicableError
from laws_forward import Comparison, find_text, run
from mode_subjects import Builder, ModeSubject
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    QuantizedCache,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import ContinuousBatchingConfig
from zoo import FIRST_SPECIAL_ID, VOCAB_SIZE

# Long enough for the tokens to leave the sliding windows of 16.
NEW_TOKENS = 12
HUB_MODES = "transformers 5 has moved it to a repository of the Hub, which is not reachable here"


def generate(model: nn.Module, subject: ModeSubject, **settings: Any) -> Any:
    """Generate from the subject's inputs, greedily unless the settings say otherwise; tokens, logits and the cache."""
    find_text(subject)
    if not subject.base.can_generate():
        raise NotApplicableError("does not generate text")
    inputs = {name: value for name, value in subject.inputs.items() if not name.startswith("decoder_")}
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    plain = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    if subject.representative.has_image:
        # A drawn token may otherwise be the place of another image.
        plain["suppress_tokens"] = list(range(FIRST_SPECIAL_ID, VOCAB_SIZE))
    torch.manual_seed(4)
    return model.generate(**inputs | plain | settings)  # type: ignore[operator]


def read(output: Any) -> list[Tensor]:
    """Tokens and logits of a generation."""
    return [output.sequences, torch.stack(output.logits, dim=1).float()]


def compare_generation(
    subject: ModeSubject, build: Builder, settings: dict[str, Any], shared: dict[str, Any] | None = None
) -> Comparison:
    """Compare some settings to recomputation.

    Args:
        subject ([`ModeSubject`]): the type.
        build (`Callable`): builds its model.
        settings (`dict`): of the mode.
        shared (`dict`, *optional*): of both sides, such as the number of beams.
    """
    model, shared = build(), shared or {}
    expected = read(generate(model, subject, use_cache=False, **shared))
    return Comparison(read(generate(model, subject, **shared, **settings)), expected)


def with_settings(*, shared: dict[str, Any] | None = None, **settings: Any) -> Callable[..., Comparison]:
    """A law that compares some settings of `generate` to recomputation."""

    def law(subject: ModeSubject, build: Builder) -> Comparison:
        return compare_generation(subject, build, settings, shared)

    return law


def one_row(subject: ModeSubject) -> ModeSubject:
    """The first row of the inputs, for what generates one row at a time."""
    single = ModeSubject(subject.representative, subject.implementation)
    # The patches of all images may stand one behind the other.
    single.inputs = {name: value[: len(value) // 2] for name, value in subject.inputs.items()}
    return single


def law_assisted(subject: ModeSubject, build: Builder, has_prefix: bool) -> Comparison:
    """Drafts of an assistant do not change the tokens: one with the same prefix, or another base model."""
    subject = one_row(subject)
    assistant = build() if has_prefix else subject.build(False, seed=1)
    return compare_generation(subject, build, {"assistant_model": assistant})


def law_early_exit(subject: ModeSubject, build: Builder) -> Comparison:
    """Drafts of the model's own first layer do not change the tokens."""
    return compare_generation(one_row(subject), build, {"assistant_early_exit": 1})


def law_prompt_lookup(subject: ModeSubject, build: Builder) -> Comparison:
    """Drafts from the prompt do not change the tokens."""
    return compare_generation(one_row(subject), build, {"prompt_lookup_num_tokens": 2})


def law_given_cache(subject: ModeSubject, build: Builder) -> Comparison:
    """An empty cache of the caller's, filled by `generate`."""
    config = subject.base.config.get_text_config(decoder=True)
    cache: Any = DynamicCache(config=config)
    if subject.base.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache(config=config))
    return compare_generation(subject, build, {"past_key_values": cache})


def law_encoder_decoder_cache(subject: ModeSubject, build: Builder) -> Comparison:
    """The two caches of an encoder-decoder model; cross-attention reads its own from the second token on."""
    if not subject.base.config.is_encoder_decoder:
        raise NotApplicableError("no encoder-decoder model")
    return law_given_cache(subject, build)


def law_continue_forward(subject: ModeSubject, build: Builder) -> Comparison:
    """A forward on a cache that other forwards have filled gives what one forward over everything gives."""
    name, model = find_text(subject), build()
    ids = subject.inputs[name]
    expected = run(model, subject.inputs, use_cache=False)
    cut, cache, pieces = ids.shape[1] - 4, None, []
    others = {key: value for key, value in subject.inputs.items() if key != name}
    for start, end in ((0, cut), (cut, cut + 3), (cut + 3, cut + 4)):
        given = dict(others)
        if name == "input_ids" and subject.representative.has_image:
            given = (
                {} if start else {key: v[:, :cut] if key == "mm_token_type_ids" else v for key, v in others.items()}
            )
        with torch.no_grad():
            output = model(**given, **{name: ids[:, start:end]}, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits.float())
    if cache.get_seq_length() != ids.shape[1]:
        raise ValueError(f"the cache has {cache.get_seq_length()} entries for {ids.shape[1]} tokens")
    return Comparison([torch.cat(pieces, dim=1)], [expected])


def law_continue_generation(subject: ModeSubject, build: Builder) -> Comparison:
    """A second turn on the cache of the first one gives what it gives without."""
    if find_text(subject) != "input_ids" or subject.base.config.is_encoder_decoder:
        raise NotApplicableError("`generate` starts a decoder from its first token")
    if subject.representative.has_image:
        raise NotApplicableError("checked without images only")
    model = build()
    first = generate(model, subject, max_new_tokens=5)
    ids = torch.cat([first.sequences, subject.inputs["input_ids"][:, -3:]], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(model, subject, **turn, use_cache=False)
    given = generate(model, subject, **turn, past_key_values=first.past_key_values)
    return Comparison(read(given), read(expected))


def law_embeddings(subject: ModeSubject, build: Builder) -> Comparison:
    """Generation from `inputs_embeds` gives the tokens that it gives from the same ids."""
    if find_text(subject) != "input_ids" or subject.representative.has_image:
        raise NotApplicableError("checked on texts only")
    model = build()
    expected = read(generate(model, subject, use_cache=False))
    embeddings = model.get_input_embeddings()(subject.inputs["input_ids"]).detach()
    given = read(generate(model, subject, input_ids=None, inputs_embeds=embeddings))
    return Comparison([given[0], given[1]], [expected[0][:, -NEW_TOKENS:], expected[1]])


def law_quantized_cache(subject: ModeSubject, build: Builder, backend: str, **settings: Any) -> Comparison:
    """A step on a quantized cache gives what it gives on the keys and values that come out of the cache."""
    if find_text(subject) != "input_ids":
        raise NotApplicableError("transformers has no quantized cache for encoder-decoder models")
    model, config = build(), subject.base.config.get_text_config(decoder=True)
    cache, plain = QuantizedCache(backend, config, **settings), DynamicCache()
    with torch.no_grad():
        logits = model(**subject.inputs, past_key_values=cache, use_cache=True).logits
        next_ids = logits[:, -1:].argmax(-1)
        for index, layer in enumerate(cache.layers):
            states = (layer._dequantize(item) for item in (layer._quantized_keys, layer._quantized_values))
            plain.update(*states, index)
        expected = model(input_ids=next_ids, past_key_values=plain, use_cache=True).logits
        given = model(input_ids=next_ids, past_key_values=cache, use_cache=True).logits
    cache_settings = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **settings}}
    generated = read(generate(model, subject, **cache_settings))
    by_object = read(generate(model, subject, past_key_values=QuantizedCache(backend, config, **settings)))
    if backend == "fp8":
        # It rounds the states of the new token as well.
        return Comparison(generated, by_object)
    return Comparison([given, *generated], [expected, *by_object])


class ListStreamer:
    """Keeps the tokens that `generate` hands out, for one row."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class WordTokenizer:
    """Writes token ids as words, which is all that streamers of text ask for."""

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return "".join(f"{int(token)} " for token in ids)


def law_streaming(subject: ModeSubject, build: Builder) -> Comparison:
    """The streamed tokens are those returned, and those of recomputation."""
    subject, model, streamer = one_row(subject), build(), ListStreamer()
    expected = read(generate(model, subject, use_cache=False))
    returned = read(generate(model, subject, streamer=streamer))
    return Comparison([*returned, torch.tensor(streamer.tokens)], [*expected, expected[0][0]])


def law_text_streamer(subject: ModeSubject, build: Builder) -> Comparison:
    """The text of a `TextStreamer` is that of the tokens."""
    words: list[str] = []

    class Recorder(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            words.extend(text.split())

    subject, model = one_row(subject), build()
    expected = read(generate(model, subject, use_cache=False))
    returned = read(generate(model, subject, streamer=Recorder(WordTokenizer())))  # type: ignore[arg-type]
    return Comparison([*returned, torch.tensor([int(word) for word in words])], [*expected, expected[0][0]])


def law_iterator_streamer(subject: ModeSubject, build: Builder) -> Comparison:
    """Generation in another thread, read through a `TextIteratorStreamer`."""
    subject, model = one_row(subject), build()
    expected = read(generate(model, subject, use_cache=False))
    streamer = TextIteratorStreamer(WordTokenizer(), timeout=30)  # type: ignore[arg-type]
    errors: list[Exception] = []
    returned: list[Tensor] = []

    def work() -> None:
        try:
            returned.extend(read(generate(model, subject, streamer=streamer)))
        except Exception as error:
            errors.append(error)
            streamer.end()

    thread = threading.Thread(target=work)
    thread.start()
    words = "".join(streamer).split()
    thread.join()
    if errors:
        raise errors[0]
    return Comparison([*returned, torch.tensor([int(word) for word in words])], [*expected, expected[0][0]])


def law_continuous_batching(subject: ModeSubject, build: Builder) -> Comparison:
    """Every request of `generate_batch` gets the tokens that it gets alone."""
    if subject.group != "causal":
        raise NotApplicableError("`generate_batch` is for causal language models")
    model = build()
    requests = [row[:length].tolist() for row, length in zip(subject.inputs["input_ids"], (7, 4), strict=True)]
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = []
    for request in requests:
        row = torch.tensor([request])
        tokens = model.generate(input_ids=row, **settings, use_cache=False)
        logits = run(model, {"input_ids": tokens}, use_cache=False)[0, len(request) - 1 : -1]
        expected += [tokens[0, len(request) :], logits.log_softmax(-1).max(-1).values]
    outputs = model.generate_batch(
        requests,
        generation_config=GenerationConfig(**settings, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=4, num_blocks=24, max_batch_tokens=12, auto_switch_to_flash=False, return_logprobs=True
        ),
        progress_bar=False,
    )
    if len(outputs) != len(requests):
        raise ValueError(f"{len(outputs)} of {len(requests)} requests were answered")
    ordered = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[-1]))
    given = [torch.tensor(item) for output in ordered for item in (output.generated_tokens, output.logprobs)]
    return Comparison(given, expected)


def law_compiled_generation(subject: ModeSubject, build: Builder) -> Comparison:
    """Compiled decoding on a static cache gives the tokens of recomputation; the note is the number of graphs."""
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(backend=count, mode=None)
    compile_config._compile_all_devices = True
    torch.compiler.reset()
    try:
        settings = {"cache_implementation": "static", "compile_config": compile_config}
        comparison = compare_generation(subject, build, settings)
    finally:
        torch.compiler.reset()
    if not graphs:
        raise NotApplicableError("transformers did not compile it")
    return comparison._replace(note=f"{len(graphs)} graphs")
