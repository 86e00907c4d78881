"""Training in bfloat16 on processors without instructions for it.

There the products of bfloat16 matrices take 8 to 40 times as long as those of float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from peft_prefix_plus.base_models import computes_in_bfloat16

# What multiplies matrices, and how many of its results have the dtype of its inputs.
_PRODUCTS = {
    "mm": 1,
    "addmm": 1,
    "bmm": 1,
    "_scaled_dot_product_flash_attention_for_cpu": 1,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}
_library: torch.library.Library | None = None


def multiply_in_float32() -> bool:
    """Let products of bfloat16 matrices on the CPU be computed in float32 and rounded, if the processor needs it.

    Products of two bfloat16 numbers are exact in float32, where kernels for bfloat16 add them up as well: results
    differ in the order of additions, and in attention, whose kernel rounds probabilities. It holds for the whole
    process.

    Returns:
        `bool`: whether the processor needs it.
    """
    global _library
    if computes_in_bfloat16():
        return False
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        for name, count in _PRODUCTS.items():
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            _library.impl(name, partial(_multiply, kernel.call_boxed, count), "CPU", with_keyset=True)
    return True


def _multiply(kernel: Callable[..., Any], count: int, keys: Any, *args: Any, **kwargs: Any) -> Any:
    if args[0].dtype is not torch.bfloat16:
        return kernel(keys, *args, **kwargs)
    args, kwargs = tree_map_only(torch.Tensor, _widen, (args, kwargs))
    results = kernel(keys, *args, **kwargs)
    if isinstance(results, torch.Tensor):
        return results.bfloat16()
    return (*(result.bfloat16() for result in results[:count]), *results[count:])


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor
