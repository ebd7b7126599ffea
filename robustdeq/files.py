"""Writing files so that no reader ever meets half of one."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from robustdeq.errors import StorageError, UsageError

_TEMPORARY = "."


def write_atomically(path: Path, payload: bytes) -> None:
    """Write to a temporary file beside `path`, sync, and rename.

    Raises:
        StorageError: if the disk is full, the folder is gone or cannot be written to.
    """
    try:
        _write(path, payload)
    except OSError as cause:
        raise StorageError(
            f"{path} cannot be written ({cause.strerror or cause}); see to the disk and give the "
            "same command again, what is finished is kept."
        ) from cause


def _write(path: Path, payload: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{_TEMPORARY}{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left half done; nobody else may be writing."""
    for torn in folder.glob(f"{_TEMPORARY}*.*.????????"):
        with suppress(OSError):
            torn.unlink()


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
