"""Projected gradient descent; FGSM is its one-step case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from robustdeq.attacks._losses import LOSSES, margin
from torch import Tensor

from robustdeq.errors import UsageError
from robustdeq.interfaces import Access, Budget
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Steepest ascent of a loss with projection (Madry et al. 2018), restarted at random.

    Every iterate is looked at, and the one of the largest margin is the candidate.

    Attributes:
        steps: gradient steps of a restart.
        step_size: length of the first step, relative to epsilon; 0 lets all steps together reach
            2.5 epsilon, enough to cross the ball from any start.
        restarts: the first starts at the input itself unless `random_start`.
        loss: cross-entropy ("ce"), "margin" or "dlr".
        random_start: whether the first restart is random as well.
        decay: whether the step shrinks linearly to a tenth over a restart.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    steps: int = 40
    step_size: float = 0.0
    restarts: int = 1
    loss: Literal["ce", "margin", "dlr"] = "ce"
    random_start: bool = True
    decay: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or self.step_size < 0:
            raise UsageError(
                f"pgd has steps={self.steps}, restarts={self.restarts}, step_size="
                f"{self.step_size}; give at least 1 step and restart, and no negative step size."
            )

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`."""
        del classes
        return Budget((self.steps + 1) * self.restarts, self.steps * self.restarts)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Tensor:
        """See `robustdeq.interfaces.Attack`."""
        best, largest = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        for restart in range(self.restarts):
            rows = (largest <= 0).nonzero().squeeze(1)
            if not len(rows):
                break
            streams = rng.take(rows.tolist())
            start = x[rows]
            if self.random_start or restart:
                offset = threat.random_offset(streams.uniform(start), streams.fraction(start))
                start = threat.project(start, start + offset)
            found, margins = self._ascend(target, x[rows], y[rows], threat, start)
            better = margins > largest[rows]
            best[rows[better]] = found[better]
            largest[rows] = torch.maximum(largest[rows], margins)
        return best

    def _shrinkage(self) -> list[float]:
        """The length of each step, relative to the first."""
        if not self.decay:
            return [1.0] * self.steps
        return [1.0 - 0.9 * step / self.steps for step in range(self.steps)]

    def _ascend(
        self, target: Target, x: Images, y: Labels, threat: Threat, start: Images
    ) -> tuple[Images, Tensor]:
        size = (self.step_size or 2.5 / sum(self._shrinkage())) * threat.eps
        shrinkage = self._shrinkage()
        current, best = start, start.clone()
        largest = torch.full((len(x),), -torch.inf, device=x.device)
        for step in range(self.steps + 1):
            last = step == self.steps
            current = current.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                logits = target(current).logits
                loss = LOSSES[self.loss](logits, y).sum()
            with torch.no_grad():
                margins = torch.nan_to_num(margin(logits, y).float(), nan=torch.inf)
                better = margins > largest
                best[better], largest = current.detach()[better], torch.maximum(largest, margins)
            if not last:
                (gradient,) = torch.autograd.grad(loss, current)
                gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
                ascent = threat.steepest(gradient) * (size * shrinkage[step])
                current = threat.project(x, current.detach() + ascent)
        return best, largest
