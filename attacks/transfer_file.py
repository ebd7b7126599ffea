"""Stored adversarial examples, tried on a model."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from robustdeq.attacks.transfer import Runs, at_least, relayed
from safetensors.torch import load as load_safetensors
from torch import Tensor

from robustdeq.errors import UsageError, sentence
from robustdeq.interfaces import Access, Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Pool, Target
from robustdeq.threats import Threat

SUFFIXES = (".safetensors", ".npz")


@dataclass(frozen=True, kw_only=True)
class TransferFile:
    """Examples from a file: "x" (n, channels, height, width) in [0, 1], "index" (n,) of integers.

    `index` says which image of the data set each example belongs to; one image may have several,
    and images without one keep their clean input. Treated as other rows' examples are: scaled and
    projected to the ball, so the file may have been made for another threat.

    Attributes:
        path: a `.safetensors` or `.npz` file; pickles are refused.
        sha256: of the file's bytes, hexadecimal; checked before they are looked into.
        polish: steps of an ascent through the model from the best candidate.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    path: str = ""
    sha256: str = ""
    polish: int = 0

    def __post_init__(self) -> None:
        at_least("transfer_file", 0, polish=self.polish)
        if Path(self.path).suffix not in SUFFIXES:
            raise UsageError(
                f"transfer_file has path={self.path!r}; name a {' or '.join(SUFFIXES)} file."
            )
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise UsageError(
                f"transfer_file has sha256={self.sha256!r}; give the 64 hexadecimal digits that "
                f"'sha256sum {self.path}' prints."
            )

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`.

        Raises:
            UsageError: for a file that is missing, has other bytes than those that were named, or
                does not hold such examples for such images.
        """
        examples, index = self._stored()
        if examples.shape[1:] != x.shape[1:]:
            raise UsageError(
                f"{self.path} holds examples of shape {tuple(examples.shape[1:])}, the images are "
                f"{tuple(x.shape[1:])}; name a file made for this data set."
            )
        pools = _pools(examples.to(x), index.tolist(), x, rng.indices)
        return relayed(Runs(target, x, y, threat, rng), pools, self.polish)

    def _stored(self) -> tuple[Tensor, Tensor]:
        """The examples and their indices, of the types that they must have."""
        held = self._opened()
        missing = [name for name in ("x", "index") if not isinstance(held.get(name), Tensor)]
        if missing:
            raise UsageError(f"{self.path} holds no array {missing[0]!r}, only {sorted(held)}.")
        x, index = held["x"], held["index"]
        if x.dim() != 4 or not x.is_floating_point():
            raise UsageError(
                f"{self.path} holds x of shape {tuple(x.shape)} and type {x.dtype}; store "
                "floating-point images (n, channels, height, width) in [0, 1]."
            )
        if index.shape != x.shape[:1] or index.is_floating_point() or index.is_complex():
            raise UsageError(
                f"{self.path} holds index of shape {tuple(index.shape)} and type {index.dtype}; "
                f"store {len(x)} integers, the images' places in the data set."
            )
        return x, index

    def _opened(self) -> dict[str, Any]:
        payload = self._bytes()
        try:
            if self.path.endswith(".safetensors"):
                return dict(load_safetensors(payload))
            with np.load(io.BytesIO(payload), allow_pickle=False) as stored:
                return {name: _tensor(stored[name]) for name in stored.files}
        except Exception as cause:  # NumPy, zip and safetensors raise many types on foreign bytes
            raise UsageError(
                f"{self.path} cannot be read ({sentence(cause)}); store plain arrays as "
                f"{' or '.join(SUFFIXES)}, never pickles."
            ) from cause

    def _bytes(self) -> bytes:
        """The file's bytes, read once, so that what was checked is what is opened."""
        try:
            payload = Path(self.path).read_bytes()
        except OSError as cause:
            raise UsageError(
                f"{self.path} cannot be read ({cause.strerror}); name the file of examples."
            ) from cause
        found = hashlib.sha256(payload).hexdigest()
        if found != self.sha256:
            raise UsageError(
                f"{self.path} has sha256 {found[:12]}..., not {self.sha256[:12]}...; fetch the "
                "file again, or correct the parameter."
            )
        return payload


def _tensor(array: Any) -> Any:
    """A NumPy array as a tensor; what is no array of numbers stays as it is."""
    numbers = isinstance(array, np.ndarray) and array.dtype.kind in "fiu"
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) if numbers else array


def _pools(examples: Images, index: list[int], x: Images, wanted: list[int]) -> list[Pool]:
    """One pool for the first example of each image, one for the second, and so on."""
    rows: dict[int, list[int]] = {}
    for row, place in enumerate(index):
        rows.setdefault(place, []).append(row)
    depth = max((len(rows.get(place, ())) for place in wanted), default=0)
    pools = []
    for turn in range(depth):
        held = [len(rows.get(place, ())) > turn for place in wanted]
        images = x.clone()
        for row, place in enumerate(wanted):
            if held[row]:
                images[row] = examples[rows[place][turn]]
        pools.append(Pool(f"file{turn}", images, torch.tensor(held, device=x.device)))
    return pools
