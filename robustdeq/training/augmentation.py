"""Augmentation of training images: none, or the shift and flip that is usual on CIFAR."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from robustdeq.shapes import Images
from robustdeq.suite import Augmentation

SHIFT = 4
"""Most pixels of a shift in either direction; what comes in is black."""


def augmented(x: Images, kind: Augmentation, generator: torch.Generator) -> Images:
    """Each image shifted by up to `SHIFT` pixels and mirrored or not, all at random.

    Args:
        generator: of the CPU, whatever the device of `x`.
    """
    if kind == "none":
        return x
    batch, _, height, width = x.shape
    rows = _window(height, batch, generator, mirrored=torch.zeros(batch, dtype=torch.bool))
    mirrored = torch.rand(batch, generator=generator) < 0.5
    columns = _window(width, batch, generator, mirrored)
    padded = F.pad(x, (SHIFT,) * 4)
    index = torch.arange(batch)[:, None, None, None]
    channel = torch.arange(x.shape[1])[None, :, None, None]
    return padded[index, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _window(size: int, batch: int, generator: torch.Generator, mirrored: Tensor) -> Tensor:
    """(batch, size): which of the padded positions each image shows, in order."""
    first = torch.randint(2 * SHIFT + 1, (batch, 1), generator=generator)
    along = torch.arange(size).expand(batch, size)
    along = torch.where(mirrored[:, None], size - 1 - along, along)
    return first + along
