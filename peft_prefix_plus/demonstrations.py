"""Training examples written out as a few-shot prompt, for a prefix to start from."""

import random
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .examples import Example
from .inference import compute_loss

# Longer than any input: a prompt that was cut would be judged by what is left of it.
_NO_LIMIT = 2**31


def write_demonstrations(examples: Sequence[Example], count: int, seed: int = 0) -> str:
    """Write some examples one behind the other: a few-shot prompt for a prefix to start from.

    Args:
        examples (`Sequence[Example]`): to choose from.
        count (`int`): how many, drawn without replacement.
        seed (`int`): of the draw, default 0.

    Returns:
        `str`: the prompt, the first reference and a line break of each.

    Raises:
        ValueError: if there are fewer examples.
    """
    if not 0 <= count <= len(examples):
        raise ValueError(f"`count` must be between 0 and the {len(examples)} examples there are, got {count}.")
    drawn = random.Random(seed).sample(list(examples), count)
    return "".join(f"{example.prompt}{example.references[0]}\n" for example in drawn)


def choose_demonstrations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    count: int,
    text: str = "",
    num_draws: int = 8,
    num_probes: int = 16,
    seed: int = 0,
    batch_size: int = 8,
) -> str:
    """Draw examples several times, and keep those after which a model does best on other examples.

    Nothing is trained: a prefix that starts from the text begins with the loss that is measured here. At most
    `num_draws * num_probes` inputs go through the model.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        examples (`Sequence[Example]`): to choose from, and to measure on.
        count (`int`): how many are written.
        text (`str`): what stands behind them, such as an instruction.
        num_draws (`int`): how many sets of examples are compared.
        num_probes (`int`): on how many other examples, the first reference of each; fewer if there are not so many.
        seed (`int`): of the draws, default 0.
        batch_size (`int`): inputs per forward.

    Returns:
        `str`: the examples as [`write_demonstrations`] writes them, and `text`.

    Raises:
        ValueError: if nothing is to be drawn, or no example is left to measure on.
    """
    if num_draws < 1 or num_probes < 1:
        raise ValueError(f"`num_draws` and `num_probes` must be at least 1, got {num_draws} and {num_probes}.")
    if count >= len(examples):
        raise ValueError(
            f"`count` is {count}, but there are {len(examples)} examples: none is left to measure on. Use "
            "`write_demonstrations`, which measures nothing, or fewer."
        )
    shuffled = random.Random(seed).sample(list(examples), len(examples))
    num_probes = min(num_probes, len(examples) - count)
    probes, others = shuffled[:num_probes], shuffled[num_probes:]
    candidates = [write_demonstrations(others, count, seed + draw) + text for draw in range(num_draws)]

    def measure(candidate: str) -> float:
        prompted = [Example(candidate + probe.prompt, probe.references[:1]) for probe in probes]
        return compute_loss(model, tokenizer, prompted, batch_size, _NO_LIMIT)

    return min(candidates, key=measure)
