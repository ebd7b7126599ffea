"""The residual cell and the stem that `feedforward`, `deq` and `weight_tied` share.

The cell is z <- relu(u + gain * B(relu(A(z)))). With the operator norms of A and B projected to at
most 1 and gain < 1 it is a contraction, so its fixed point exists, is unique, and is reached by
plain iteration from anywhere: honest ground for a control.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from robustdeq.datasets import DataSpec

SMALL_IMAGE = 16
"""Images of fewer pixels a side get fully connected cells: there convolution only costs time."""


class Residual(nn.Module):
    """B(relu(A(z))), with A and B both linear or both 3x3 convolutions."""

    def __init__(self, shape: tuple[int, ...], inner: int) -> None:
        super().__init__()
        self.shape = shape
        self.first: nn.Linear | nn.Conv2d
        self.second: nn.Linear | nn.Conv2d
        if len(shape) == 1:
            self.first, self.second = nn.Linear(shape[0], inner), nn.Linear(inner, shape[0])
        else:
            self.first = nn.Conv2d(shape[0], inner, 3, padding=1)
            self.second = nn.Conv2d(inner, shape[0], 3, padding=1)
        # Where the power iterations stand: no part of the weights, but of a checkpoint.
        for index, layer in enumerate((self.first, self.second)):
            direction = _first_direction(layer, shape)
            self.register_buffer(f"direction{index}", direction, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """The residual branch at states (batch, *shape)."""
        out: Tensor = self.second(F.relu(self.first(z)))
        return out

    @torch.no_grad()
    def project(self, iterations: int = 3) -> None:
        """Scale both weights to an operator norm of at most 1, by power iteration.

        The direction found is kept between calls, so a few iterations a training step suffice;
        `project(200)` at the end makes it tight.
        """
        for index, layer in enumerate((self.first, self.second)):
            direction = self.get_buffer(f"direction{index}")
            norm, following = _operator_norm(layer, direction, iterations)
            direction.copy_(following)
            if norm > 1:
                layer.weight.div_(norm)

    @torch.no_grad()
    def norms(self, iterations: int = 500) -> tuple[float, float]:
        """The two operator norms, by power iteration from a fixed direction."""
        pair = [
            float(_operator_norm(layer, _first_direction(layer, self.shape), iterations)[0])
            for layer in (self.first, self.second)
        ]
        return pair[0], pair[1]


def _first_direction(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    width = layer.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, width, *shape[1:]), generator=generator).to(layer.weight)


def _operator_norm(
    layer: nn.Linear | nn.Conv2d, v: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """The norm of the linear part, with zero padding as it is applied, and its right vector."""
    weight = layer.weight
    v = v / v.norm()
    norm = v.new_zeros(())
    for _ in range(iterations):
        if isinstance(layer, nn.Linear):
            u = F.linear(v, weight)
            w = F.linear(u, weight.t())
        else:
            u = F.conv2d(v, weight, padding=1)
            w = F.conv_transpose2d(u, weight, padding=1)
        square = w.norm()
        norm = square.sqrt()
        v = w / square.clamp_min(1e-30)
    return norm, v


class Stem(nn.Module):
    """From an image in [0, 1] to an injection: normalization, then linear or strided convolutions.

    `halvings` strided convolutions, the first 5x5 and the others 3x3, with a ReLU between them; a
    small image is flattened and mapped linearly instead.
    """

    def __init__(self, data: DataSpec, width: int, halvings: int) -> None:
        super().__init__()
        self.flat = min(data.height, data.width) < SMALL_IMAGE
        self.layers = nn.ModuleList()
        if self.flat:
            self.layers.append(nn.Linear(data.channels * data.height * data.width, width))
            self.shape: tuple[int, ...] = (width,)
            return
        channels, height, across = data.channels, data.height, data.width
        for k in range(halvings):
            kernel = 3 if k else 5
            self.layers.append(nn.Conv2d(channels, width, kernel, stride=2, padding=kernel // 2))
            channels, height, across = width, (height + 1) // 2, (across + 1) // 2
        self.shape = (width, height, across)

    def forward(self, x: Tensor) -> Tensor:
        """The injection (batch, *shape)."""
        h = 2.0 * x - 1.0
        h = h.flatten(1) if self.flat else h
        for k, layer in enumerate(self.layers):
            h = layer(F.relu(h)) if k else layer(h)
        return h


def readout(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """A linear map from the flattened state to logits."""
    return nn.Sequential(nn.Flatten(1), nn.Linear(math.prod(shape), classes))
