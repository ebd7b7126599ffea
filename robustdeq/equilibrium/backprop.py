"""Back-propagation through the deployed solver's own steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustdeq.equilibrium.gradients import SolveGradient, refuse_warm, splice
from robustdeq.equilibrium.iteration import Solver
from robustdeq.equilibrium.solution import Map, Problem, Solve


@dataclass(frozen=True)
class Backprop(SolveGradient):
    """The gradient of the deployed predictor as it computes: through every step of its solver.

    Exact for any solver, length and tolerance, up to the choice of the step at which a sample stops
    and of the iterate that answers, which are piecewise constant; a model that jumps there has no
    gradient there. A start that carries a graph is passed through. Costs the solve, then the steps
    that led to the answer once more, all of them in memory.
    """

    cold: ClassVar[bool] = True

    def __str__(self) -> str:
        return "backprop"

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        """See `SolveGradient.carrier`; the value is that of `solution`."""
        return self.deployed(problem, solver)

    def deployed(self, problem: Problem, solver: Solver, keep_states: bool = False) -> Solve:
        """The deployed solver's result; kept states carry a graph as well.

        Raises:
            UsageError: if the problem starts warm.
        """
        refuse_warm(self, problem)
        with torch.no_grad():
            solution, origins = solver.traced(problem, problem.start, keep_states=keep_states)
        if not torch.is_grad_enabled():
            return solution
        again = replayed(solver, problem, problem.start, origins)
        states = zip(solution.states, again, strict=True) if keep_states else ()
        return solution._replace(
            z=splice(solution.z, again[-1]), states=tuple(splice(s, a) for s, a in states)
        )

    def surrogate(self, problem: Problem, solver: Solver, keep_states: bool = False) -> Solve:
        """The deployed result: the estimator has no other."""
        return self.deployed(problem, solver, keep_states)


def replayed(solver: Solver, f: Map, start: Tensor, origins: Sequence[Tensor]) -> list[Tensor]:
    """States of a finished solve, computed again with a graph.

    A row leaves once it has the iterate that is its answer. Hence nothing is in the graph that the
    answer does not need: no frozen row, no zero gap, no iterate that diverged after the best one,
    any of which can turn a gradient of 0 into NaN.

    Args:
        origins: for each state wanted, which iterate it is, per row; that of the answer last.
    """
    method, shape, last = solver.method(), start.shape, origins[-1]
    rows = torch.arange(len(start), device=start.device)
    z = start.reshape(len(start), -1)
    iterates = [z]
    for step in range(max(last.tolist(), default=0)):
        going = (last[rows] > step).nonzero().squeeze(1)
        if len(going) < len(rows):
            rows, z = rows[going], z[going]
            method.keep(going)
        whole = len(rows) == len(start)
        fz = f(z.reshape(-1, *shape[1:]), step, None if whole else rows).flatten(1)
        z = method.advance(z, fz, fz - z)
        iterates.append(z if whole else iterates[-1].index_copy(0, rows, z))
    if len(origins) == 1:
        return [iterates[-1].view(shape)]
    path, every = torch.stack(iterates), torch.arange(len(start), device=start.device)
    return [path[origin, every].view(shape) for origin in origins]
