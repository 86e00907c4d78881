"""What a forward, a training step or a copy of a model must give in some mode: the same as the plain one."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from checks import NotApplicableError
from mode_subjects import NUM_VIRTUAL_TOKENS, Builder, ModeSubject, set_implementation, unwrap
from peft import PeftModel
from torch import Tensor, nn

from peft_prefix_plus.architectures import find_position_tables


class Comparison(NamedTuple):
    """What a mode gives, and what the plain mode gives.

    Attributes:
        given (`list[Tensor]`): integers have to be equal, other numbers close.
        expected (`list[Tensor]`): the same shapes.
        note (`str`): something that was measured beside it.
    """

    given: list[Tensor]
    expected: list[Tensor]
    note: str = ""


Law = Callable[[ModeSubject, Builder], Comparison]


def read_logits(output: Any) -> Tensor:
    """The first output, in float32."""
    logits = output.logits if getattr(output, "logits", None) is not None else output[0]
    return logits.detach().float()


def run(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    """Logits of a forward without gradients."""
    with torch.no_grad():
        return read_logits(model(**inputs, **kwargs))


def find_text(subject: ModeSubject) -> str:
    """The name of the tokens that a language model continues."""
    if subject.group not in ("causal", "seq2seq", "multimodal"):
        raise NotApplicableError("no language model")
    return "decoder_input_ids" if "decoder_input_ids" in subject.inputs else "input_ids"


def law_forward(subject: ModeSubject, build: Builder) -> Comparison:
    """The logits are those of the eager implementation."""
    model, plain = build(), build("eager")
    return Comparison([run(model, subject.inputs)], [run(plain, subject.inputs)])


def law_padding(subject: ModeSubject, build: Builder) -> Comparison:
    """Rows that are padded on the left give what each gives alone."""
    if find_text(subject) != "input_ids" or subject.representative.has_image:
        raise NotApplicableError("no text that would be padded on the left")
    model, ids = build(), subject.inputs["input_ids"]
    lengths = [ids.shape[1], ids.shape[1] - 3]
    mask = torch.stack([(torch.arange(ids.shape[1]) >= ids.shape[1] - length).long() for length in lengths])
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if find_position_tables(subject.base) else {}
    logits = run(model, {"input_ids": ids * mask, "attention_mask": mask, **positions})
    rows = [row[-length:][None] for row, length in zip(ids, lengths, strict=True)]
    expected = [run(model, {"input_ids": row, "attention_mask": torch.ones_like(row)})[0] for row in rows]
    return Comparison([row[-length:] for row, length in zip(logits, lengths, strict=True)], expected)


def law_packing(subject: ModeSubject, build: Builder) -> Comparison:
    """Sequences packed into one row, told apart by their positions, give what each gives alone."""
    if find_text(subject) != "input_ids" or subject.representative.has_image:
        raise NotApplicableError("no text that would be packed")
    model, lengths = build(), [5, 7]
    rows = [row[:length][None] for row, length in zip(subject.inputs["input_ids"], lengths, strict=True)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    logits = run(model, {"input_ids": torch.cat(rows, dim=1)}, position_ids=positions, use_cache=False)[0]
    return Comparison(list(logits.split(lengths)), [run(model, {"input_ids": row})[0] for row in rows])


def law_inference_mode(subject: ModeSubject, build: Builder) -> Comparison:
    """A forward in inference mode gives what it gives without gradients, and training goes on afterwards."""
    model, inputs = build(), subject.inputs
    with torch.inference_mode():
        given = read_logits(model(**inputs)).clone()
    gradients = compute_gradients(model, subject.inputs)
    expected = compute_gradients(build(), subject.inputs)
    plain = run(build(), subject.inputs)
    return Comparison([given, *(gradients[name] for name in expected)], [plain, *expected.values()])


def law_autocast(subject: ModeSubject, build: Builder) -> Comparison:
    """Under autocast to bfloat16 the logits are those of float32, but for rounding.

    Rounding may send a token to another expert, so the median token counts.
    """
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        given = run(model, subject.inputs)
    expected = run(model, subject.inputs)
    is_close = ((given - expected).abs().mean(-1) / expected.abs().mean(-1)).median() < 0.05
    return Comparison([is_close.float()], [torch.tensor(1.0)])


def law_hidden_states(subject: ModeSubject, build: Builder) -> Comparison:
    """`output_hidden_states` changes no logits; every layer's states are there, for the tokens only."""
    model = build()
    with torch.no_grad():
        output = model(**subject.inputs, output_hidden_states=True)
    states = [output.get(name) for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")]
    states = [state for group in states if group for state in group]
    if not states:
        raise NotApplicableError("it returns none")
    with torch.no_grad():
        base = subject.build(False)(**subject.inputs, output_hidden_states=True)
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    expected_shapes = [list(state.shape) for name in names for state in base.get(name) or ()]
    return Comparison(
        [read_logits(output), torch.tensor([list(state.shape) for state in states])],
        [run(model, subject.inputs), torch.tensor(expected_shapes)],
    )


def law_attentions(subject: ModeSubject, build: Builder) -> Comparison:
    """`output_attentions` changes no logits; the prefix has the first columns, and with them a row sums to one.

    A module that computes attention by itself returns the columns of the tokens only.
    """
    model = build()
    read = _read_attentions(model, subject)
    if not read:
        raise NotApplicableError("it returns none")
    base = _read_attentions(subject.build(False), subject)
    added = [left.shape[-1] - right.shape[-1] for left, right in zip(read, base, strict=True)]
    has_columns = isinstance(model, PeftModel) and subject.uses_interface
    is_whole = (has_columns or model is unwrap(model)) and "sinks" not in subject.representative.title
    sums = [weights.sum(-1) for weights in read] if is_whole else []
    return Comparison(
        [run(model, subject.inputs, output_attentions=True), torch.tensor(added), *sums],
        [
            run(model, subject.inputs),
            torch.tensor([NUM_VIRTUAL_TOKENS * has_columns] * len(read)),
            *(torch.ones_like(item) for item in sums),
        ],
        "" if subject.uses_interface or model is unwrap(model) else "no columns for the prefix",
    )


def _read_attentions(model: nn.Module, subject: ModeSubject) -> list[Tensor]:
    with torch.no_grad():
        output = model(**subject.inputs, output_attentions=True)
    names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    return [weights for name in names for weights in output.get(name) or () if weights is not None]


def compute_gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of everything that is trained, after one step with the model's own dropout."""
    if not isinstance(model, PeftModel):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    torch.manual_seed(5)
    output = model.train()(**inputs)
    logits = output.logits if getattr(output, "logits", None) is not None else output[0]
    logits.float().square().mean().backward()
    return {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


def compare_gradients(given: dict[str, Tensor], expected: dict[str, Tensor]) -> Comparison:
    """The same parameters have gradients, and the same ones."""
    if given.keys() != expected.keys():
        raise ValueError(f"other parameters have gradients: {sorted(given.keys() ^ expected.keys())[:3]}")
    return Comparison([given[name] for name in expected], list(expected.values()))


def law_training(subject: ModeSubject, build: Builder) -> Comparison:
    """The gradients are those of the eager implementation."""
    models = [build(), build("eager")]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "attention_dropout", "attn_dropout"):
                if isinstance(vars(module).get(name), float):
                    setattr(module, name, 0.0)
    return compare_gradients(*(compute_gradients(model, subject.inputs) for model in models))


def law_checkpointing(subject: ModeSubject, build: Builder, use_reentrant: bool) -> Comparison:
    """Gradient checkpointing changes no gradients."""
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    with torch.random.fork_rng():
        given = compute_gradients(model, subject.inputs)
    return compare_gradients(given, compute_gradients(build(), subject.inputs))


def law_compile(subject: ModeSubject, build: Builder) -> Comparison:
    """A compiled forward gives what the forward gives; the note is its number of graphs."""
    model, graphs = build(), []

    def count(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    try:
        given = run(torch.compile(unwrap(model), backend=count), subject.inputs)
    finally:
        torch.compiler.reset()
    return Comparison([given], [run(unwrap(model), subject.inputs)], f"{len(graphs)} graphs")


def law_fullgraph(subject: ModeSubject, build: Builder) -> Comparison:
    """The forward can be compiled into one graph, from the first call on."""
    model = build()
    torch.compiler.reset()
    try:
        given = run(torch.compile(unwrap(model), backend="eager", fullgraph=True), subject.inputs)
    finally:
        torch.compiler.reset()
    return Comparison([given], [run(unwrap(model), subject.inputs)])


def law_inductor(subject: ModeSubject, build: Builder) -> Comparison:
    """Compiled by inductor, forward and backward give what they give uncompiled."""
    model, plain = build(), build()
    torch.compiler.reset()
    try:
        model.forward = torch.compile(model.forward)
        return compare_gradients(*(compute_gradients(item, subject.inputs) for item in (model, plain)))
    finally:
        torch.compiler.reset()


def law_export(subject: ModeSubject, build: Builder) -> Comparison:
    """A folded model can be exported, with fixed shapes."""
    model = build()
    if isinstance(model, PeftModel):
        model.fold_prefix()
    inputs = dict(subject.inputs)
    if subject.base.can_generate():
        inputs["use_cache"] = False
    expected = run(unwrap(model), inputs)
    with torch.no_grad():
        program = torch.export.export(unwrap(model), args=(), kwargs=inputs, strict=False)
    return Comparison([run(program.module(), inputs)], [expected])


def law_data_parallel(subject: ModeSubject, build: Builder) -> Comparison:
    """Without a GPU, `DataParallel` calls the model."""
    model = build()
    return Comparison([run(nn.DataParallel(model), subject.inputs)], [run(model, subject.inputs)])


def law_deepcopy(subject: ModeSubject, build: Builder) -> Comparison:
    """A copy gives the same, and is a model of its own."""
    model = build()
    expected = run(model, subject.inputs)
    copied = copy.deepcopy(model)
    given = [run(copied, subject.inputs)]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    set_implementation(copied, "eager")
    given.append(run(model, subject.inputs))
    if unwrap(model).config._attn_implementation != subject.implementation.name:
        raise ValueError("the copy shares its configuration with the model")
    return Comparison(given, [expected] * 2)


def law_pickle(subject: ModeSubject, build: Builder) -> Comparison:
    """A pickled model gives the same."""
    model = build()
    return Comparison([run(pickle.loads(pickle.dumps(model)), subject.inputs)], [run(model, subject.inputs)])


def law_torch_save(subject: ModeSubject, build: Builder) -> Comparison:
    """The whole model through `torch.save` gives the same."""
    model, file = build(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return Comparison([run(torch.load(file, weights_only=False), subject.inputs)], [run(model, subject.inputs)])
