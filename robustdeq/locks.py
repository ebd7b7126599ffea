"""One writer a folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from robustdeq.errors import StorageError, UsageError

_LOCK, _HOLDER = ".lock", ".lock-holder.json"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; the system gives it back when the process dies, however it dies.

    Raises:
        UsageError: if another process holds it; the sentence says which, on which machine.
        StorageError: if no lock can be taken there.
    """
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"folder {folder} is in use by {_holder(folder)}; wait until that has ended, or name "
            "another with --out."
        ) from None
    except (OSError, NotImplementedError) as cause:
        raise StorageError(
            f"folder {folder} cannot be locked ({cause}); name another with --out."
        ) from cause
    try:
        own = {"process": os.getpid(), "host": socket.gethostname()}
        with suppress(OSError):
            (folder / _HOLDER).write_text(json.dumps(own), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        held = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f"process {int(held['process'])} on {held['host']!s:.64}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
