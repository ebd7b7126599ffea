"""Feed-forward control: the same stem, residual branch and readout, with no iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from robustdeq.defenses._cells import Residual, Stem, readout
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import DataSpec
from robustdeq.interfaces import About


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """relu(u + B(relu(A(relu(u))))) with u = stem(x), unconstrained; parameters equal to `deq`'s.

    Attributes:
        width: channels of the state (units, for small images).
        inner: channels between A and B.
        halvings: strided convolutions of the stem.
    """

    about: ClassVar[About] = About(
        "Control: an explicit residual network of the same parts as `deq`", "RobustDEQ"
    )
    recipe: ClassVar[str] = "pgd_at"

    width: int = 64
    inner: int = 64
    halvings: int = 2

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        """See `robustdeq.interfaces.Defense`."""
        stem = Stem(data, self.width, self.halvings)
        return ResidualNetwork(stem, self.inner, data.classes).to(device)


class ResidualNetwork(nn.Module):
    """One residual block between a stem and a linear readout."""

    def __init__(self, stem: Stem, inner: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.residual = Residual(stem.shape, inner)
        self.head = readout(stem.shape, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        u: Tensor = self.stem(x)
        out: Tensor = self.head(F.relu(u + self.residual(F.relu(u))))
        return out
