"""Equilibrium models with planted defects: in the solve, its gradient, its start or its stop."""

from __future__ import annotations

from typing import Any, cast

import torch
from planted_models import STEPS, Layers
from torch import Tensor, nn

from robustdeq.equilibrium import (
    Anderson,
    Drive,
    EquilibriumClassifier,
    FixedPoint,
    Implicit,
    Injection,
    SolveGradient,
    Solver,
    Unrolled,
)


class Equilibrium(EquilibriumClassifier):
    """The base as an equilibrium model: its steps, differentiated exactly."""

    def __init__(
        self, base: Any, solver: Solver | None = None, gradient: SolveGradient | None = None
    ) -> None:
        fixed = FixedPoint(tolerance=0.0, max_steps=STEPS)
        super().__init__(solver or fixed, gradient or Unrolled(STEPS))
        self.layers = Layers(base)

    def embed(self, x: Tensor) -> Tensor:
        return self.layers.embed(x)

    def cell(self, z: Tensor, injection: Injection, step: int) -> Tensor:
        return self.layers.cell(z, cast("Tensor", injection))

    def readout(self, z: Tensor) -> Tensor:
        return self.layers.read(z)


class DetachedSolver(Equilibrium):
    """The solver's result without its gradient; a skip connection alone carries one."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        generator = torch.Generator().manual_seed(0)
        self.skip = nn.Parameter(0.05 * torch.randn(10, 64, generator=generator))

    def predict(self, x: Tensor, solve: Drive) -> Tensor:
        with torch.no_grad():
            z = solve(self.cell, self.embed(x)).z
        return self.readout(z) + x.flatten(1) @ self.skip.T


class OneAdjointStep(Equilibrium):
    """The injection by a linear iteration of spectral radius 0.98, with one adjoint step.

    It turns pairs of units by 0.1 rad: after one step, the gradient is nearly orthogonal to the
    true one.
    """

    def __init__(self, base: Any) -> None:
        solver = Anderson(tolerance=1e-6, max_steps=60)
        super().__init__(base, solver, Implicit(FixedPoint(max_steps=1)))
        angle = torch.tensor(0.1)
        turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
        pairs = self.layers.head[1].in_features // 2
        self.register_buffer("turn", 0.98 * torch.block_diag(*[turn] * pairs))

    def embed(self, x: Tensor) -> Tensor:
        u = self.layers.embed(x)
        return u - u @ self.get_buffer("turn").T

    def cell(self, z: Tensor, injection: Injection, step: int) -> Tensor:
        return z @ self.get_buffer("turn").T + cast("Tensor", injection)

    def readout(self, z: Tensor) -> Tensor:
        return self.layers.read(self.layers.state(z))


class RandomStart(Equilibrium):
    """Starts from noise, which three steps do not forget."""

    def __init__(self, base: Any) -> None:
        super().__init__(base, FixedPoint(tolerance=0.0, max_steps=3), Unrolled(3))

    def start(self, injection: Injection) -> Tensor:
        return 4.0 * torch.randn_like(cast("Tensor", injection))


class RandomDepth(Equilibrium):
    """As many steps as a die says, one throw a call."""

    def predict(self, x: Tensor, solve: Drive) -> Tensor:
        steps = int(torch.randint(1, STEPS + 1, ()))
        return self.readout(solve(self.cell, self.embed(x), steps=steps).z)


class BatchStopping(Equilibrium):
    """Stops when the residual of the whole batch is small: companions decide the depth."""

    def predict(self, x: Tensor, solve: Drive) -> Tensor:
        u = self.embed(x)
        z = torch.zeros_like(u)
        for step in range(STEPS):
            following = self.cell(z, u, step)
            moved = (following - z).detach().norm() / following.detach().norm()
            z = following
            if float(moved) < 0.15:
                break
        return self.readout(z)
