"""The plain equilibrium model as federated training leaves it, deployed at any length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from robustdeq.defenses.deq import DEQ, ResidualEquilibrium
from torch import nn

from robustdeq.datasets import DataSpec
from robustdeq.equilibrium import FixedPoint, Unrolled
from robustdeq.errors import UsageError
from robustdeq.interfaces import About
from robustdeq.training.federated.recipe import Federated


@dataclass(frozen=True, kw_only=True)
class FederatedDEQ(DEQ):
    """The model of `deq`, trained by clients that afford different numbers of iterations.

    One weights file can be deployed at every K, as devices of different strength would.

    Attributes:
        steps: K plain iterations with exact gradients; 0 solves to the tolerance.
    """

    about: ClassVar[About] = replace(
        Federated.about,
        reproduced="Only the abstract was at hand, so the cell is the one that our controls "
        "share; see the recipe `federated`.",
    )
    recipe: ClassVar[str] = "federated"

    gain: float = 0.8
    steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"federated has steps={self.steps}; give 0 or more.")

    def trained_as(self) -> FederatedDEQ:
        """The same weights, whatever the length they are deployed at."""
        return replace(self, steps=0)

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        """See `robustdeq.interfaces.Defense`."""
        model = super().build(data, device)
        assert isinstance(model, ResidualEquilibrium)
        if self.steps:
            # A tolerance of 0 never stops early: the length is the model's definition.
            model.solver = FixedPoint(tolerance=0.0, max_steps=self.steps)
            model.gradient = Unrolled(self.steps)
        return model
