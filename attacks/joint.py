"""Joint ascent of state, adjoint and input (Gurumurthy et al. 2021) as an attack."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import torch
from robustdeq.attacks._ascent import Lanes, LogitLoss, Steepest, ascend, shrinking
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import named_loss
from robustdeq.attacks._starts import joint_ends, random_starts

from robustdeq.equilibrium import JointAscent
from robustdeq.errors import CaseError, UsageError
from robustdeq.interfaces import Access, Budget, Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat

_EVALUATIONS = 10
"""About as many joint steps cost what a model call does."""
_REACH = 1.0
"""How far all steps of the polish reach together, relative to epsilon."""


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Ascent with one evaluation of the cell, and one product with its Jacobian, per step.

    The state lags behind its input, so its loss proves nothing: the end of each ascent is
    projected, solved cold by the deployed solver, and polished by PGD if wanted. Mixing (`memory`)
    leaves the ball between steps and is projected back.

    Attributes:
        steps: moves of the input in an ascent.
        step_size: of a move, relative to epsilon.
        updates: joint steps per move, each an ascent of its own; 1 is the paper's.
        losses: each an ascent of its own: `ce`, `margin`.
        restarts: of all ascents, from random points; the first starts at the input itself unless
            `random_start`.
        random_start: whether the first restart is random as well.
        damping: of the state in the joint iteration.
        adjoint_damping: of the adjoint; the authors take 0.8 and 0.6.
        memory: of Anderson mixing, type I; 0 does without.
        polish: steps of PGD from each end, through the target's gradient; 0 for none.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    steps: int = 40
    step_size: float = 0.1
    updates: tuple[int, ...] = (1, 4)
    losses: tuple[Literal["ce", "margin"], ...] = ("ce", "margin")
    restarts: int = 1
    random_start: bool = True
    damping: float = 1.0
    adjoint_damping: float = 1.0
    memory: int = 0
    polish: int = 0

    def __post_init__(self) -> None:
        if min(self.restarts, len(self.updates), len(self.losses)) < 1 or self.polish < 0:
            raise UsageError(
                f"joint has restarts={self.restarts}, updates={self.updates}, losses="
                f"{self.losses}, polish={self.polish}; give at least 1 restart, update and loss."
            )
        for updates in self.updates:
            self._ascent(updates)
        if not set(self.losses) <= {"ce", "margin"}:
            raise UsageError(f"joint has losses={self.losses}; it knows 'ce' and 'margin'.")

    def fits(self, target: Target) -> bool:
        """Whether the model is the fixed point of one cell, and no more."""
        return target.dynamics() is not None

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`."""
        del classes
        ascents = self.restarts * len(self.losses)
        calls = ascents * sum(
            -(-self.steps * k // _EVALUATIONS) + self.polish for k in self.updates
        )
        return Budget(2 + calls + ascents * len(self.updates), calls)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`.

        Raises:
            CaseError: for a model without a joint iteration.
        """
        dynamics = target.dynamics(self.damping, self.adjoint_damping)
        if dynamics is None:
            raise CaseError(
                f"attack joint iterates one cell, and {type(target.model).__name__} is not the "
                "fixed point of one; leave it out."
            )
        ledger = Ledger(target, x, y)
        for restart, updates, loss in product(range(self.restarts), self.updates, self.losses):
            samples = ledger.open()
            if not len(samples):
                break
            ledger.sign(f"{loss},{updates}")
            start = x[samples]
            if self.random_start or restart:
                start = random_starts(threat, start, rng.take(samples.tolist()))
            lanes = Lanes(samples, torch.full_like(samples, -1), start)
            ends = joint_ends(
                dynamics,
                self._ascent(updates),
                named_loss(loss, target.classes),
                lanes,
                x,
                y,
                threat,
            )
            ledger.offer(samples, ends)
            if self.polish:
                self._polish(target, ledger, lanes._replace(start=ends), x, y, threat, loss)
        return ledger.candidates()

    def _ascent(self, updates: int) -> JointAscent:
        return JointAscent(
            steps=self.steps, step_size=self.step_size, updates=updates, memory=self.memory
        )

    def _polish(
        self,
        target: Target,
        ledger: Ledger,
        lanes: Lanes,
        x: Images,
        y: Labels,
        threat: Threat,
        loss: str,
    ) -> None:
        lanes = lanes.take(ledger.unsettled(lanes.samples))
        if not len(lanes.samples):
            return
        rule = Steepest(x[lanes.samples], threat, shrinking(_REACH * threat.eps, self.polish))
        objective = LogitLoss(target, y, named_loss(loss, target.classes))
        ascend(objective, rule, self.polish, lanes, ledger)
