"""Gradient estimators: ways of differentiating through a solve.

The estimator drives the solve, so how to solve and how to differentiate never meet. Each gives a
*carrier*: a differentiable state near the fixed point. Two views of it exist: `deployed` keeps the
deployed solver's state, bit for bit, and takes only the carrier's backward pass; `surrogate`
exposes the carrier itself.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from robustdeq.equilibrium.anderson import Anderson
from robustdeq.equilibrium.iteration import Solver
from robustdeq.equilibrium.solution import (
    AdjointTrace,
    Problem,
    Solve,
    relative_residual,
)
from robustdeq.errors import UsageError


class SolveGradient(ABC):
    """A frozen choice of how a gradient passes through a solve.

    Attributes:
        needs_states: whether `carrier` reads the states of the solution.
        cold: whether it follows the solve from the model's own start, and refuses another.
    """

    needs_states: ClassVar[bool] = False
    cold: ClassVar[bool] = False

    @abstractmethod
    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """A differentiable state; `solution` is what `solver` reached, without a graph."""

    def deployed(self, problem: Problem, solver: Solver, keep_states: bool = False) -> Solve:
        """The deployed solver's result with this estimator's backward pass."""
        wanted = torch.is_grad_enabled()
        solution = self._solution(problem, solver, keep_states or (wanted and self.needs_states))
        if not wanted:
            return solution
        carried = self.carrier(problem, solution, solver)
        return solution._replace(
            z=splice(solution.z, carried.z),
            states=solution.states if keep_states else (),
            adjoint=carried.adjoint,
        )

    def surrogate(self, problem: Problem, solver: Solver, keep_states: bool = False) -> Solve:
        """The estimator's own result; the same value with and without grad mode."""
        solution = self._solution(problem, solver, keep_states or self.needs_states)
        states = solution.states if keep_states else ()
        return self.carrier(problem, solution, solver)._replace(states=states)

    @torch.no_grad()
    def _solution(self, problem: Problem, solver: Solver, keep_states: bool) -> Solve:
        return solver(problem, problem.start, keep_states=keep_states)


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


class _Adjoined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, image: Tensor, adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.adjoint(gradient), None


