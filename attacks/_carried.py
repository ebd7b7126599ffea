"""Ascent of a loss with states that are carried from step to step; see `_ascent.Objective`."""

from __future__ import annotations

from robustdeq.attacks._ascent import Reading, States
from robustdeq.attacks._ledger import ROWS
from robustdeq.attacks._losses import GoalLoss
from robustdeq.attacks._rivals import Rivals

from robustdeq.equilibrium import JointState, Lockstep
from robustdeq.shapes import Counts, Images, Labels, Logits, PerSample


class Carried:
    """A loss of the logits that one evaluation of the cell shows.

    They lag behind the input, so the ledger asks the deployed predictor, cold, about those that
    claim to be fooled and about nothing else until the end.

    Args:
        settled: state and adjoint of each sample to begin with, at any input near by.
        first: looks at the start of a run, while the adjoint is still that of nothing.
        rows: most rows of one look.
        rivals: shown all logits.
    """

    trusted, warm = True, True

    def __init__(
        self,
        lockstep: Lockstep,
        y: Labels,
        loss: GoalLoss,
        settled: JointState,
        first: int = 6,
        rows: int = ROWS,
        rivals: Rivals | None = None,
    ) -> None:
        self.lockstep, self.y, self.loss = lockstep, y, loss
        self.settled, self.first, self.rows = settled, first, rows
        self.rivals = rivals

    def __call__(self, x: Images, samples: Counts, goals: Labels, states: States) -> Reading:
        """See `Objective`."""

        def loss(logits: Logits) -> PerSample:
            return self.loss(logits, self.y[samples], goals)

        looks = 1 if states else self.first
        state = JointState(*states) if states else self.settled.take(samples)
        for _ in range(looks):
            look = self.lockstep.look(x, state, loss)
            state = look.state
        if self.rivals is not None:
            self.rivals.see(samples, look.logits)
        return Reading(look.losses, look.logits, tuple(state), look.gradient)
