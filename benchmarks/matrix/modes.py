"""Checks every mode of use on every attention implementation, with one model type for each group of architectures.

A cell passes, or raises an error that the documentation names, or says nothing, with the reason: whether the base
model alone can do it is checked first.
"""

import argparse
import json
import logging
import platform
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import laws_forward
import laws_generation
import laws_quantized
import torch
from checks import ATOL, RTOL, FailedError, NotApplicableError
from laws_forward import Comparison, Law
from laws_generation import HUB_MODES, with_settings
from matrix import time_limit
from mode_subjects import IMPLEMENTATIONS, REPRESENTATIVES, ModeSubject

SECONDS_PER_CELL = 120
# Errors that are documented, by a pattern of their message.
DOCUMENTED = (
    r"Flash kernels take no bias for single keys",
    r"PrefixPlus runs modules without the attention interface uncompiled",
)


@dataclass(frozen=True)
class Mode:
    """A way to use a model.

    Attributes:
        law (`Callable`): compares what it gives to what the plain mode gives.
        title (`str`): for the table.
        only (`frozenset[tuple[str, str]]`, *optional*): the only types and implementations it is checked on.
        reason (`str`): why not on the others.
        shows_effect (`bool`): whether what it gives must differ from what the base model gives.
    """

    law: Law
    title: str
    only: frozenset[tuple[str, str]] | None = None
    reason: str = ""
    shows_effect: bool = True


def _moved_to_hub(subject: ModeSubject, build: Any) -> Comparison:
    raise NotApplicableError(HUB_MODES)


def _only(implementations: Iterable[str], types: Iterable[str] = tuple(REPRESENTATIVES)) -> frozenset[tuple[str, str]]:
    return frozenset((name, implementation) for name in types for implementation in implementations)


LLAMA = _only(["sdpa"], ["llama"])
COMPILED = _only(["eager", "sdpa"]) | _only(["flash", "local", "registered", "switched"], ["llama"])
SLOW_TO_COMPILE = "checked with eager and sdpa, and on Llama with others; flex attention compiles for minutes on a CPU"
ONE_IS_ENOUGH = "checked on Llama with sdpa"

