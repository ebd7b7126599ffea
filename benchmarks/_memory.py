"""The most memory that some work takes beyond what was there before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(run: Callable[[], Result], device: torch.device) -> tuple[float | None, Result]:
    """MiB at the most, and the result.

    On a GPU what torch hands out; elsewhere resident memory of the process, after what it has no
    use for was given back. None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20, result
    resident = _begun()
    result = run()
    return None if resident is None else max(_read("VmHWM") - resident, 0) / 1024, result


def _begun() -> int | None:
    """Resident KiB, from which on the largest value is kept; None where that cannot be had."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return None
    return _read("VmRSS")


def _read(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
