"""Auto-PGD through any gradient of a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from robustdeq.attacks._apgd import AutoPGD
from robustdeq.attacks._ascent import Lanes, LogitLoss, ascend
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import is_targeted, named_loss, replaced
from robustdeq.attacks._starts import joint_ends, random_starts, side_by_side
from torch import Tensor

from robustdeq.equilibrium import JointAscent
from robustdeq.errors import CaseError, UsageError
from robustdeq.interfaces import Access, Budget
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat

Loss = Literal["ce", "dlr", "margin", "targeted_dlr", "targeted_ce", "targeted_margin"]
Start = Literal["random", "clean", "joint"]


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Auto-PGD (Croce and Hein 2020): step lengths that adapt, through the target's own gradient.

    The same steps as in the authors' code, but random numbers belong to the sample, a sample leaves
    when it is fooled, and the targets of one sample run side by side. The deployed predictor, cold,
    scores what other values and warm starts claim: every iterate where it costs nothing, else
    those that look best, every few steps and at the end.

    Attributes:
        steps: gradient steps of a run; they set the checkpoints.
        restarts: runs of each target, random from the second on.
        loss: `ce`, `dlr`, `margin`, or one with a target class; with fewer than 3 (4) classes the
            margin stands for `dlr` (`targeted_dlr`).
        targets: the likeliest wrong classes, each of them a target.
        start: of the first run: `random`, `clean`, or `joint`, the end of a joint ascent of state,
            adjoint and input.
        warm: start solves from those of the step before, where the model has one solve to a
            tolerance and the gradient allows it.
        confidence: the deployed margin at which a sample is done; above 0 for examples that are to
            transfer.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    steps: int = 100
    restarts: int = 1
    loss: Loss = "ce"
    targets: int = 9
    start: Start = "random"
    warm: bool = False
    confidence: float = 0.0

    def __post_init__(self) -> None:
        if min(self.steps, self.restarts, self.targets) < 1 or self.confidence < 0:
            raise UsageError(
                f"apgd has steps={self.steps}, restarts={self.restarts}, targets={self.targets}, "
                f"confidence={self.confidence}; give at least 1, 1, 1 and 0."
            )

    def fits(self, target: Target) -> bool:
        """Whether the target has what the start needs."""
        return self.start != "joint" or target.dynamics() is not None

    def left_out(self, classes: int) -> tuple[str, ...]:
        """See `robustdeq.interfaces.Attack`."""
        return replaced(self.loss, classes)

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`."""
        runs = self.restarts * (min(self.targets, classes - 1) if is_targeted(self.loss) else 1)
        return Budget(2 + (self.steps + 1) * runs, self.steps * runs)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Tensor:
        """See `robustdeq.interfaces.Attack`."""
        ledger = Ledger(target, x, y, self.confidence)
        objective = LogitLoss(target, y, named_loss(self.loss, target.classes), warm=self.warm)
        goals = torch.full_like(y, -1)[:, None]
        if is_targeted(self.loss):
            goals = ledger.likeliest(self.targets)
        for restart in range(self.restarts):
            samples, classes = side_by_side(goals, ledger.open())
            if not len(samples):
                break
            lanes = Lanes(samples, classes, x[samples])
            if restart or self.start != "clean":
                streams = rng.take(samples.tolist())
                lanes = lanes._replace(start=random_starts(threat, lanes.start, streams))
            if not restart and self.start == "joint":
                lanes = lanes._replace(start=self._joint(target, lanes, x, y, threat))
            rule = AutoPGD(x[samples], threat, self.steps)
            ascend(objective, rule, self.steps, lanes, ledger)
        return ledger.x

    def _joint(self, target: Target, lanes: Lanes, x: Images, y: Labels, threat: Threat) -> Images:
        dynamics = target.dynamics()
        if dynamics is None:
            raise CaseError(
                f"start 'joint' iterates one cell, and {type(target.model).__name__} is not the "
                "fixed point of one; start at random."
            )
        loss = named_loss(self.loss, target.classes)
        return joint_ends(dynamics, JointAscent(), loss, lanes, x, y, threat)
