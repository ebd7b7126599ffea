"""Checkpoints: where a training stands, so that a kill or a time budget costs little."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import torch

from robustdeq.errors import CaseError
from robustdeq.files import write_atomically

SECONDS = 15.0
"""Between checkpoints: the most that a kill costs."""


class Checkpoint:
    """A file that holds one training's state, and says whose it is.

    Args:
        identity: a digest of all that decides the weights; another training's file is refused.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self.written = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last write is long enough ago."""
        return time.monotonic() - self.written > SECONDS

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file."""
        payload = io.BytesIO()
        torch.save({"identity": self.identity, **state}, payload)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, payload.getvalue())
        self.written = time.monotonic()

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """What was written; None where there is no file.

        Raises:
            CaseError: if the file is another training's, or cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            held: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
            matches = held["identity"] == self.identity
        except Exception as cause:
            raise CaseError(f"checkpoint {self.path} cannot be read; delete it.") from cause
        if not matches:
            raise CaseError(
                f"checkpoint {self.path} belongs to another training (other parameters, data, seed "
                "or source); delete it, or write to another file."
            )
        return held

    def discard(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
