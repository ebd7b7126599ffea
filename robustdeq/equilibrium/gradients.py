"""Gradient estimators: ways of differentiating through a solve.

The estimator drives the solve, so how to solve and how to differentiate never meet. Each gives a
*carrier*: a differentiable state near the fixed point. Two views of it exist: `deployed` keeps the
deployed solver's state, bit for bit, and takes only the carrier's backward pass; `surrogate`
exposes the carrier itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from robustdeq.equilibrium.anderson import Anderson
from robustdeq.equilibrium.iteration import Solver
from robustdeq.equilibrium.solution import (
    AdjointTrace,
    Injection,
    Problem,
    Solve,
    relative_residual,
)
from robustdeq.errors import UsageError


class SolveGradient(ABC):
    """A frozen choice of how a gradient passes through a solve."""

    @abstractmethod
    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """A differentiable state; `solution` is what `solver` reached, without a graph."""

    def deployed(self, problem: Problem, solver: Solver, keep_states: bool = False) -> Solve:
        """The deployed solver's result with this estimator's backward pass."""
        with torch.no_grad():
            solution = solver(problem, problem.start, keep_states=keep_states)
        if not torch.is_grad_enabled():
            return solution
        carried = self.carrier(problem, solution, solver)
        return solution._replace(z=splice(solution.z, carried.z), adjoint=carried.adjoint)

    def surrogate(self, problem: Problem, solver: Solver, keep_states: bool = False) -> Solve:
        """The estimator's own result; the same value with and without grad mode."""
        with torch.no_grad():
            solution = solver(problem, problem.start, keep_states=keep_states)
        return self.carrier(problem, solution, solver)._replace(states=solution.states)


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def splice(value: Tensor, carrier: Tensor) -> Tensor:
    """`value`, exactly, with the gradient that `carrier` (of the same shape) has.

    The usual `carrier + (value - carrier).detach()` would be off by rounding.
    """
    return cast("Tensor", cast("Any", _Splice).apply(value.detach(), carrier))


@dataclass(frozen=True)
class Implicit(SolveGradient):
    """The gradient of the fixed point itself, by the implicit function theorem.

    Solves v = J^T v + dl/dz with a solver of its own, per sample (Bai, Kolter and Koltun 2019,
    "Deep Equilibrium Models", theorem 1). Exact at an exact fixed point. Once differentiable.
    """

    adjoint: Solver = field(default_factory=lambda: Anderson(tolerance=1e-6, max_steps=60))

    def __str__(self) -> str:
        return "implicit"

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """See `SolveGradient.carrier`; the value is that of `solution`."""
        if not torch.is_grad_enabled():
            return solution
        leaf = solution.z.detach().requires_grad_()
        image = problem(leaf, solver.max_steps)
        if not image.requires_grad:
            return solution
        trace = AdjointTrace()
        link = _Link(image, leaf, self.adjoint, trace)
        return solution._replace(z=_adjoint(solution.z, image, link), adjoint=trace)


@dataclass
class _Link:
    """What the backward pass needs of the forward one, kept out of autograd's sight."""

    image: Tensor
    leaf: Tensor
    adjoint: Solver
    trace: AdjointTrace

    def solve(self, gradient: Tensor) -> Tensor:
        def transposed(z: Tensor, step: int, rows: Tensor | None = None) -> Tensor:
            with torch.enable_grad():
                (product,) = torch.autograd.grad(
                    self.image, self.leaf, z, retain_graph=True, allow_unused=True
                )
            # A cell that ignores its state has no Jacobian: the adjoint is the gradient itself.
            return gradient if product is None else gradient + product

        with torch.no_grad():
            solved = self.adjoint(transposed, gradient, compact=False)
        self.trace.residual, self.trace.steps = solved.residual, solved.steps
        return solved.z


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, image: Tensor, link: _Link) -> Tensor:
        ctx.link = link
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.link.solve(gradient), None


def _adjoint(value: Tensor, image: Tensor, link: _Link) -> Tensor:
    return cast("Tensor", cast("Any", _Adjoint).apply(value.detach(), image, link))


@dataclass(frozen=True)
class Phantom(SolveGradient):
    """Back-propagation through K damped steps from the fixed point.

    z <- (1 - damping) z + damping f(z), K times (Geng et al. 2021, "On Training Implicit Models",
    unrolling-based phantom gradient; `M-unroll` with 0.5 and `F-unroll` with 1 in Yang et al.
    2022). For a contraction the error shrinks geometrically with K * damping.
    """

    steps: int
    damping: float = 1.0

    def __post_init__(self) -> None:
        _at_least_one("phantom", self.steps)
        if not 0 < self.damping <= 1:
            raise UsageError(f"phantom damping {self.damping} is outside (0, 1]; try 0.5.")

    def __str__(self) -> str:
        return f"phantom({self.steps},{self.damping:g})"

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """See `SolveGradient.carrier`; the value is the state after the damped steps."""
        z = solution.z.detach()
        for k in range(self.steps):
            image = problem(z, solver.max_steps + k)
            z = image if self.damping == 1.0 else (1 - self.damping) * z + self.damping * image
        return solution._replace(z=z, steps=solution.steps + self.steps)


@dataclass(frozen=True)
class OneStep(SolveGradient):
    """The gradient of one application of the cell at the fixed point, its Jacobian taken as 0.

    Fung et al. 2022, "JFB: Jacobian-Free Backpropagation for Implicit Networks".
    """

    def __str__(self) -> str:
        return "one_step"

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """See `SolveGradient.carrier`; the value is that of `solution`."""
        image = problem(solution.z.detach(), solver.max_steps)
        return solution._replace(z=splice(solution.z, image))


@dataclass(frozen=True)
class Unrolled(SolveGradient):
    """Back-propagation through K plain steps from the cold start; exact for weight-tied models.

    Fixed length: from a converged warm start it would silently become the one-step gradient
    (measured relative error 0.32), so a warm start is refused.
    """

    steps: int

    def __post_init__(self) -> None:
        _at_least_one("unrolled", self.steps)

    def __str__(self) -> str:
        return f"unrolled({self.steps})"

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """See `SolveGradient.carrier`; the value is the K-th iterate."""
        return self.surrogate(problem, solver)

    def surrogate(self, problem: Problem, solver: Solver, keep_states: bool = False) -> Solve:
        """The K-th iterate, without any solve.

        Raises:
            UsageError: if the problem starts warm.
        """
        if problem.warm:
            raise UsageError(f"{self} refuses a warm start; unroll from the model's own start.")
        z = previous = problem.start
        states = [z]
        for k in range(self.steps):
            previous, z = z, problem(z, k)
            states.append(z)
        residual = relative_residual(z.detach(), previous.detach())
        steps = torch.full_like(residual, self.steps, dtype=torch.long)
        return Solve(z, residual, steps, tuple(states) if keep_states else ())


def _at_least_one(name: str, steps: int) -> None:
    if steps < 1:
        raise UsageError(f"{name} gradient has {steps} steps; give at least 1.")


@dataclass(frozen=True)
class Honest:
    """The gradient that autograd gives through a module's own forward; for any module."""

    def __str__(self) -> str:
        return "honest"


__all__ = [
    "Honest",
    "Implicit",
    "Injection",
    "OneStep",
    "Phantom",
    "SolveGradient",
    "Unrolled",
    "splice",
]
