"""FAB on carried states: all targets of all samples side by side, fooled samples leave."""

from __future__ import annotations

import torch
from robustdeq.attacks._hyperplane import onto
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import targeted_margin
from torch import Tensor

from robustdeq.equilibrium import JointState, Lockstep, finite
from robustdeq.shapes import Counts, Images, Labels, Logits, PerSample
from robustdeq.threats import Norm, Threat

ITERATIONS = 100
"""Of FAB in AutoAttack, as the three that follow."""
_OVERSHOOT = 1.05
_MOST_CLEAN = 0.1
"""Largest share of the step that starts from the clean image."""
_BACK = 0.9
"""Share of the way from the clean image that a point keeps once it is adversarial."""


class CarriedFAB:
    """The reference's targeted iterations (Croce and Hein 2020, "Minimally distorted...").

    Each row steps onto the boundary to its class as the gradient sees it, from its point and, with
    a share, from the clean image; a point that seems adversarial is drawn back, and one of them
    within the ball is put to the deployed predictor, cold. A look gives the gradient, a glance the
    label; the reference asks for them one target after another.

    Args:
        settled: state and adjoint of each row to begin with.
        samples: the sample of each row.
        goals: the class of each row.
        x: clean images of the rows.
    """

    def __init__(
        self,
        lockstep: Lockstep,
        settled: JointState,
        ledger: Ledger,
        samples: Counts,
        goals: Labels,
        x: Images,
        threat: Threat,
    ) -> None:
        self.lockstep, self.state, self.ledger = lockstep, settled, ledger
        self.samples, self.goals, self.x, self.threat = samples, goals, x, threat
        self.current = x.clone()

    @torch.no_grad()
    def run(self) -> None:
        """All iterations; the ledger is offered what seems adversarial in the ball."""
        for _ in range(ITERATIONS):
            if not len(self.samples):
                return
            self.current = self._advanced()
            wrong = self._seems_wrong()
            back = self.x + _BACK * (self.current - self.x)
            self.current = torch.where(wrong.view(-1, 1, 1, 1), back, self.current)
            self._drop_settled()

    def _advanced(self) -> Images:
        gaps, gradient = self._gaps()
        points, clean, normal = (part.flatten(1) for part in (self.current, self.x, gradient))
        offset = (normal * points).sum(1) - gaps
        from_point = onto(points, normal, offset, self.threat.norm)
        from_clean = onto(clean, normal, offset, self.threat.norm)
        near, far = (self._lengths(move).clamp_min(1e-8) for move in (from_point, from_clean))
        share = (near / (near + far)).clamp(0.0, _MOST_CLEAN)[:, None]
        moved = (1 - share) * (points + _OVERSHOOT * from_point)
        moved = moved + share * (clean + _OVERSHOOT * from_clean)
        return moved.clamp(0.0, 1.0).view_as(self.current)

    def _gaps(self) -> tuple[PerSample, Images]:
        """Logit of the goal minus that of the label, and its gradient; 0 where it is no number."""
        own = self.ledger.y[self.samples]

        def gap(logits: Logits) -> PerSample:
            return targeted_margin(logits, own, self.goals)

        look = self.lockstep.look(self.current, self.state, gap)
        self.state = look.state
        gaps = look.losses.nan_to_num(0.0)
        return gaps.to(self.current), finite(look.gradient).to(self.current)

    def _seems_wrong(self) -> Tensor:
        glance = self.lockstep.glance(self.current, self.state)
        self.state = glance.state
        wrong: Tensor = glance.logits.argmax(1) != self.ledger.y[self.samples]
        inside = self.threat.distance(self.x, self.current) <= self.threat.eps
        rows = (wrong & inside).nonzero().squeeze(1)
        found = self.threat.project(self.x[rows], self.current[rows])
        self.ledger.offer(self.samples[rows], found)
        return wrong

    def _lengths(self, moves: Tensor) -> PerSample:
        return moves.abs().amax(1) if self.threat.norm is Norm.LINF else moves.norm(dim=1)

    def _drop_settled(self) -> None:
        rows = self.ledger.unsettled(self.samples)
        if len(rows) == len(self.samples):
            return
        self.samples, self.goals = self.samples[rows], self.goals[rows]
        self.x, self.current = self.x[rows], self.current[rows]
        self.state = self.state.take(rows)
