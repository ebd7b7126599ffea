"""The loop that every solver shares: per-sample stopping, freezing and compaction.

A sample stops when its own residual meets the tolerance; from then on it is frozen, so its result
does not depend on its batch companions. (torchdeq stops when the worst row of the batch converges,
which moved logits by 1e-3 with the companions at a tolerance of 1e-2.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustdeq.equilibrium.counting import charged
from robustdeq.equilibrium.solution import Map, Solve, residual_of
from robustdeq.errors import UsageError
from robustdeq.shapes import Counts

_WORTH_GATHERING = 2**14
"""Numbers in the working states above which dropping finished rows pays for the gathers."""


class Method(ABC):
    """The memory of one solve: turns (z, f(z)) into the next iterate, for flat states (rows, D)."""

    returns_best = True
    """Whether the iterate of the lowest residual is the answer; else the last one, and then
    `advance` must have no memory."""

    @abstractmethod
    def advance(self, z: Tensor, fz: Tensor, gap: Tensor) -> Tensor:
        """The next iterate, given the current one, the cell at it, and the gap fz - z.

        Writes to none of them. Where grad mode is on, the result has a graph.
        """

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, which ascend."""
        del rows


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A frozen choice of method, tolerance and step limit.

    Attributes:
        tolerance: relative residual at which a sample stops; 0 runs exactly `max_steps` steps.
        max_steps: most evaluations of the cell per sample, at least 1.
    """

    tolerance: float = 1e-6
    max_steps: int = 100

    def __post_init__(self) -> None:
        if self.max_steps < 1 or not 0 <= self.tolerance < 1:
            raise UsageError(
                f"{type(self).__name__} has max_steps={self.max_steps} and "
                f"tolerance={self.tolerance}; give at least 1 step and a tolerance in [0, 1)."
            )

    @abstractmethod
    def method(self) -> Method:
        """Fresh memory for one solve."""

    def with_steps(self, steps: int) -> Solver:
        """The same solver with another step limit."""
        return replace(self, max_steps=steps)

    def __call__(
        self, f: Map, start: Tensor, *, compact: bool = True, keep_states: bool = False
    ) -> Solve:
        """Iterate `f` from `start` (batch, *state) until each sample has stopped.

        Args:
            compact: drop finished rows once they are half of the batch; needs an `f` that can be
                evaluated for some rows only.
            keep_states: return all states as well: the start, then the answer as it stood after
                each evaluation. A row that has stopped keeps its last one.
        """
        return _Run(self, f, start, compact, keep_states).solve()

    def traced(
        self, f: Map, start: Tensor, *, keep_states: bool = False
    ) -> tuple[Solve, list[Counts]]:
        """The same solve, bit for bit, and which iterate each of its states is, per row.

        The last entry belongs to the answer; those before it are there if states are kept. Enough
        to compute the states again, with a graph.
        """
        run = _Run(self, f, start, True, keep_states)
        return run.solve(), run.origins


class _Run:
    """One solve: the working rows, and the answers of the rows that have left.

    Small models spend their time in the overhead of operations, not in the cell, hence the care:
    nothing is masked until the first row is done, and nothing is gathered for small states.
    """

    def __init__(
        self, solver: Solver, f: Map, start: Tensor, compact: bool, keep_states: bool
    ) -> None:
        self.solver, self.f, self.compact = solver, f, compact
        self.method = solver.method()
        self.shape = start.shape[1:]
        batch = start.shape[0]
        self.z = start.detach().reshape(batch, -1)
        self.rows: Tensor | None = None
        self.remaining = batch
        self.open = torch.ones(batch, dtype=torch.bool, device=start.device)
        self.best = self.z
        self.gap = self.z.new_full((batch,), torch.inf)
        self.norm = self.z.new_ones((batch,))
        self.taken = 0
        self.steps = torch.zeros(batch, dtype=torch.long, device=start.device)
        self.origin = torch.zeros_like(self.steps)
        self.answer = self._current()
        self.states: list[Tensor] | None = [start.detach()] if keep_states else None
        self.origins: list[Tensor] = [self.origin] if keep_states else []

    def solve(self) -> Solve:
        for step in range(self.solver.max_steps):
            with charged(self.remaining):
                fz = self.f(self.z.view(-1, *self.shape), step, self.rows).flatten(1)
            gap = fz - self.z
            self._observe(fz, gap)
            if self.remaining == 0 or step + 1 == self.solver.max_steps:
                break
            if self.method.returns_best:
                following = self.method.advance(self.z, fz, gap)
                self.z = self._where_open(following, self.z)
            else:
                self.z = self.best
            size = self.z.numel()
            if self.compact and 2 * self.remaining <= len(self.open) and size > _WORTH_GATHERING:
                self._drop_finished()
        z, gap, norm, steps, origin = self._gathered()
        states = tuple(self.states) if self.states is not None else ()
        if not states:
            self.origins = [origin]
        return Solve(z.view(-1, *self.shape), residual_of(gap, norm), steps, states)

    def _observe(self, fz: Tensor, change: Tensor) -> None:
        """Take the residual of the current iterate, and close the rows that meet the tolerance."""
        gap = torch.linalg.vector_norm(change, dim=1)
        norm = torch.linalg.vector_norm(fz, dim=1)
        self.taken += 1
        if self.method.returns_best:
            self._keep_best(gap / norm.clamp_min(torch.finfo(norm.dtype).tiny))
        else:
            self.best = self._where_open(self.method.advance(self.z, fz, change), self.best)
            self.gap = self._where_open(gap, self.gap)
            self.norm = self._where_open(norm, self.norm)
        if self.solver.tolerance > 0:
            self._close(gap, norm)
        if self.states is not None:
            z, *_, origin = self._gathered()
            self.states.append(z.view(-1, *self.shape))
            self.origins.append(origin)

    def _keep_best(self, residual: Tensor) -> None:
        """The current iterate where it is better; one without a residual never is."""
        better = residual < self.gap
        if self.remaining < len(self.open):
            better = better & self.open
        # To ask another device would be to wait for it.
        if better.device.type == "cpu" and bool(better.all()):
            self.best, self.gap = self.z, residual
            self.origin = torch.full_like(self.origin, self.taken - 1)
            return
        self.best = _chosen(better, self.z, self.best)
        self.gap = torch.where(better, residual, self.gap)
        self.origin = torch.where(better, self.taken - 1, self.origin)

    def _close(self, gap: Tensor, norm: Tensor) -> None:
        # A NaN closes its row too: no method recovers from one.
        still = self.open & (gap > self.solver.tolerance * norm)
        remaining = int(still.sum())
        if remaining < self.remaining:
            self.steps = self._steps()
            self.open, self.remaining = still, remaining

    def _steps(self) -> Tensor:
        """Evaluations per row: all that were made for an open one."""
        return torch.where(self.open, self.taken, self.steps)

    def _where_open(self, new: Tensor, old: Tensor) -> Tensor:
        if self.remaining == len(self.open):
            return new
        return _chosen(self.open, new, old)

    def _drop_finished(self) -> None:
        self.answer = self._gathered()
        live = self.open.nonzero().squeeze(1)
        self.rows = live if self.rows is None else self.rows[live]
        self.z, self.best = self.z.index_select(0, live), self.best.index_select(0, live)
        self.gap, self.norm = self.gap[live], self.norm[live]
        self.steps, self.origin = self.steps[live], self.origin[live]
        self.open = self.open[live]
        self.method.keep(live)

    def _current(self) -> tuple[Tensor, ...]:
        steps = self._steps()
        # The last iterate is as old as its row.
        origin = self.origin if self.method.returns_best else steps
        return self.best, self.gap, self.norm, steps, origin

    def _gathered(self) -> tuple[Tensor, ...]:
        if self.rows is None:
            return self._current()
        return tuple(
            whole.index_copy(0, self.rows, part)
            for whole, part in zip(self.answer, self._current(), strict=True)
        )


def _chosen(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` where the mask holds, else those of `old`; neither is written to.

    On a CPU `torch.where` takes several times as long as copying rows, and nothing has to be copied
    as long as one of the two gives all rows. Elsewhere to ask for that would wait for the device.
    """
    if new.dim() == 1:
        return torch.where(mask, new, old)
    if new.device.type != "cpu" or new.dtype != old.dtype:
        return torch.where(mask[:, None], new, old)
    others = mask.logical_not().nonzero().squeeze(1)
    if len(others) == 0:
        return new
    if len(others) == len(new):
        return old
    return new.index_copy(0, others, old.index_select(0, others))
