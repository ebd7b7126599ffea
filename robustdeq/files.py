"""Writing files so that no reader ever meets half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from robustdeq.errors import UsageError


def write_atomically(path: Path, payload: bytes) -> None:
    """Write to a temporary file beside `path`, sync, and rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        UsageError: if it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise UsageError(
            f"folder {path} cannot be created ({cause.strerror}); name another."
        ) from cause
    if not os.access(path, os.W_OK):
        raise UsageError(f"folder {path} cannot be written to; name another.")
