"""Regular expressions: what people write is accepted, what could take forever is refused."""

import re
import time

import pytest

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.patterns import check_pattern

ACCEPTED = [
    "self_attn",
    r".*\.(0|1)\.attn",
    r"layers\.\d+\.self_attn",
    r"model\.layers\.([0-9]|1[0-5])\.self_attn",
    r".*(encoder|decoder)\..*\.(self_attn|encoder_attn)",
    r"(.*\.)?h\.(0|2|4|6|8|10)\.attn",
    r"(?!vision).*self_attn",
    "|".join(f"model.layers.{i}.self_attn" for i in range(200)),
    r"(a|b){2}\d{1,3}",
    "a++b*+",
]
REFUSED = [
    r"(a+)+$",
    r"(.*)*x",
    r"(a|a)*b",
    r"(a|ab)(c|bcd)" * 20,
    r"(?:.*\.)+!",
    r".*.*.*.*.*.*!",
    r"(.?){60}!",
    "a?" * 40 + "a" * 40,
    r"(?=(a+)+b)x",
    r"((((a{1,40}){1,40}){1,40}){1,40})b",
    r"(x+x+)+y",
]


@pytest.mark.parametrize("pattern", ACCEPTED, ids=lambda pattern: pattern[:30])
def test_usual_patterns_are_accepted(pattern):
    check_pattern("target_modules", pattern)
    PrefixPlusConfig(target_modules=pattern, num_virtual_tokens_pattern={pattern: 3})


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:30])
def test_patterns_that_could_take_forever_are_refused(pattern):
    for settings in (
        {"target_modules": pattern},
        {"exclude_modules": pattern},
        {"num_virtual_tokens_pattern": {pattern: 3}},
        {"layers_pattern": pattern, "layers_to_transform": [0]},
    ):
        with pytest.raises(ValueError, match=r"very long to match.*name the modules"):
            PrefixPlusConfig(**settings)


def test_the_slowest_accepted_pattern_takes_seconds():
    check_pattern("target_modules", ".*.*.*.*!")
    start = time.process_time()
    assert re.fullmatch(".*.*.*.*!", "a" * 64) is None
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "pattern", ["(", "*", "a{99999999999999}", "(" * 2000 + ")" * 2000, 5, None, b"a"], ids=lambda p: repr(p)[:20]
)
def test_what_is_no_pattern_is_named(pattern):
    with pytest.raises(ValueError, match=r"`target_modules` has .* not a regular expression"):
        check_pattern("target_modules", pattern)


@pytest.mark.parametrize("pattern", ["(?P<idx>1)", "(?i)layers"])
def test_a_pattern_must_fit_into_the_expression_around_it(pattern):
    with pytest.raises(ValueError, match="not a regular expression"):
        PrefixPlusConfig(layers_pattern=pattern, layers_to_transform=[0])
