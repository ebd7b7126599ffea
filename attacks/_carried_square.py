"""The reference Square with states that are carried, and queries that end once they are decided."""

from __future__ import annotations

from typing import Any

import torch
from robustdeq.attacks._ledger import Ledger, margins_of
from robustdeq.attacks._reference import square_class
from torch import Tensor

from robustdeq.equilibrium import JointState, Lockstep
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
    base = square_class()

    class Square(base):  # type: ignore[misc]
        best: Tensor | None = None

        def margin_and_loss(self, images: Images, _: Labels) -> tuple[PerSample, PerSample]:
            if self.best is None:
                self.state = JointState(settled.z.clone(), settled.adjoint)
                rows = torch.arange(len(x), device=x.device)
                self.best = x.new_full((len(x),), torch.inf)
            else:
                rows = (self.best > 0).nonzero().squeeze(1)
            found, states = self._decided(images, rows)
            better = (found < self.best[rows]) | (found <= 0)
            self.best[rows[better]] = found[better]
            self.state.z[rows[better]] = states[better]
            return found, found

        def _decided(self, images: Images, rows: Counts) -> tuple[PerSample, Tensor]:
            """The reference's margins: own logit minus the largest other; exact where they win."""
            best = self.best[rows]
            found = torch.full_like(best, torch.inf)
            state = self.state.take(rows)
            end = state.z.clone()
            open_ = torch.arange(len(rows), device=rows.device)
            for _ in range(STEPS):
                glance = lockstep.glance(images[open_], state)
                state = glance.state
                margins = -margins_of(glance.logits, y[rows[open_]]).to(best)
                error = bound * glance.residual.to(best)
                found[open_], end[open_] = margins, state.z
                lost = margins - error > best[open_]
                keep = ~lost & (glance.residual > ROUNDING)
                if not bool(keep.any()):
                    break
                open_, state = open_[keep], state.take(keep.nonzero().squeeze(1))
            return self._confirmed(images, rows, found), end

        def _confirmed(self, images: Images, rows: Counts, found: PerSample) -> PerSample:
            claims = (found <= 0).nonzero().squeeze(1)
            if len(claims):
                chosen = samples[rows[claims]]
                ledger.offer(chosen, images[claims])
                with torch.no_grad():
                    logits = ledger.deployed(images[claims]).logits
                found[claims] = -margins_of(logits, y[rows[claims]]).to(found)
            return found

    attack: Any = Square(
        None, norm=str(threat.norm), eps=threat.eps, n_queries=queries, p_init=0.8,
        n_restarts=1, seed=seed, resc_schedule=False, loss="margin", device=x.device,
    )  # fmt: skip
    attack.init_hyperparam(x)
    torch.manual_seed(seed)
    _, end = attack.attack_single_run(x.clone(), y.clone())
    left = (~ledger.settled[samples]).nonzero().squeeze(1)
    ledger.offer(samples[left], threat.project(x[left], end[left]))
