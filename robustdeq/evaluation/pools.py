"""What other rows found for the same samples: the material of the second phase's transfer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from robustdeq.records import Record, broken
from robustdeq.shapes import Images
from robustdeq.targets import Pool


@dataclass(frozen=True, eq=False)
class RowPool:
    """One row's adversarial examples for the samples of one chunk.

    Attributes:
        name: the row's ID.
        pixels: float32 bytes per index of the data set, of the example that first broke it.
    """

    name: str
    pixels: Mapping[int, bytes]

    @property
    def content_digest(self) -> str:
        """SHA-256 over name, indices and pixels: part of the key of what consumes the pool."""
        sha = hashlib.sha256(self.name.encode())
        for index in sorted(self.pixels):
            sha.update(f"|{index}|".encode() + self.pixels[index])
        return sha.hexdigest()

    def pool(self, x: Images, indices: Sequence[int]) -> Pool:
        """The examples as an attack sees them, beside the batch `x` of these indices."""
        examples = x.clone()
        for place, index in enumerate(indices):
            if index in self.pixels:
                flat = np.frombuffer(self.pixels[index], dtype="<f4").reshape(x.shape[1:])
                examples[place] = torch.from_numpy(flat.copy()).to(x)
        held = torch.tensor([index in self.pixels for index in indices], device=x.device)
        return Pool(self.name, examples, held)


def row_pool(name: str, keys: Sequence[str], read: Callable[[str], Record | None]) -> RowPool:
    """The pool of one row's chunk, from the records of its own attacks, the first break first."""
    pixels: dict[int, bytes] = {}
    for key in keys:
        record = read(key)
        if record is None or record.meta.kind != "attack":
            continue
        rows = record.rows[broken(record.rows)]
        for index, example in zip(rows["index"], rows["adversarial"], strict=True):
            pixels.setdefault(int(index), bytes(example))
    return RowPool(name, pixels)
