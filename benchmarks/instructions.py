"""How many instructions a processor executes: unlike times, the same again on a machine that others use, too."""

import ctypes
import os
import platform
import struct
from collections.abc import Callable

import torch

# Of linux/perf_event.h and of the table of system calls.
_SYSTEM_CALLS = {"x86_64": 298, "aarch64": 241}
_TYPE_HARDWARE, _COUNT_INSTRUCTIONS = 0, 1
_EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 5, 1 << 6
_SIZE = 112


def count_instructions(run: Callable[[], object]) -> int | None:
    """Instructions that a run executes in user space, computed by a single thread: others wait for it by spinning.

    Args:
        run (`Callable`): should have run before, so that nothing is made for the first time.

    Returns:
        `int`, *optional*: `None` where the system does not count them.
    """
    descriptor = _open_counter()
    if descriptor is None:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        before = _read(descriptor)
        run()
        return _read(descriptor) - before
    finally:
        torch.set_num_threads(threads)
        os.close(descriptor)


def _open_counter() -> int | None:
    """A counter of the calling thread, if there is one."""
    number = _SYSTEM_CALLS.get(platform.machine())
    if platform.system() != "Linux" or number is None:
        return None
    # Type, size, what is counted, period, sample type, read format, flags.
    head = struct.pack(
        "IIQQQQQ", _TYPE_HARDWARE, _SIZE, _COUNT_INSTRUCTIONS, 0, 0, 0, _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR
    )
    attributes = ctypes.create_string_buffer(head, _SIZE)
    this_thread, any_processor, no_group, no_flags = 0, -1, -1, 0
    descriptor: int = ctypes.CDLL(None).syscall(number, attributes, this_thread, any_processor, no_group, no_flags)
    return descriptor if descriptor >= 0 else None


def _read(descriptor: int) -> int:
    (count,) = struct.unpack("Q", os.read(descriptor, 8))
    return int(count)
