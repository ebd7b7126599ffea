"""The `solve` that a model's `predict` is given: solver, gradient and value, bound together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from robustdeq.equilibrium._trust import WATCH, foreign, trusted
from robustdeq.equilibrium.gradients import SolveGradient
from robustdeq.equilibrium.iteration import Solver
from robustdeq.equilibrium.solution import Cell, Injection, Problem, Solve

Value = Literal["deployed", "surrogate"]


class Drive:
    """Runs the solves of one forward pass and keeps what they returned.

    Args:
        solver: the solver to iterate with.
        gradient: the estimator that drives it.
        cold: gives the cold start for an injection.
        value: "deployed" keeps the solver's states; "surrogate" exposes the estimator's own.
        warm: states to start the first, second, ... solve from; the attack's, never the judge's.

    Attributes:
        solves: one `Solve` per call, in order.
    """

    def __init__(
        self,
        solver: Solver,
        gradient: SolveGradient,
        cold: Callable[[Injection], Tensor],
        value: Value = "deployed",
        warm: Sequence[Tensor] = (),
    ) -> None:
        self.solver, self.gradient, self.cold, self.value = solver, gradient, cold, value
        self.warm = tuple(warm)
        self.solves: list[Solve] = []

    def __call__(
        self,
        cell: Cell,
        injection: Injection,
        *,
        start: Tensor | None = None,
        steps: int | None = None,
        keep_states: bool = False,
    ) -> Solve:
        """Solve z = cell(z, injection, step).

        Args:
            start: where the model itself wants to start (a second solve after a first); without
                it, the cold start, or the attack's warm one.
            steps: another step limit than the deployed one.
            keep_states: return the list of states as well.
        """
        solver = self.solver if steps is None else self.solver.with_steps(steps)
        with trusted():
            problem = self._problem(cell, injection, start)
            solve = self._run(problem, solver, keep_states)
        self.solves.append(solve)
        return solve

    def _run(self, problem: Problem, solver: Solver, keep_states: bool) -> Solve:
        watch = WATCH.get()
        gradient = self.gradient if watch is None else watch.estimator(self.gradient)
        run = gradient.deployed if self.value == "deployed" else gradient.surrogate
        solve: Solve = run(problem, solver, keep_states)
        if watch is None or not solve.states:
            return solve
        return solve._replace(states=watch.carried(solve.states, solve.z))

    def _problem(self, cell: Cell, injection: Injection, start: Tensor | None) -> Problem:
        if start is not None:
            return Problem(cell, injection, start)
        position = len(self.solves)
        if position < len(self.warm):
            return Problem(cell, injection, self.warm[position].detach(), warm=True)
        with foreign():
            cold = self.cold(injection)
        return Problem(cell, injection, cold)
