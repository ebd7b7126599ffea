"""Square on carried states: a query ends once it is decided, mostly after one evaluation."""

from __future__ import annotations

import torch
from robustdeq.attacks._doubt import ROUNDING, STEPS, Doubt, calibrated, estimated
from robustdeq.attacks._ledger import ROWS, Ledger
from robustdeq.attacks._losses import margin
from robustdeq.attacks._square import Proposals
from torch import Tensor

from robustdeq.equilibrium import JointState, Lockstep, take_rows
from robustdeq.shapes import Counts, Images, Logits, Mask, PerSample

_PAIRS = 256
"""Candidates that are looked at together: as many of each row as make this number."""
_AHEAD = 16
"""Most candidates of one row that are looked at together."""
_WASTE = 0.125
"""Share of the candidates that may be in vain because an earlier one of the row was taken."""
_REFRESH = 25
"""Queries after which a best point that has moved is looked at afresh,"""
_TOGETHER = 4
"""once so many rows, or a quarter of the live ones if these are more, wait for it."""
_FIRST = 8
"""Looks by which the first adjoint is found."""
_CALIBRATE = 4
"""Candidates of each row that the bound is calibrated on."""
_AUDIT = 200
"""One candidate in so many is solved to the end, to see whether ending early would have lost it."""


