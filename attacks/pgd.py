"""Projected gradient descent; FGSM is its one-step case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from robustdeq.attacks._ascent import Lanes, LogitLoss, Steepest, ascend
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import LOSSES
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

    Every iterate is looked at, and the one of the largest margin is the candidate. Of a view with
    other logits than the deployed ones, and of a warm start, the deployed predictor scores those
    that look best, every few steps and at the end of a restart.

    Attributes:
        steps: gradient steps of a restart.
        step_size: length of the first step, relative to epsilon; 0 lets all steps together reach
            2.5 epsilon, enough to cross the ball from any start.
        restarts: the first starts at the input itself unless `random_start`.
        loss: cross-entropy ("ce"), "margin" or "dlr".
        random_start: whether the first restart is random as well.
        decay: whether the step shrinks linearly to a tenth over a restart.
        warm: start solves from those of the step before, where the model has one solve to a
            tolerance and the gradient allows it.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    steps: int = 40
    step_size: float = 0.0
    restarts: int = 1
    loss: Literal["ce", "margin", "dlr"] = "ce"
    random_start: bool = True
    decay: bool = True
    warm: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or self.step_size < 0:
            raise UsageError(
                f"pgd has steps={self.steps}, restarts={self.restarts}, step_size="
                f"{self.step_size}; give at least 1 step and restart, and no negative step size."
            )

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`."""
        del classes
        return Budget(2 + (self.steps + 1) * self.restarts, self.steps * self.restarts)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Tensor:
        """See `robustdeq.interfaces.Attack`."""
        ledger = Ledger(target, x, y)
        loss = LOSSES[self.loss]
        objective = LogitLoss(target, y, lambda logits, y, _: loss(logits, y), warm=self.warm)
        for restart in range(self.restarts):
            samples = ledger.open()
            if not len(samples):
                break
            start = x[samples]
            if self.random_start or restart:
                streams = rng.take(samples.tolist())
                offset = threat.random_offset(streams.uniform(start), streams.fraction(start))
                start = threat.project(start, start + offset)
            lanes = Lanes(samples, torch.full_like(samples, -1), start)
            rule = Steepest(x[samples], threat, self._lengths(threat))
            ascend(objective, rule, self.steps, lanes, ledger, stop=False)
        return ledger.x

    def _lengths(self, threat: Threat) -> list[float]:
        """The length of each step."""
        shares = [1.0 - 0.9 * k / self.steps * self.decay for k in range(self.steps)]
        size = (self.step_size or 2.5 / sum(shares)) * threat.eps
        return [share * size for share in shares]