MODES = {
    "forward": Mode(laws_forward.law_forward, "forward"),
    "padding": Mode(laws_forward.law_padding, "left padding"),
    "packing": Mode(laws_forward.law_packing, "packed sequences"),
    "hidden_states": Mode(laws_forward.law_hidden_states, "`output_hidden_states`"),
    "attentions": Mode(laws_forward.law_attentions, "`output_attentions`"),
    "inference_mode": Mode(laws_forward.law_inference_mode, "`torch.inference_mode`"),
    "autocast": Mode(laws_forward.law_autocast, "autocast to bfloat16", shows_effect=False),
    "training": Mode(laws_forward.law_training, "training step", shows_effect=False),
    "checkpointing": Mode(
        partial(laws_forward.law_checkpointing, use_reentrant=False), "gradient checkpointing", shows_effect=False
    ),
    "checkpointing_reentrant": Mode(
        partial(laws_forward.law_checkpointing, use_reentrant=True),
        "gradient checkpointing, reentrant",
        shows_effect=False,
    ),
    "greedy": Mode(with_settings(), "greedy, dynamic cache"),
    "static": Mode(with_settings(cache_implementation="static"), "static cache"),
    "sliding": Mode(with_settings(cache_implementation="sliding_window"), "sliding-window cache"),
    "offloaded": Mode(with_settings(cache_implementation="offloaded"), "offloaded cache"),
    "offloaded_static": Mode(with_settings(cache_implementation="offloaded_static"), "offloaded static cache"),
    "quantized_fp8": Mode(partial(laws_generation.law_quantized_cache, backend="fp8"), "quantized cache, fp8"),
    "quantized_hqq": Mode(
        partial(laws_generation.law_quantized_cache, backend="hqq", axis_key=1, axis_value=1, q_group_size=8),
        "quantized cache, hqq",
    ),
    "quantized_quanto": Mode(
        partial(laws_generation.law_quantized_cache, backend="quanto", q_group_size=8), "quantized cache, quanto"
    ),
    "given_cache": Mode(laws_generation.law_given_cache, "cache of the caller"),
    "encoder_decoder_cache": Mode(laws_generation.law_encoder_decoder_cache, "`EncoderDecoderCache`"),
    "chunked_prefill": Mode(with_settings(prefill_chunk_size=3), "`prefill_chunk_size`"),
    "continue_forward": Mode(laws_generation.law_continue_forward, "forward on `past_key_values`"),
    "continue_generation": Mode(laws_generation.law_continue_generation, "`generate` on `past_key_values`"),
    "embeddings": Mode(laws_generation.law_embeddings, "`generate` from `inputs_embeds`"),
    "sampling": Mode(with_settings(shared={"do_sample": True, "top_k": 20}), "sampling with a seed"),
    "return_sequences": Mode(
        with_settings(shared={"do_sample": True, "num_return_sequences": 2}), "`num_return_sequences`"
    ),
    "beams": Mode(with_settings(shared={"num_beams": 3}), "beams"),
    "beam_sampling": Mode(
        with_settings(shared={"num_beams": 3, "num_return_sequences": 2, "do_sample": True}), "beams with sampling"
    ),
    "group_beams": Mode(_moved_to_hub, "group beams"),
    "contrastive": Mode(_moved_to_hub, "contrastive search"),
    "dola": Mode(_moved_to_hub, "DoLa"),
    "constrained_beams": Mode(_moved_to_hub, "constrained beams"),
    "assisted": Mode(partial(laws_generation.law_assisted, has_prefix=False), "assisted by another model"),
    "assisted_same": Mode(partial(laws_generation.law_assisted, has_prefix=True), "assisted by the same adapter"),
    "early_exit": Mode(laws_generation.law_early_exit, "`assistant_early_exit`"),
    "prompt_lookup": Mode(laws_generation.law_prompt_lookup, "prompt lookup"),
    "streaming": Mode(laws_generation.law_streaming, "streamer"),
    "text_streamer": Mode(laws_generation.law_text_streamer, "`TextStreamer`"),
    "iterator_streamer": Mode(laws_generation.law_iterator_streamer, "`TextIteratorStreamer`, in a thread"),
    "continuous_batching": Mode(laws_generation.law_continuous_batching, "`generate_batch`"),
    "compile": Mode(laws_forward.law_compile, "`torch.compile`", COMPILED, SLOW_TO_COMPILE),
    "fullgraph": Mode(laws_forward.law_fullgraph, "`torch.compile(fullgraph=True)`", COMPILED, SLOW_TO_COMPILE),
    "compiled_generation": Mode(
        laws_generation.law_compiled_generation, "compiled generation, static cache", COMPILED, SLOW_TO_COMPILE
    ),
    "inductor": Mode(laws_forward.law_inductor, "training step by inductor", LLAMA, ONE_IS_ENOUGH, shows_effect=False),
    "export": Mode(laws_forward.law_export, "`torch.export`, folded", COMPILED, SLOW_TO_COMPILE),
    "data_parallel": Mode(laws_forward.law_data_parallel, "`DataParallel` without a GPU"),
    "deepcopy": Mode(laws_forward.law_deepcopy, "`copy.deepcopy`"),
    "pickle": Mode(laws_forward.law_pickle, "`pickle`"),
    "torch_save": Mode(laws_forward.law_torch_save, "`torch.save` of the model"),
    **{
        f"base_{name}{suffix}": Mode(
            partial(law, quantize=quantize),
            title + addition,
            _only(["eager", "sdpa"], ["llama"]),
            "checked on Llama with eager and sdpa",
            shows_effect=not suffix,
        )
        for name, title, quantize in (
            ("bitsandbytes", "base in 4 bits, bitsandbytes", laws_quantized.quantize_bitsandbytes),
            ("torchao", "base in 8 bits, torchao", laws_quantized.quantize_torchao),
            ("hqq", "base in 4 bits, HQQ", laws_quantized.quantize_hqq),
            ("quanto", "base in 8 bits, quanto", laws_quantized.quantize_quanto),
            ("gguf", "GGUF base kept packed (LFM2, stand-in kernel)", None),
        )
        for suffix, addition, law in (
            ("", "", laws_quantized.law_quantized_base),
            ("_training", ", training step", laws_quantized.law_quantized_training),
        )
    },
}

