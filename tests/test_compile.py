"""`torch.compile` without graph breaks, from the first call on."""

import pytest
import torch
from helpers import add_prefix, draw_tokens
from tiny_models import build_model
from torch.testing import assert_close


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_first_forward_is_one_graph(name):
    model, ids = add_prefix(build_model(name)), draw_tokens()
    torch.compiler.reset()
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    logits = compiled(ids).logits
    assert_close(logits, model(ids).logits)
