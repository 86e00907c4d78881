"""How well a causal language model does on examples, in figures."""

import math
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .examples import Example
from .inference import compute_loss, generate_texts
from .metrics import compute_text_metrics


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 16,
    max_length: int = 1024,
    show_progress: bool = False,
    **generation_kwargs: object,
) -> tuple[dict[str, float], list[str]]:
    """Measure loss, perplexity, BLEU, chrF and ROUGE-L.

    Args:
        model, tokenizer, examples, batch_size, max_length, show_progress: see [`compute_loss`].
        **generation_kwargs: see [`generate_texts`].

    Returns:
        `tuple[dict[str, float], list[str]]`: the scores by name, and the generated texts.
    """
    loss = compute_loss(model, tokenizer, examples, batch_size, max_length, show_progress)
    prompts = [example.prompt for example in examples]
    texts = generate_texts(model, tokenizer, prompts, batch_size, show_progress, **generation_kwargs)
    scores = compute_text_metrics(texts, [example.references for example in examples])
    return {"loss": loss, "perplexity": math.exp(loss), **scores}, texts
