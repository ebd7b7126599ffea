"""Auto-PGD (Croce and Hein 2020, "Reliable evaluation...", algorithm 1), one clock for all rows."""

from __future__ import annotations

import torch
from robustdeq.attacks._ascent import Point, Rule, States
from torch import Tensor

from robustdeq.shapes import Images
from robustdeq.threats import Threat

MOMENTUM = 0.75
"""Weight of the new step against the one before."""
_RISES = 0.75
"""The share of steps between two checkpoints that must raise the loss for a step length to stay."""


class AutoPGD(Rule):
    """Steps of length 2 epsilon with momentum; each row halves its own at checkpoints.

    At a checkpoint a row that rose in too few steps, or whose best loss stayed while its length
    did, halves its length and goes back to its best point. As in the authors' code, momentum
    reaches across that jump.

    Args:
        steps: of the run; they set the checkpoints.
    """

    def __init__(self, x: Images, threat: Threat, steps: int) -> None:
        super().__init__(x, threat)
        self.period = max(int(0.22 * steps), 1)
        self.shortest, self.shortening = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
        self.waited = 0
        self.length = torch.full((len(x),), 2 * threat.eps).to(x)
        self.rises = torch.zeros(len(x)).to(x)
        self.halved = torch.ones(len(x), dtype=torch.bool, device=x.device)

    def advance(self, step: int, point: Point) -> tuple[Images, States]:
        """See `Rule`."""
        if step == 0:
            self.best, self.last = point, point.losses
            self.reached, self.before = point.losses, point.x
        else:
            point = self._noted(point)
        moved = self._moved(point, 1.0 if step == 0 else MOMENTUM)
        self.before = point.x
        return moved, point.states

    def keep(self, rows: Tensor) -> None:
        """See `Rule`."""
        super().keep(rows)
        self.length, self.rises, self.halved = (
            self.length[rows],
            self.rises[rows],
            self.halved[rows],
        )
        if hasattr(self, "best"):
            self.best, self.last = self.best.take(rows), self.last[rows]
            self.reached, self.before = self.reached[rows], self.before[rows]

    def _noted(self, point: Point) -> Point:
        """The point to go on from, with the books kept."""
        self.best = point.where(point.losses > self.best.losses, self.best)
        self.rises = self.rises + (point.losses > self.last)
        self.last = point.losses
        self.waited += 1
        return self._checked(point) if self.waited == self.period else point

    def _checked(self, point: Point) -> Point:
        """The checkpoint: halve, and jump back to the best point."""
        few = self.rises <= _RISES * self.period
        stuck = ~self.halved & (self.reached >= self.best.losses)
        self.halved = few | stuck
        self.reached = self.best.losses
        self.length = torch.where(self.halved, self.length / 2, self.length)
        self.period = max(self.period - self.shortening, self.shortest)
        self.waited, self.rises = 0, torch.zeros_like(self.rises)
        return self.best.where(self.halved, point)

    def _moved(self, point: Point, share: float) -> Images:
        length = self.length.view(-1, *[1] * (point.x.dim() - 1))
        ahead = point.x + length * self.threat.steepest(point.gradient)
        step = self.threat.project(self.x, ahead) - point.x
        inertia = point.x - self.before
        return self.threat.project(self.x, point.x + share * step + (1 - share) * inertia)
