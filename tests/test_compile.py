"""`torch.compile` without graph breaks, from the first call on."""

from concurrent.futures import ThreadPoolExecutor

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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_second_forward_of_a_thread_is_not_compiled_again(name):
    model, ids = add_prefix(build_model(name)), draw_tokens()
    torch.compiler.reset()
    compiled = torch.compile(model.get_base_model(), backend="eager")

    @torch.no_grad()
    def run_twice():
        compiled(ids)
        with torch.compiler.set_stance("fail_on_recompile"):
            return compiled(ids).logits

    with ThreadPoolExecutor(1) as threads:
        assert_close(threads.submit(run_twice).result(), model(ids).logits)
