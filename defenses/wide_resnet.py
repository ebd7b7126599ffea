"""Explicit control of the field's own kind: a wide residual network, with no iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import DataSpec
from robustdeq.errors import UsageError
from robustdeq.interfaces import About


@dataclass(frozen=True, kw_only=True)
class WideResNet:
    """Pre-activation residual blocks in groups that halve the image, pooled to a linear head.

    The paper's batch norm is replaced by group norm: here a prediction must depend neither on the
    other images of its batch nor on the mode of the model. Otherwise it is the paper's network;
    `groups` and `base` are parameters so that it can be made as small as `deq`, image by image.

    Attributes:
        depth: (2n + 1) * groups + 1 for n blocks a group: 6n + 4 for the paper's three groups.
        widen: factor on the channels of all groups.
        base: channels of the first convolution; group k has base * widen * 2^k.
        groups: the first keeps the image's size, each other halves it.
    """

    about: ClassVar[About] = About(
        "Wide Residual Networks",
        "Sergey Zagoruyko, Nikos Komodakis",
        "BMVC 2016",
        "https://arxiv.org/abs/1605.07146",
    )
    recipe: ClassVar[str] = "pgd_at"

    depth: int = 16
    widen: int = 1
    base: int = 16
    groups: int = 3

    def __post_init__(self) -> None:
        if min(self.widen, self.base, self.groups) < 1:
            raise UsageError(
                f"wide_resnet has widen={self.widen}, base={self.base}, groups={self.groups}; "
                "give at least 1 of each."
            )
        step, least = 2 * self.groups, 3 * self.groups + 1
        if self.depth < least or (self.depth - least) % step:
            depths = ", ".join(str(least + k * step) for k in range(3))
            raise UsageError(
                f"wide_resnet has depth={self.depth}, which {self.groups} equal groups cannot "
                f"have; give {depths} or some steps of {step} more."
            )

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        """See `robustdeq.interfaces.Defense`."""
        blocks = ((self.depth - 1) // self.groups - 1) // 2
        widths = [self.base * self.widen * 2**k for k in range(self.groups)]
        return PreActivationNetwork(data, self.base, widths, blocks).to(device)


class PreActivationNetwork(nn.Module):
    """Convolution, groups of blocks, norm, ReLU, mean over the image, linear head."""

    def __init__(self, data: DataSpec, base: int, widths: list[int], blocks: int) -> None:
        super().__init__()
        self.stem = _convolution(data.channels, base)
        layers, channels = [], base
        for group, width in enumerate(widths):
            for number in range(blocks):
                stride = 2 if group and not number else 1
                layers.append(Block(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.norm = _norm(channels)
        self.head = nn.Linear(channels, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) at images in [0, 1]."""
        h = self.blocks(self.stem(2.0 * x - 1.0))
        out: Tensor = self.head(F.relu(self.norm(h)).mean((2, 3)))
        return out


class Block(nn.Module):
    """Two 3x3 convolutions, each after norm and ReLU, beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(width)
        self.first = _convolution(channels, width, stride=stride)
        self.second = _convolution(width, width)
        same = stride == 1 and channels == width
        self.shortcut = None if same else _convolution(channels, width, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; where the shape changes, the shortcut is pre-activated too."""
        h = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = shortcut + self.second(F.relu(self.norm2(self.first(h))))
        return out


def _convolution(channels: int, width: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    """Group norm in eight groups, or the most below that divide the channels."""
    return nn.GroupNorm(max(k for k in range(1, 9) if channels % k == 0), channels)
