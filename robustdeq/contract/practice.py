"""Small models with fixed weights, to try attacks and recipes on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustdeq.equilibrium import EquilibriumClassifier, FixedPoint, Injection
from robustdeq.shapes import Images, Labels, Logits

IMAGES = 4
CPU = torch.device("cpu")


class PracticeNetwork(nn.Module):
    """Two layers for 8x8 images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, classes)
        _fill(self)

    def forward(self, x: Images) -> Logits:
        """Logits (batch, classes)."""
        out: Tensor = self.last(torch.tanh(self.first(x.flatten(1) - 0.5)))
        return out


class PracticeEquilibrium(EquilibriumClassifier):
    """A contraction for 8x8 images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(FixedPoint(tolerance=1e-6, max_steps=60))
        self.stem, self.weight = nn.Linear(64, 24), nn.Linear(24, 24, bias=False)
        self.last = nn.Linear(24, classes)
        _fill(self)

    def embed(self, x: Images) -> Injection:
        """See `EquilibriumClassifier.embed`."""
        out: Tensor = self.stem(x.flatten(1) - 0.5)
        return out

    def cell(self, z: Tensor, injection: Injection, step: int) -> Tensor:
        """See `EquilibriumClassifier.cell`."""
        assert isinstance(injection, Tensor)
        return torch.tanh(0.2 * self.weight(z) + injection)

    def readout(self, z: Tensor) -> Logits:
        """See `EquilibriumClassifier.readout`."""
        out: Tensor = self.last(z)
        return out


def practice(*, iterates: bool = False) -> tuple[nn.Module, Images, Labels]:
    """A model in eval mode, with a few images well inside the box that it classifies correctly."""
    model = PracticeEquilibrium() if iterates else PracticeNetwork()
    x = 0.2 + 0.6 * torch.rand(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval(), x, model(x).argmax(1)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(2.0 * drawn / parameter.shape[-1] ** 0.5)
