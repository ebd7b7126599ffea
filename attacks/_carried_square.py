"""Square on carried states: a query ends once it is decided, mostly after one evaluation."""

from __future__ import annotations

import torch
from robustdeq.attacks._doubt import Doubt, calibrated, estimated
from robustdeq.attacks._flight import Flight, Won
from robustdeq.attacks._ledger import ROWS, Ledger
from robustdeq.attacks._losses import margin
from robustdeq.attacks._square import Proposals

from robustdeq.equilibrium import JointState, Lockstep
from robustdeq.shapes import Counts, Logits, Mask, PerSample

_PAIRS = 256
"""Candidates that are looked at together: as many of each row as make this number."""
_AHEAD = 64
"""Most candidates of one row that are looked at together."""
_FADING = 0.9
"""What the shares of earlier candidates count for, at each launch."""
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
    that is taken makes the later ones void, so the search is the sequential one. See `Flight`.

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
        self.taken, self.launched = 0.5, 1.0

    @torch.no_grad()
    def run(self) -> None:
        """All queries; the ledger is offered what fools, and in the end all best points."""
        self._begin()
        self._look_at(self._live(), _FIRST)
        self._calibrate(self._live())
        flight = Flight(self.lockstep, self.y, self.doubt, self.most)
        while True:
            live, busy = self._live(), flight.busy()
            if not len(live) and not bool(busy.any()):
                break
            self._launch(flight, live[~busy[live]], len(live))
            flight.step(self.best, self.scale)
            self._land(flight)
            self._refresh(len(live), flight.busy())
        left = self.ledger.unsettled(self.samples)
        self.ledger.offer(self.samples[left], self.x[left])

    def _begin(self) -> None:
        """States and margins of the first points, each as a candidate before all others."""
        rows = torch.arange(len(self.samples), device=self.samples.device)
        flight = Flight(self.lockstep, self.y, self.doubt, self.most)
        whole = torch.ones_like(rows, dtype=torch.bool)
        flight.launch(rows, rows.new_full(rows.shape, -1), self.x, whole, self._state(rows))
        while bool(flight.busy().any()):
            flight.step(self.best, self.scale)
            won = flight.landed()
            if won is not None and len(won.rows):
                self._take(won)

    def _state(self, rows: Counts) -> JointState:
        """Of the best points of some rows."""
        return JointState(self.z[rows], self.adjoint[rows])

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
        state = self._state(rows)
        self.doubt = calibrated(self.lockstep, state, images, self.y[rows], self.scale[rows])

    def _launch(self, flight: Flight, rows: Counts, live: int) -> None:
        """The next candidates of rows that have none under way.

        Args:
            live: rows whose search goes on, these and others.
        """
        if not len(rows):
            return
        share = max(self.taken / self.launched, 1e-3)
        depth = min(_AHEAD, max(1, _PAIRS // live), max(1, int(2 * _WASTE / share)))
        self.launched = _FADING * self.launched + depth * len(rows)
        self.taken *= _FADING
        ahead = torch.arange(depth, device=rows.device).repeat(len(rows))
        each = rows.repeat_interleave(depth)
        queries = self.asked[each] + ahead
        kept = queries < self.offered.queries
        each, queries = each[kept], queries[kept]
        images = self.offered.at(each, queries, self.x[each])
        self.asked[rows] = (self.asked[rows] + depth).clamp_max(self.offered.queries)
        moved = (images != self.x[each]).flatten(1).any(1).nonzero().squeeze(1)
        if len(moved):
            each, queries = each[moved], queries[moved]
            state = self._state(each)
            audited = (queries + self.samples[each]) % _AUDIT == 0
            flight.launch(each, queries, images[moved], audited, state)

    def _land(self, flight: Flight) -> None:
        """What won becomes the best point of its row."""
        won = flight.landed()
        if won is not None and len(won.rows):
            self.taken += len(won.rows)
            self._take(won)

    def _refresh(self, live: int, busy: Mask) -> None:
        """Look afresh at best points that have moved, once enough of them wait for it."""
        due = ((self.due <= self.asked) & (self.best > 0) & ~busy).nonzero().squeeze(1)
        if len(due) >= max(_TOGETHER, live // 4):
            self._look_at(due, 1)

    def _take(self, won: Won) -> None:
        """Make candidates the best points of their rows, one of each."""
        rows = won.rows
        before = self.x[rows]
        self.x[rows] = won.images
        confirmed = self._confirmed(rows, won.found)
        worse = (confirmed >= self.best[rows]) & (confirmed > 0)
        self.x[rows[worse]] = before[worse]
        self.asked[rows] = won.queries + 1
        rows, better = rows[~worse], ~worse
        self.best[rows], self.z[rows] = confirmed[better], won.z[better].to(self.z)
        self.due[rows] = torch.minimum(self.due[rows], self.asked[rows] + _REFRESH)

    def _look_at(self, rows: Counts, looks: int) -> None:
        """State, adjoint and margin of some rows' best points, afresh."""
        for part in rows.split(self.most) if len(rows) else ():
            self._look(part, looks)

    def _look(self, rows: Counts, looks: int) -> None:
        y = self.y[rows]

        def loss(logits: Logits) -> PerSample:
            return -margin(logits, y)

        state = self._state(rows)
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
