"""What plugins print, up to a limit: a benchmark's terminal and disk are not theirs to fill."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LIMIT_BYTES = 64 * 1024
"""Of one process, that is of one chunk: enough for warnings and for finding an error."""


@contextmanager
def bounded_output(limit: int = LIMIT_BYTES) -> Iterator[None]:
    """Within, standard output and error both go to standard error, and end at `limit` bytes.

    At the level of file descriptors, so that what compiled code and child processes print counts.
    """
    kept = os.dup(1), os.dup(2)
    source, sink = os.pipe()
    _flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    pump = threading.Thread(target=_pump, args=(source, kept[1], limit), daemon=True)
    pump.start()
    try:
        yield
    finally:
        _flush()
        for number, file in enumerate(kept, 1):
            os.dup2(file, number)
        pump.join(0.5)  # a child process that lives on may hold the pipe open


def _pump(source: int, out: int, left: int) -> None:
    with suppress(OSError):
        while data := os.read(source, 65536):
            if left > 0:
                os.write(out, data[:left])
                left -= len(data)
                if left <= 0:
                    os.write(out, b"\n(what this process prints from here on is dropped)\n")


def _flush() -> None:
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
