"""What code does besides returning: prints, files, connections, processes, global settings."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_EVENTS = {
    "os.mkdir": "makes the folder {0}",
    "os.remove": "removes {0}",
    "os.rename": "renames {0}",
    "os.rmdir": "removes the folder {0}",
    "os.system": "runs {0}",
    "shutil.rmtree": "removes the folder {0}",
    "socket.connect": "connects to {1}",
    "subprocess.Popen": "runs {0}",
}


@dataclass(eq=False)
class Traces:
    """What a block left behind: sentences without a subject, as in "writes to log.txt"."""

    acts: list[str] = field(default_factory=list)


_watching: list[Traces] = []


@contextmanager
def watched() -> Iterator[Traces]:
    """Collect what the block does to the world; `acts` is complete when it is left."""
    _listen()
    traces, before, printed = Traces(), _settings(), io.StringIO()
    _watching.append(traces)
    try:
        with contextlib.redirect_stdout(printed):
            yield traces
    finally:
        _watching.remove(traces)
        if printed.getvalue():
            traces.acts.append(f"prints {printed.getvalue().strip()[:40]!r}")
        after = _settings()
        traces.acts += [f"changes {name}" for name in before if before[name] != after[name]]
        torch.set_grad_enabled(before["torch.is_grad_enabled"])
        torch.set_default_dtype(before["torch.get_default_dtype"])
        torch.set_num_threads(before["torch.get_num_threads"])


def _settings() -> dict[str, Any]:
    return {
        "torch.is_grad_enabled": torch.is_grad_enabled(),
        "torch.get_default_dtype": torch.get_default_dtype(),
        "torch.get_num_threads": torch.get_num_threads(),
        "torch.are_deterministic_algorithms_enabled": (
            torch.are_deterministic_algorithms_enabled()
        ),
        "the working folder": os.getcwd(),  # noqa: PTH109 - compared, not joined
    }


@cache
def _listen() -> None:
    """Audit hooks stay for the life of the process; this one sleeps unless a block is watched."""
    sys.addaudithook(_heard)


def _heard(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open" and _writes(*args):
        _watching[-1].acts.append(f"writes to {args[0]}")
    elif event in _EVENTS:
        _watching[-1].acts.append(_EVENTS[event].format(*args))


def _writes(path: Any, mode: Any, flags: Any) -> bool:
    """Whether a file is opened for writing; compiled modules and devices do not count."""
    del mode
    if not isinstance(path, str | bytes | os.PathLike) or not isinstance(flags, int):
        return False
    name = os.fsdecode(path)
    return bool(flags & _WRITING) and "__pycache__" not in name and not name.startswith("/dev/")
