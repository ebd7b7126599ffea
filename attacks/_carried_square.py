"""The reference Square with states that are carried, and queries that end once they are decided."""

from __future__ import annotations

from typing import Any

import torch
from robustdeq.attacks._ledger import Ledger, margins_of
from robustdeq.attacks._reference import reference_class
from torch import Tensor

from robustdeq.equilibrium import JointState, Lockstep, take_rows
from robustdeq.shapes import Counts, Images, Labels, PerSample
from robustdeq.threats import Threat

STEPS = 40
"""Most evaluations of the cell for one query."""
ROUNDING = 1e-4
"""Relative residual at which a query counts as solved."""
MARGIN = 1.5
"""Factor on the largest ratio of error to residual that calibration found."""


def calibrated(lockstep: Lockstep, state: JointState, x: Images, y: Labels) -> float:
    """How far a margin may be from its end, per relative residual: the largest seen, and half more.

    Args:
        state: settled for inputs near `x`, not at `x`.
    """
    margins, residuals = [], []
    for _ in range(STEPS):
        glance = lockstep.glance(x, state)
        state = glance.state
        margins.append(margins_of(glance.logits, y))
        residuals.append(glance.residual)
    errors = (torch.stack(margins) - margins[-1]).abs()
    heights = torch.stack(residuals)
    known = heights > 10 * ROUNDING
    ratio = torch.where(known, errors / heights.clamp_min(1e-12), 0.0)
    return MARGIN * float(ratio.max())


def carried_square(
    lockstep: Lockstep,
    settled: JointState,
    ledger: Ledger,
    samples: Counts,
    x: Images,
    threat: Threat,
    *,
    queries: int,
    bound: float,
    seed: int,
) -> None:
    """The reference's queries, each ended when the residual says that it cannot win.

    Its own class proposes, in its own order of random numbers, and is told margins; a query that
    seems to fool is put to the deployed predictor, cold, whose margin then counts. No gradient.

    Args:
        settled: state of each row to begin with.
        bound: see `calibrated`.
    """
    y = ledger.y[samples]
    kind: Any = type("CarriedSquare", (_Margins, reference_class("square", "SquareAttack")), {})
    attack = kind(
        None, norm=str(threat.norm), eps=threat.eps, n_queries=queries, p_init=0.8,
        n_restarts=1, seed=seed, resc_schedule=False, loss="margin", device=x.device,
    )  # fmt: skip
    attack.lockstep, attack.ledger, attack.samples, attack.bound = lockstep, ledger, samples, bound
    attack.state = JointState(settled.z.clone(), settled.adjoint)
    attack.best = x.new_full((len(x),), torch.inf)
    attack.init_hyperparam(x)
    torch.manual_seed(seed)
    _, end = attack.attack_single_run(x.clone(), y.clone())
    left = (~ledger.settled[samples]).nonzero().squeeze(1)
    ledger.offer(samples[left], threat.project(x[left], end[left]))


class _Margins:
    """What the reference's class asks of a model; it asks about the rows that are still right.

    Attributes:
        state: of the best point of each row.
        best: its margin, of the reference's sign: own logit minus the largest other.
    """

    lockstep: Lockstep
    ledger: Ledger
    samples: Counts
    bound: float
    state: JointState
    best: PerSample

    def margin_and_loss(self, images: Images, y: Labels) -> tuple[PerSample, PerSample]:
        """Margins of proposals, twice: the reference's `margin` loss is its margin."""
        rows = (self.best > 0).nonzero().squeeze(1)
        found, states = self._decided(images, y, rows)
        found = self._confirmed(images, rows, found)
        better = (found < self.best[rows]) | (found <= 0)
        self.best[rows[better]] = found[better]
        self.state.z[rows[better]] = states[better]
        return found, found

    def _decided(self, images: Images, y: Labels, rows: Counts) -> tuple[PerSample, Tensor]:
        """Margins, solved where they may be the best so far, and the states that they are of."""
        best, state = self.best[rows], self.state.take(rows)
        found, end = torch.full_like(best, torch.inf), state.z.clone()
        left = torch.arange(len(rows), device=rows.device)
        injection = self.lockstep.injection(images, state)
        for _ in range(STEPS):
            glance = self.lockstep.glance_into(injection, state)
            margins = -margins_of(glance.logits, y[left]).to(best)
            found[left], end[left] = margins, glance.state.z
            lost = margins - self.bound * glance.residual.to(best) > best[left]
            keep = (~lost & (glance.residual > ROUNDING)).nonzero().squeeze(1)
            if not len(keep):
                break
            left, state = left[keep], glance.state.take(keep)
            injection = take_rows(injection, keep)
        return found, end

    @torch.no_grad()
    def _confirmed(self, images: Images, rows: Counts, found: PerSample) -> PerSample:
        """The deployed predictor's margins, cold, where a proposal seems to fool it."""
        claims = (found <= 0).nonzero().squeeze(1)
        if len(claims):
            chosen = self.samples[rows[claims]]
            self.ledger.offer(chosen, images[claims])
            logits = self.ledger.deployed(images[claims]).logits
            found[claims] = -margins_of(logits, self.ledger.y[chosen]).to(found)
        return found