Cell = tuple[str, str, str]
CELLS: list[Cell] = [(name, key, mode) for name in REPRESENTATIVES for key in IMPLEMENTATIONS for mode in MODES]


def run_cell(name: str, implementation: str, mode_name: str) -> str:
    """Check one mode of one type on one implementation.

    Args:
        name (`str`): a key of `REPRESENTATIVES`.
        implementation (`str`): a key of `IMPLEMENTATIONS`.
        mode_name (`str`): a key of `MODES`.

    Returns:
        `str`: `"pass"`, perhaps with a note; `"error: message"`, which is documented; `"n/a: reason"` or
        `"fail: reason"`.
    """
    mode, subject = MODES[mode_name], ModeSubject(REPRESENTATIVES[name], IMPLEMENTATIONS[implementation])
    try:
        if mode.only is not None and (name, implementation) not in mode.only:
            raise NotApplicableError(mode.reason)
        subject.check_applicable()
        with time_limit(SECONDS_PER_CELL), subject.implementation.prepare(subject):
            base = _check_base(mode, subject)
            return _check_prefix(mode, subject, base)
    except NotApplicableError as reason:
        return f"n/a: {reason}"
    except Exception as error:
        documented = re.search(f"({'|'.join(DOCUMENTED)}).*", str(error))
        return f"error: {type(error).__name__}: {documented[0]}" if documented else f"fail: {_first_line(error)}"


def _check_base(mode: Mode, subject: ModeSubject) -> Comparison:
    try:
        base = mode.law(subject, subject.builder(has_prefix=False))
    except NotApplicableError:
        raise
    except Exception as error:
        raise NotApplicableError(f"the base model cannot: {_first_line(error)}") from error
    difference = find_difference(base)
    if difference:
        raise NotApplicableError(f"it does not hold for the base model: {difference}")
    return base


def _check_prefix(mode: Mode, subject: ModeSubject, base: Comparison) -> str:
    comparison = mode.law(subject, subject.builder(has_prefix=True))
    difference = find_difference(comparison)
    if difference:
        raise FailedError(difference)
    if mode.shows_effect and not find_difference(Comparison(comparison.given, base.given)):
        raise FailedError("the prefix has no effect")
    if comparison.note != base.note:
        return f"pass: {comparison.note}" + (f", base model {base.note}" if base.note else "")
    return "pass"


def find_difference(comparison: Comparison) -> str:
    """Say how far the two sides of a comparison are apart; empty if they agree."""
    if len(comparison.given) != len(comparison.expected):
        return f"{len(comparison.given)} results instead of {len(comparison.expected)}"
    for given, expected in zip(comparison.given, comparison.expected, strict=True):
        if given.shape != expected.shape:
            return f"shape {tuple(given.shape)} instead of {tuple(expected.shape)}"
        if not expected.is_floating_point():
            if not torch.equal(given, expected):
                return f"{int((given != expected).sum())} of {given.numel()} numbers differ"
        elif not torch.allclose(given, expected, atol=ATOL, rtol=RTOL):
            return f"differs by {(given - expected).abs().max().item():.1e}"
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def iterate_outcomes(cells: Iterable[Cell]) -> Iterator[tuple[Cell, str, float]]:
    """Run some cells; yields the outcome and the seconds of each."""
    for cell in cells:
        start = time.monotonic()
        outcome = run_cell(*cell)
        yield cell, outcome, time.monotonic() - start


