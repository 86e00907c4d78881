"""What a LoRA user does with PEFT, done with PrefixPlus; benchmarks/behaviours does the same with the other methods."""

import pytest
from behaviours import BEHAVIOURS
from behaviours.methods import METHODS


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_behaviour(name, tmp_path):
    BEHAVIOURS[name].check(METHODS["PrefixPlus"], tmp_path)
