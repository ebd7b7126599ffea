"""One defense and one attack, as a third party would publish them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustdeq.datasets import DataSpec
from robustdeq.equilibrium import EquilibriumClassifier, FixedPoint
from robustdeq.interfaces import About, Access
from robustdeq.randomness import SampleRandom
from robustdeq.targets import Target
from robustdeq.threats import Threat


class Contraction(EquilibriumClassifier):
    """z = tanh(a z + U x), with one number a below 1."""

    def __init__(self, data: DataSpec, slope: float) -> None:
        super().__init__(FixedPoint(tolerance=1e-6, max_steps=100))
        self.slope = slope
        self.first = nn.Linear(data.channels * data.height * data.width, 32)
        self.last = nn.Linear(32, data.classes)

    def embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x.flatten(1) - 0.5)
        return out

    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
        return torch.tanh(self.slope * z + injection)

    def readout(self, z: Tensor) -> Tensor:
        out: Tensor = self.last(z)
        return out


@dataclass(frozen=True, kw_only=True)
class AcmeDEQ:
    """An equilibrium of one number."""

    about: ClassVar[About] = About("Acme's contraction", authors="Acme", venue="Acme 2026")
    recipe: ClassVar[str] = "clean"

    slope: float = 0.5

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        return Contraction(data, self.slope).to(device)


@dataclass(frozen=True, kw_only=True)
class Corners:
    """Random corners of the ball; the one of the lowest margin is kept."""

    needs: ClassVar[Access] = Access.LOGITS

    tries: int = 4

    @torch.no_grad()
    def run(
        self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: SampleRandom
    ) -> Tensor:
        best, lowest = x.clone(), torch.full((len(x),), torch.inf)
        for _ in range(self.tries):
            corner = threat.project(x, x + threat.eps * threat.steepest(rng.uniform(x)))
            logits = target(corner).logits
            own = logits.gather(1, y[:, None])
            margin = (own - logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]
            better = margin < lowest.to(margin)
            best[better], lowest = corner[better], torch.where(better, margin, lowest.to(margin))
        return best