def collect(outcomes: dict[Cell, str]) -> dict[str, Any]:
    """The table as data: versions, what the names mean, and the outcomes by type, implementation and mode."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "peft-prefix-plus")}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for (name, implementation, mode), outcome in outcomes.items():
        rows.setdefault((name, implementation), {})[mode] = outcome
    return {
        "versions": {**versions, "python": platform.python_version()},
        "models": {name: representative.title for name, representative in REPRESENTATIVES.items()},
        "implementations": {name: implementation.title for name, implementation in IMPLEMENTATIONS.items()},
        "modes": {name: mode.title for name, mode in MODES.items()},
        "rows": [{"model": key[0], "implementation": key[1], "outcomes": row} for key, row in rows.items()],
    }


def write_outcomes(path: Path, outcomes: dict[Cell, str]) -> None:
    """Write the table, one row of one type and implementation a line."""
    data = collect(outcomes)
    rows = ",\n".join("  " + json.dumps(row) for row in data.pop("rows"))
    path.write_text(f'{json.dumps(data, indent=1)[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def read_outcomes(path: Path) -> dict[Cell, str]:
    """The inverse of [`collect`], from a file."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {
        (row["model"], row["implementation"], mode): outcome
        for row in rows
        for mode, outcome in row["outcomes"].items()
    }


def format_table(outcomes: dict[Cell, str], implementation: str) -> str:
    """The table of one implementation: modes down, types across."""
    marks = {"pass": "+", "erro": "e", "n/a:": ".", "fail": "X"}
    names = [name for name in REPRESENTATIVES if any(key[:2] == (name, implementation) for key in outcomes)]
    width = max(map(len, MODES)) + 2
    lines = [f"{implementation}: {' '.join(f'{i}={name}' for i, name in enumerate(names))}"]
    lines.append(" " * width + " ".join(f"{i:2}" for i in range(len(names))))
    for mode in MODES:
        cells = [outcomes.get((name, implementation, mode)) for name in names]
        if any(cells):
            lines.append(f"{mode:{width}}" + " ".join(f" {marks[cell[:4]] if cell else ' '}" for cell in cells))
    return "\n".join(lines)


def summarize(outcomes: dict[Cell, str]) -> str:
    """How often there was each kind of outcome, and why the cells that do not pass do not."""
    lines = [str(dict(Counter(outcome.partition(":")[0] for outcome in outcomes.values())))]
    reasons: dict[str, list[Cell]] = {}
    for cell, outcome in outcomes.items():
        if outcome != "pass":
            reasons.setdefault(outcome, []).append(cell)
    for outcome, cells in sorted(reasons.items()):
        where = ", ".join("/".join(cell) for cell in cells[:3]) + (", ..." if len(cells) > 3 else "")
        lines.append(f"{len(cells):4} {outcome}  ({where})")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(REPRESENTATIVES), choices=REPRESENTATIVES)
    parser.add_argument("--implementations", nargs="*", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--output", type=Path, help="JSON; cells in it that do not run now are kept")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every cell")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    cells = [
        (name, implementation, mode)
        for name, implementation, mode in CELLS
        if name in arguments.models and implementation in arguments.implementations and mode in arguments.modes
    ]
    outcomes: dict[Cell, str] = {}
    for cell, outcome, seconds in iterate_outcomes(cells):
        outcomes[cell] = outcome
        if arguments.verbose or outcome.startswith("fail"):
            print(f"{'/'.join(cell):60} {seconds:5.1f} s  {outcome}", flush=True)
    for implementation in arguments.implementations:
        print(format_table(outcomes, implementation), end="\n\n")
    print(summarize(outcomes))
    if arguments.output:
        known = read_outcomes(arguments.output) if arguments.output.exists() else {}
        merged = {cell: (known | outcomes)[cell] for cell in CELLS if cell in known or cell in outcomes}
        write_outcomes(arguments.output, merged)


if __name__ == "__main__":
    main()