def adjoined(value: Tensor, image: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    """`value`, exactly, whose gradient passes through `adjoint` and then into `image`'s graph."""
    return cast("Tensor", cast("Any", _Adjoined).apply(value.detach(), image, adjoint))


@dataclass(frozen=True)
class Implicit(SolveGradient):
    """The gradient of the fixed point itself, by the implicit function theorem.

    Solves v = J^T v + dl/dz with a solver of its own, per sample (Bai, Kolter and Koltun 2019,
    "Deep Equilibrium Models", theorem 1). Exact at an exact fixed point; biased where the deployed
    solver stops short of it, or where the adjoint's does. Once differentiable.

    Attributes:
        adjoint: the solver of the adjoint.
        tolerance: if given, the deployed state is first solved on to this relative residual, and
            the adjoint is solved to the same, both by Anderson's method in at most 300 steps, whose
            best iterate counts. The deployed view keeps its logits: only the Jacobians are those of
            the fixed point. Below 1e-6 float32 runs to the last step.
    """

    adjoint: Solver = field(default_factory=lambda: Anderson(tolerance=1e-6, max_steps=60))
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.tolerance is None:
            return
        if not 0 < self.tolerance < 1:
            raise UsageError(f"implicit tolerance {self.tolerance} is outside (0, 1); try 1e-6.")
        object.__setattr__(self, "adjoint", Anderson(tolerance=self.tolerance, max_steps=300))

    def __str__(self) -> str:
        return "implicit" if self.tolerance is None else f"implicit({number(self.tolerance)})"

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """See `SolveGradient.carrier`; the value is that of `solution`, or where it leads."""
        if self.tolerance is not None:
            solution = self._solved_on(problem, solution, solver.max_steps)
        if not torch.is_grad_enabled():
            return solution
        leaf = solution.z.detach().requires_grad_()
        image = problem(leaf, solver.max_steps)
        if not image.requires_grad:
            return solution
        trace = AdjointTrace()
        link = _Link(image, leaf, self.adjoint, trace)
        return solution._replace(z=adjoined(solution.z, image, link.solve), adjoint=trace)

    @torch.no_grad()
    def _solved_on(self, problem: Problem, solution: Solve, taken: int) -> Solve:
        def onward(z: Tensor, step: int, rows: Tensor | None = None) -> Tensor:
            return problem(z, taken + step, rows)

        further = self.adjoint(onward, solution.z)
        return further._replace(steps=solution.steps + further.steps)


@dataclass
class _Link:
    """What the backward pass needs of the forward one, kept out of autograd's sight."""

    image: Tensor
    leaf: Tensor
    adjoint: Solver
    trace: AdjointTrace

    def solve(self, gradient: Tensor) -> Tensor:
        def transposed(z: Tensor, step: int, rows: Tensor | None = None) -> Tensor:
            return gradient + transposed_product(self.image, self.leaf, z)

        with torch.no_grad():
            solved = self.adjoint(transposed, gradient, compact=False)
        self.trace.residual, self.trace.steps = solved.residual, solved.steps
        return solved.z


def transposed_product(image: Tensor, leaf: Tensor, vector: Tensor) -> Tensor:
    """The transposed Jacobian of `image` in `leaf` times `vector`; 0 for a cell without state."""
    with torch.enable_grad():
        (product,) = torch.autograd.grad(
            image, leaf, vector, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return product


@dataclass(frozen=True)
class Phantom(SolveGradient):
    """Back-propagation through K damped steps from the fixed point.

    z <- (1 - damping) z + damping f(z), K times (Geng et al. 2021, "On Training Implicit Models",
    unrolling-based phantom gradient; `M-unroll` with 0.5 and `F-unroll` with 1 in Yang et al.
    2022). For a contraction the error shrinks geometrically with K * damping: the Jacobians of all
    steps before the last K are taken as 0.
    """

    steps: int
    damping: float = 1.0

    def __post_init__(self) -> None:
        at_least_one("phantom", self.steps)
        check_damping("phantom", self.damping)

    def __str__(self) -> str:
        return f"phantom({self.steps},{number(self.damping)})"

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """See `SolveGradient.carrier`; the value is the state after the damped steps."""
        z = damped_steps(problem, solution.z, solver.max_steps, self.steps, self.damping)
        return solution._replace(z=z, steps=solution.steps + self.steps)


def damped_steps(problem: Problem, z: Tensor, first: int, count: int, damping: float) -> Tensor:
    """The state after `count` damped steps from `z`, taken as a constant; `first` is their step."""
    z = z.detach()
    for k in range(count):
        image = problem(z, first + k)
        z = image if damping == 1.0 else (1 - damping) * z + damping * image
    return z


@dataclass(frozen=True)
class OneStep(SolveGradient):
    """The gradient of one application of the cell at the fixed point, its Jacobian taken as 0.

    Fung et al. 2022, "JFB: Jacobian-Free Backpropagation for Implicit Networks". Biased by all
    that the state passes on from step to step.
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

    Biased for solves of another length or method. Fixed length: from a converged warm start it
    would silently become the one-step gradient (measured relative error 0.32), so a warm start is
    refused.
    """

    cold: ClassVar[bool] = True

    steps: int

    def __post_init__(self) -> None:
        at_least_one("unrolled", self.steps)

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
        refuse_warm(self, problem)
        z = previous = problem.start
        states = [z]
        for k in range(self.steps):
            previous, z = z, problem(z, k)
            states.append(z)
        residual = relative_residual(z.detach(), previous.detach())
        steps = torch.full_like(residual, self.steps, dtype=torch.long)
        return Solve(z, residual, steps, tuple(states) if keep_states else ())


def at_least_one(name: str, steps: int) -> None:
    """Refuse an estimator of no steps."""
    if steps < 1:
        raise UsageError(f"{name} gradient has {steps} steps; give at least 1.")


def check_damping(name: str, damping: float) -> None:
    """Refuse a damping outside (0, 1]."""
    if not 0 < damping <= 1:
        raise UsageError(f"{name} damping {damping} is outside (0, 1]; try 0.5.")


def refuse_warm(gradient: SolveGradient, problem: Problem) -> None:
    """Refuse to differentiate along a solve that did not begin where the deployed one does."""
    if problem.warm:
        raise UsageError(
            f"{gradient} refuses a warm start; it follows the solve from the model's own start."
        )


def number(value: float) -> str:
    """The shortest text that reads back as `value`: 0.5, 1, 1e-8."""
    return re.sub(r"\.0$|(?<=e[-+])0+", "", repr(float(value)))


@dataclass(frozen=True)
class Honest:
    """The gradient that autograd gives through a module's own forward; for any module."""

    def __str__(self) -> str:
        return "honest"
