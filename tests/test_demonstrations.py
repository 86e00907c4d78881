"""Examples become a few-shot prompt; those that are chosen are the ones that help."""

import pytest
from tiny_models import build_chat_tokenizer, build_model

from peft_prefix_plus.demonstrations import choose_demonstrations, write_demonstrations
from peft_prefix_plus.examples import Example
from peft_prefix_plus.inference import compute_loss

EXAMPLES = [Example(f"{number}:", (f"a{number}", f"b{number}")) for number in range(9)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_chat_tokenizer()


@pytest.fixture
def model(tokenizer):
    return build_model("llama", vocab_size=len(tokenizer))


def test_demonstrations_are_examples_as_they_are_trained_on():
    examples = [Example(f"{number}:", (f"a{number}", f"b{number}")) for number in range(5)]
    assert write_demonstrations(examples, 0) == ""
    texts = {f"{number}:a{number}" for number in range(5)}
    assert set(write_demonstrations(examples, 5).splitlines()) == texts
    first = write_demonstrations(examples, 2)
    assert first == write_demonstrations(examples, 2) != write_demonstrations(examples, 2, seed=1)
    with pytest.raises(ValueError, match="between 0 and the 5 examples"):
        write_demonstrations(examples, 6)


def test_the_chosen_demonstrations_have_the_least_loss_on_examples_that_are_not_among_them(model, tokenizer):
    def choose(count, num_draws):
        return choose_demonstrations(model, tokenizer, EXAMPLES, count, "Add:\n", num_draws, num_probes=4)

    def find_written(text):
        return [example for example in EXAMPLES if f"{example.prompt}{example.references[0]}\n" in text]

    # Five can be written, so these are all that are not measured on.
    probes = [example for example in EXAMPLES if example not in find_written(choose(5, 1))]
    assert len(probes) == 4
    starts = [choose(2, num_draws) for num_draws in range(1, 7)]
    losses = []
    for start in starts:
        assert start.endswith("\nAdd:\n")
        written = find_written(start)
        assert len(written) == 2 and not any(example in probes for example in written)
        prompted = [Example(start + probe.prompt, probe.references[:1]) for probe in probes]
        losses.append(compute_loss(model, tokenizer, prompted))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert choose(2, 6) == starts[-1]


def test_few_examples_are_enough_to_choose_and_none_are_not(model, tokenizer):
    assert choose_demonstrations(model, tokenizer, EXAMPLES[:3], 2).count("\n") == 2
    for settings in ({"count": 3}, {"count": 1, "num_draws": 0}, {"count": 1, "num_probes": 0}):
        with pytest.raises(ValueError, match=r"num_draws|none is left"):
            choose_demonstrations(model, tokenizer, EXAMPLES[:3], **settings)
