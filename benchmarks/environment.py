"""What results of a benchmark depend on besides its settings."""

import platform
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers

import peft_prefix_plus


def list_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    modules = (torch, transformers, peft, accelerate, peft_prefix_plus)
    return {module.__name__: module.__version__ for module in modules} | {"python": platform.python_version()}


def describe_machine() -> dict[str, Any]:
    """What times and memory can be compared on."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