class CarriedSquare:
    """The reference's random search, with its candidates, its order and its rule of acceptance.

    Of each row the state and the margin's adjoint at its best point are kept. A candidate is
    looked at from there: its margin is estimated after every evaluation (`estimated`), and it is
    given up once it cannot be the best any more, taken once it cannot fail to be. A candidate that
    is the best point itself, for the window was there already, needs no evaluation at all. Some
    candidates are solved to the end whatever the estimate says; the bound grows where it was
    wrong. What seems to fool is put to the deployed predictor, cold, whose margin then counts.

    Several candidates of a row are looked at together, all from the same best point; the first
    that is taken makes the later ones void, so the search is the sequential one.

    Args:
        settled: state of each row to begin with.
        samples: the sample of each row.
        offered: the candidates of each row.
        most: rows of one look.
    """

    def __init__(
        self,
        lockstep: Lockstep,
        settled: JointState,
        ledger: Ledger,
        samples: Counts,
        offered: Proposals,
        most: int = ROWS,
    ) -> None:
        self.lockstep, self.ledger, self.samples = lockstep, ledger, samples
        self.offered, self.y, self.most = offered, ledger.y[samples], most
        self.doubt = Doubt(torch.inf)
        self.x = offered.begin.clone()
        self.z, self.adjoint = settled.z.clone(), torch.zeros_like(settled.z)
        self.scale = ledger.margin.new_zeros(len(samples))
        self.best = torch.full_like(self.scale, torch.inf)
        self.asked = torch.zeros_like(samples)
        self.due = torch.full_like(samples, torch.iinfo(samples.dtype).max)
        self.taken = 0.5

    @torch.no_grad()
    def run(self) -> None:
        """All queries; the ledger is offered what fools, and in the end all best points."""
        everything = torch.arange(len(self.samples), device=self.samples.device)
        best, z = self._decided(self.x, everything, torch.ones_like(self.samples, dtype=torch.bool))
        self.best, self.z = self._confirmed(everything, best), z
        self._look_at(self._live(), _FIRST)
        self._calibrate(self._live())
        while len(rows := self._live()):
            self._round(rows)
            due = ((self.due <= self.asked) & (self.best > 0)).nonzero().squeeze(1)
            if len(due) >= max(_TOGETHER, len(rows) // 4):
                self._look_at(due, 1)
        left = self.ledger.unsettled(self.samples)
        self.ledger.offer(self.samples[left], self.x[left])

    def _live(self) -> Counts:
        return ((self.best > 0) & (self.asked < self.offered.queries)).nonzero().squeeze(1)

    def _calibrate(self, rows: Counts) -> None:
        """The bound, from candidates of all sizes."""
        rows = rows.repeat_interleave(_CALIBRATE)[: self.most]
        if not len(rows):
            return
        place = torch.arange(len(rows), device=rows.device)
        queries = place * self.offered.queries // len(rows)
        images = self.offered.at(rows, queries, self.x[rows])
        state = JointState(self.z[rows], self.adjoint[rows])
        self.doubt = calibrated(self.lockstep, state, images, self.y[rows], self.scale[rows])

    def _round(self, live: Counts) -> None:
        """The next candidates of the rows."""
        depth = min(_AHEAD, max(1, _PAIRS // len(live)), max(1, int(2 * _WASTE / self.taken)))
        ahead = torch.arange(depth, device=live.device).repeat(len(live))
        rows = live.repeat_interleave(depth)
        queries = self.asked[rows] + ahead
        kept = queries < self.offered.queries
        rows, queries = rows[kept], queries[kept]
        images = self.offered.at(rows, queries, self.x[rows])
        moved = (images != self.x[rows]).flatten(1).any(1).nonzero().squeeze(1)
        self.asked[live] = (self.asked[live] + depth).clamp_max(self.offered.queries)
        rows, queries, images = rows[moved], queries[moved], images[moved]
        audited = (queries + self.samples[rows]) % _AUDIT == 0
        found, z = self._decided(images, rows, audited)
        first = _first(rows, found < self.best[rows])
        self._take(rows[first], queries[first], images[first], found[first], z[first])
        share = len(first) / (len(live) * depth)
        self.taken = max(0.9 * self.taken + 0.1 * share, 1e-3)

    def _take(
        self, rows: Counts, queries: Counts, images: Images, found: PerSample, z: Tensor
    ) -> None:
        """Make candidates the best points of their rows."""
        before = self.x[rows]
        self.x[rows] = images
        confirmed = self._confirmed(rows, found)
        worse = (confirmed >= self.best[rows]) & (confirmed > 0)
        self.x[rows[worse]] = before[worse]
        self.asked[rows] = queries + 1
        rows, better = rows[~worse], ~worse
        self.best[rows], self.z[rows] = confirmed[better], z[better].to(self.z)
        self.due[rows] = torch.minimum(self.due[rows], self.asked[rows] + _REFRESH)

    def _decided(self, images: Images, rows: Counts, audited: Mask) -> tuple[PerSample, Tensor]:
        """Margins, as exact as the decision needs them, and the states that they are of."""
        parts = [
            self._part(images[part], rows[part], audited[part])
            for part in torch.arange(len(rows), device=rows.device).split(self.most)
        ]
        if not parts:
            return self.best[:0], self.z[:0]
        return torch.cat([found for found, _ in parts]), torch.cat([z for _, z in parts])

    def _part(self, images: Images, rows: Counts, audited: Mask) -> tuple[PerSample, Tensor]:
        best, y, scale = self.best[rows], self.y[rows], self.scale[rows]
        state = JointState(self.z[rows], self.adjoint[rows])
        found, end = torch.full_like(best, torch.inf), state.z.clone()
        ended = torch.zeros_like(audited)
        left = torch.arange(len(rows), device=rows.device)
        injection = self.lockstep.injection(images, state)
        for _ in range(STEPS):
            estimate = estimated(self.lockstep, injection, state, y[left], scale[left])
            found[left], end[left] = estimate.margins, estimate.state.z
            gap, doubt = estimate.margins - best[left], self.doubt(estimate.residual)
            ended[left] |= gap > doubt
            decided = (gap.abs() > doubt) & ~audited[left]
            keep = (~decided & (estimate.residual > ROUNDING)).nonzero().squeeze(1)
            if not len(keep):
                break
            left, state = left[keep], estimate.state.take(keep)
            injection = take_rows(injection, keep)
        if bool((audited & ended & (found < best)).any()):
            self.doubt.grow()
        return found, end

    def _look_at(self, rows: Counts, looks: int) -> None:
        """State, adjoint and margin of some rows' best points, afresh."""
        for part in rows.split(self.most) if len(rows) else ():
            self._look(part, looks)

    def _look(self, rows: Counts, looks: int) -> None:
        y = self.y[rows]

        def loss(logits: Logits) -> PerSample:
            return -margin(logits, y)

        state = JointState(self.z[rows], self.adjoint[rows])
        for _ in range(looks):
            look = self.lockstep.look(self.x[rows], state, loss)
            state = look.state
        self.z[rows], self.adjoint[rows] = state.z, state.adjoint
        self.scale[rows] = look.slope.to(self.scale)
        injection = self.lockstep.injection(self.x[rows], state)
        estimate = estimated(self.lockstep, injection, state, y, self.scale[rows])
        self.best[rows] = self._confirmed(rows, estimate.margins)
        self.due[rows] = torch.iinfo(self.due.dtype).max

    def _confirmed(self, rows: Counts, found: PerSample) -> PerSample:
        """The deployed predictor's margins, cold, where a best point seems to fool it."""
        claims = (found <= 0).nonzero().squeeze(1)
        if len(claims):
            chosen = rows[claims]
            margins = self.ledger.offer(self.samples[chosen], self.x[chosen])
            found[claims] = -margins.to(found)
        return found


def _first(rows: Counts, better: Mask) -> Counts:
    """Of each row the first candidate that is better; rows are in order."""
    chosen = better.nonzero().squeeze(1)
    own = rows[chosen]
    new = torch.ones_like(own, dtype=torch.bool)
    new[1:] = own[1:] != own[:-1]
    return chosen[new]
