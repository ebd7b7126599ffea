"""Random numbers that belong to (attack, sample), not to a batch, a worker or a device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from robustdeq.shapes import PerSample


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts: equal parts, equal seed, on every platform."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class SampleRandom:
    """One generator per sample, so that a sample's draws do not depend on its batch companions.

    Args:
        seed: the suite's seed; library attacks take it as it is.
        label: the name of the attack; two attacks draw different numbers.
        indices: the samples' indices in the data set, in the order of the batch.
    """

    def __init__(self, seed: int, label: str, indices: Sequence[int]) -> None:
        self.seed = seed
        self.label = label
        self.indices = list(indices)
        self._generators = [
            torch.Generator().manual_seed(derived_seed(seed, label, i)) for i in self.indices
        ]

    def take(self, rows: Sequence[int]) -> SampleRandom:
        """The same streams for some rows of the batch; what they draw is drawn for all views."""
        view = SampleRandom(self.seed, self.label, [])
        view.indices = [self.indices[r] for r in rows]
        view._generators = [self._generators[r] for r in rows]
        return view

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [-1, 1], of the shape, type and device of `like` (batch first)."""
        shape = like.shape[1:]
        draws = [torch.rand(shape, generator=g) for g in self._generators]
        return (torch.stack(draws) * 2 - 1).to(like)

    def fraction(self, like: Tensor) -> PerSample:
        """Uniform in [0, 1], one number per sample."""
        draws = [torch.rand((), generator=g) for g in self._generators]
        return torch.stack(draws).to(like)
