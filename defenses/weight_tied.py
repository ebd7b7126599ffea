"""Weight-tied network: the shared cell applied a fixed number of times, with exact gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from robustdeq.defenses._cells import Stem
from robustdeq.defenses.deq import ResidualEquilibrium
from torch import nn

from robustdeq.datasets import DataSpec
from robustdeq.equilibrium import FixedPoint, Unrolled
from robustdeq.interfaces import About


@dataclass(frozen=True, kw_only=True)
class WeightTied:
    """K steps of z <- relu(stem(x) + gain * B(relu(A(z)))) from 0; K is part of the model.

    Attributes:
        width: channels of the state (units, for small images).
        inner: channels between A and B.
        halvings: strided convolutions of the stem.
        gain: Lipschitz bound of the cell, in (0, 1).
        steps: K, at least 1.
    """

    about: ClassVar[About] = About(
        "Control: the cell of `deq`, unrolled a fixed number of times",
        "RobustDEQ",
    )
    recipe: ClassVar[str] = "pgd_at"

    width: int = 64
    inner: int = 64
    halvings: int = 2
    gain: float = 0.95
    steps: int = 8

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        """See `robustdeq.interfaces.Defense`."""
        # A tolerance of 0 never stops early: the length is the model's definition.
        solver = FixedPoint(tolerance=0.0, max_steps=self.steps)
        model = ResidualEquilibrium(
            Stem(data, self.width, self.halvings),
            self.inner,
            self.gain,
            data.classes,
            solver,
            Unrolled(self.steps),
        )
        return model.to(device)
