"""Noise that a sample's own pixels decide, so that it depends on no batch and repeats itself."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from robustdeq.randomness import derived_seed
from robustdeq.shapes import Images


def noise_of(x: Images, draws: int, label: str) -> Tensor:
    """Standard normal numbers (draws, batch, channels, height, width).

    Equal pixels under an equal label give equal numbers, on any device.
    """
    shape = (draws, *x.shape[1:])
    drawn = []
    for pixels in x.detach().double().cpu().contiguous():
        content = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        generator = torch.Generator().manual_seed(derived_seed(label, content))
        drawn.append(torch.randn(shape, generator=generator))
    return torch.stack(drawn, 1).to(x) if drawn else x.new_zeros((draws, *x.shape))


def between(x: Images, moved: Tensor) -> Tensor:
    """`moved`, clipped to [0, 1], or as far out as `x` itself lies; broadcasts."""
    return torch.maximum(torch.minimum(moved, x.clamp_min(1.0)), x.clamp_max(0.0))
