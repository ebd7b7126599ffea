"""Equilibrium model on the shared residual cell: the plain DEQ of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from robustdeq.defenses._cells import Residual, Stem, readout
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import DataSpec
from robustdeq.equilibrium import (
    Anderson,
    Broyden,
    EquilibriumClassifier,
    FixedPoint,
    Implicit,
    Injection,
    SolveGradient,
    Solver,
)
from robustdeq.interfaces import About

SolverName = Literal["fixed_point", "anderson", "broyden"]
SOLVERS: dict[str, type[Solver]] = {
    "fixed_point": FixedPoint,
    "anderson": Anderson,
    "broyden": Broyden,
}


@dataclass(frozen=True, kw_only=True)
class DEQ:
    """z* = relu(stem(x) + gain * B(relu(A(z*)))), solved to a tolerance; implicit gradient.

    Attributes:
        width: channels of the state (units, for small images).
        inner: channels between A and B.
        halvings: strided convolutions of the stem.
        gain: Lipschitz bound of the cell: below 1 it is a contraction, above it may be one.
        solver: the deployed solver.
        tolerance: its relative residual; also that of the adjoint solve.
        max_steps: its limit; also that of the adjoint solve.
    """

    about: ClassVar[About] = About(
        "Deep Equilibrium Models",
        "Shaojie Bai, J. Zico Kolter, Vladlen Koltun",
        "NeurIPS 2019",
        "https://arxiv.org/abs/1909.01377",
    )
    recipe: ClassVar[str] = "pgd_at"
    # Training to the deployed tolerance costs five times as much and gains nothing.
    suited: ClassVar[dict[str, object]] = {"gradient": "phantom(4,1)", "solver_steps": 4}

    width: int = 64
    inner: int = 64
    halvings: int = 2
    gain: float = 0.95
    solver: SolverName = "fixed_point"
    tolerance: float = 1e-6
    max_steps: int = 200

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        """See `robustdeq.interfaces.Defense`."""
        solver = SOLVERS[self.solver](tolerance=self.tolerance, max_steps=self.max_steps)
        stem = Stem(data, self.width, self.halvings)
        # Plain iteration is right for the adjoint too: the transposed Jacobian contracts as well.
        gradient = Implicit(FixedPoint(tolerance=self.tolerance, max_steps=self.max_steps))
        model = ResidualEquilibrium(stem, self.inner, self.gain, data.classes, solver, gradient)
        return model.to(device)


class ResidualEquilibrium(EquilibriumClassifier):
    """The shared cell iterated; `weight_tied` is the same class with another solver."""

    def __init__(
        self,
        stem: Stem,
        inner: int,
        gain: float,
        classes: int,
        solver: Solver,
        gradient: SolveGradient,
    ) -> None:
        super().__init__(solver, gradient)
        self.stem, self.gain = stem, gain
        self.residual = Residual(stem.shape, inner)
        self.head: nn.Module = readout(stem.shape, classes)
        self.constrain(200)

    def embed(self, x: Tensor) -> Tensor:
        """See `EquilibriumClassifier.embed`."""
        out: Tensor = self.stem(x)
        return out

    def cell(self, z: Tensor, injection: Injection, step: int) -> Tensor:
        """See `EquilibriumClassifier.cell`."""
        assert isinstance(injection, Tensor)
        return F.relu(injection + self.gain * self.residual(z))

    def readout(self, z: Tensor) -> Tensor:
        """See `EquilibriumClassifier.readout`."""
        out: Tensor = self.head(z)
        return out

    def constrain(self, iterations: int = 3) -> None:
        """Project the cell back to a contraction; training calls it after every step."""
        self.residual.project(iterations)
