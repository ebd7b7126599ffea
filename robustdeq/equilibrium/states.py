"""Gradients from the states that the deployed solver passes through (Yang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustdeq.equilibrium.counting import charged
from robustdeq.equilibrium.gradients import (
    SolveGradient,
    adjoined,
    at_least_one,
    check_damping,
    damped_steps,
    number,
    refuse_warm,
    transposed_product,
)
from robustdeq.equilibrium.iteration import Solver
from robustdeq.equilibrium.solution import AdjointTrace, Problem, Solve, relative_residual
from robustdeq.errors import UsageError


@dataclass(frozen=True)
class Intermediate(SolveGradient):
    """Back-propagation through K damped steps from the state after i evaluations of the cell.

    The unrolled intermediate gradient of Yang et al. 2022, "A Closer Look at the Adversarial
    Robustness of Deep Equilibrium Models". State i is what the solver would answer after i
    evaluations, as in `Solve.states`: under plain iteration the i-th iterate; under a method that
    answers with its best iterate the best of the first i, where the paper lists the iterates
    themselves. Beyond the last state it is the last; a sample that stopped before keeps its own
    last one. Biased: it is the gradient of another state than the one that is read out, and all
    that led to state i is taken as constant.

    Attributes:
        state: i, at least 1.
        steps: K, at least 1.
        damping: weight of the cell in a step, in (0, 1].
    """

    needs_states: ClassVar[bool] = True
    cold: ClassVar[bool] = True

    state: int
    steps: int
    damping: float = 1.0

    def __post_init__(self) -> None:
        if self.state < 1:
            raise UsageError(
                f"intermediate gradient starts from state {self.state}; states count from 1."
            )
        at_least_one("intermediate", self.steps)
        check_damping("intermediate", self.damping)

    def __str__(self) -> str:
        return f"intermediate({self.state},{self.steps},{number(self.damping)})"

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """See `SolveGradient.carrier`; the value is the state after the damped steps.

        Raises:
            UsageError: if the problem starts warm.
        """
        refuse_warm(self, problem)
        index = min(self.state, len(solution.states) - 1)
        z = damped_steps(problem, solution.states[index], index, self.steps, self.damping)
        return solution._replace(z=z, steps=solution.steps + self.steps)


@dataclass(frozen=True)
class SimultaneousAdjoint(SolveGradient):
    """The adjoint advanced once per state of the deployed solve, in place of a solve of its own.

    u <- (1 - b) u + b (J_z(z_n)^T u + g) over z_0, ..., z_N, from u = g, then J_x(z_N)^T u; the
    simultaneous adjoint of Yang et al. 2022. There the label enters the forward pass, so that the
    adjoint can run beside it with the loss gradient of each state, g(z_n), and steps by the
    solver's own Jacobian estimate; the released code lacks the file, so this is rebuilt from its
    description. Here the loss is known in the backward pass alone: g is its gradient at the answer
    z_N, all Jacobians wait for it in memory, and steps are damped. Biased like an adjoint solve
    that is cut off after N + 1 steps; it diverges where the cell is no contraction, unless b is
    small.

    Attributes:
        damping: b, in (0, 1].
    """

    needs_states: ClassVar[bool] = True
    cold: ClassVar[bool] = True

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_damping("simultaneous_adjoint", self.damping)

    def __str__(self) -> str:
        damped = "" if self.damping == 1.0 else f"({number(self.damping)})"
        return f"simultaneous_adjoint{damped}"

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """See `SolveGradient.carrier`; the value is that of `solution`.

        Raises:
            UsageError: if the problem starts warm.
        """
        refuse_warm(self, problem)
        if not torch.is_grad_enabled():
            return solution
        path = _Path.along(problem, solution)
        if not path.images[-1].requires_grad:
            return solution

        def adjoint(gradient: Tensor) -> Tensor:
            return path.adjoint(gradient, self.damping)

        z = adjoined(solution.z, path.images[-1], adjoint)
        return solution._replace(z=z, adjoint=path.trace)


@dataclass
class _Path:
    """The cell, differentiable, at each state of a solve; `steps` is where each sample stopped."""

    leaves: Sequence[Tensor]
    images: Sequence[Tensor]
    steps: Tensor
    trace: AdjointTrace

    @classmethod
    def along(cls, problem: Problem, solution: Solve) -> _Path:
        leaves = [state.detach().requires_grad_() for state in solution.states]
        images = []
        for n, leaf in enumerate(leaves):
            with charged(int((solution.steps >= n).sum())):
                images.append(problem(leaf, n))
        return cls(leaves, images, solution.steps, AdjointTrace())

    @torch.no_grad()
    def adjoint(self, gradient: Tensor, damping: float) -> Tensor:
        u = gradient
        residual = gradient.new_zeros(len(gradient))
        for n, (leaf, image) in enumerate(zip(self.leaves, self.images, strict=True)):
            # A sample is done at its own last state, whatever its companions do.
            going = self.steps >= n
            with charged(int(going.sum())):
                following = gradient + transposed_product(image, leaf, u)
            residual = torch.where(going, relative_residual(following, u), residual)
            mask = going.view(-1, *[1] * (u.dim() - 1))
            u = torch.where(mask, u + damping * (following - u), u)
        self.trace.residual, self.trace.steps = residual, self.steps + 1
        return u
