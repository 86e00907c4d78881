"""Products of bfloat16 matrices that are computed in float32: the exact ones, rounded once."""

import subprocess
import sys

import pytest

from peft_prefix_plus.base_models import computes_in_bfloat16

# Replaced kernels stay replaced, so they are in a process of their own.
SCRIPT = """
import torch
from benchmarks.half_precision import multiply_in_float32

attend = torch.nn.functional.scaled_dot_product_attention

def compute(dtype):
    torch.manual_seed(0)
    shapes = ((32, 16), (16, 24), (1, 2, 7, 8), (1, 2, 7, 8), (1, 2, 7, 8), (24,))
    tensors = [torch.randn(shape).bfloat16().to(dtype).requires_grad_() for shape in shapes]
    left, right, query, key, value, bias = tensors
    outputs = [left @ right, torch.addmm(bias, left, right), torch.bmm(key[0], query[0].mT), attend(query, key, value)]
    gradients = torch.autograd.grad(sum(output.float().square().sum() for output in outputs), tensors)
    return outputs, gradients

before = compute(torch.float32)
assert multiply_in_float32()
for after, exact in zip(compute(torch.bfloat16)[0], before[0]):
    assert after.dtype is torch.bfloat16
    assert torch.equal(after, exact.bfloat16())
for after, exact in zip(compute(torch.bfloat16)[1], before[1]):
    assert after.dtype is torch.bfloat16
    torch.testing.assert_close(after.float(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
for pair in zip(compute(torch.float32), before):
    for after, exact in zip(*pair):
        assert torch.equal(after, exact)
"""


@pytest.mark.skipif(computes_in_bfloat16(), reason="this processor computes in bfloat16")
def test_products_are_those_of_float32_rounded_once():
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], check=True)
