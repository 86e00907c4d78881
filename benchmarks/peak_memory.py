"""The largest memory of this process since a moment, on Linux."""

import ctypes
import gc
from pathlib import Path

_PROCESS = Path("/proc/self")


def reset_peak_memory() -> None:
    """Give free memory back and forget the peak so far; elsewhere than on Linux, do nothing."""
    gc.collect()
    try:
        # Otherwise the memory that an earlier run has freed counts for this one.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        pass


def read_peak_memory() -> int | None:
    """The peak in bytes since the last reset, or `None` if the system does not tell."""
    # A file that cannot be written cannot have been reset, and the peak would be that of the whole process.
    return _read_memory("VmHWM") if (_PROCESS / "clear_refs").exists() else None


def read_memory() -> int | None:
    """The resident memory now, in bytes, or `None` if the system does not tell."""
    return _read_memory("VmRSS")


def _read_memory(name: str) -> int | None:
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
