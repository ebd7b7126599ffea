"""Candidates that take some evaluations to decide, of many rows, looked at together."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from robustdeq.attacks._doubt import ROUNDING, STEPS, Doubt, estimated

from robustdeq.equilibrium import Injection, JointState, Lockstep, join_rows, take_rows
from robustdeq.shapes import Counts, Images, Labels, Mask, PerSample


class Begun(NamedTuple):
    """Candidates that are not decided yet.

    Attributes:
        rows: the search that each belongs to.
        queries: which candidate of that search it is.
        looks: evaluations so far.
        images, injection, state: the candidate, what the cell is given of it, and how far its
            solve is.
        audited: solved to the end, whatever the estimate says.
        ended: given up by an estimate, if it had not been audited.
    """

    rows: Counts
    queries: Counts
    looks: Counts
    images: Images
    injection: Injection
    state: JointState
    audited: Mask
    ended: Mask

    def take(self, chosen: Counts) -> Begun:
        """Some of them."""
        return Begun(
            rows=self.rows[chosen],
            queries=self.queries[chosen],
            looks=self.looks[chosen],
            images=self.images[chosen],
            injection=take_rows(self.injection, chosen),
            state=self.state.take(chosen),
            audited=self.audited[chosen],
            ended=self.ended[chosen],
        )

    def with_(self, other: Begun) -> Begun:
        """These, then others."""
        return Begun(
            rows=torch.cat([self.rows, other.rows]),
            queries=torch.cat([self.queries, other.queries]),
            looks=torch.cat([self.looks, other.looks]),
            images=torch.cat([self.images, other.images]),
            injection=join_rows(self.injection, other.injection),
            state=JointState(*map(torch.cat, zip(self.state, other.state, strict=True))),
            audited=torch.cat([self.audited, other.audited]),
            ended=torch.cat([self.ended, other.ended]),
        )


class Won(NamedTuple):
    """Candidates that are better than the best point of their row.

    Attributes:
        rows, queries, images: see `Begun`.
        found: their margins.
        z: the states that these are of.
    """

    rows: Counts
    queries: Counts
    images: Images
    found: PerSample
    z: torch.Tensor

    def take(self, chosen: Counts) -> Won:
        """Some of them."""
        return Won(*(part[chosen] for part in self))

    def with_(self, other: Won) -> Won:
        """These, then others."""
        return Won(*map(torch.cat, zip(self, other, strict=True)))


class Flight:
    """What is under way.

    The candidates of one row are all from the same best point, and the first that is better makes
    the later ones void, so that a row lands once the first of its candidates that is better, and
    all before it, are decided. Rows do not wait for one another: those that take long share each
    evaluation with those that have just begun.

    Args:
        most: candidates of one evaluation.
    """

    def __init__(self, lockstep: Lockstep, y: Labels, doubt: Doubt, most: int) -> None:
        self.lockstep, self.y, self.doubt, self.most = lockstep, y, doubt, most
        self.begun: Begun | None = None
        self.won: Won | None = None

    def launch(
        self, rows: Counts, queries: Counts, images: Images, audited: Mask, state: JointState
    ) -> None:
        """Begin with candidates, one at least, from the states of their best points."""
        embedded = [
            self.lockstep.injection(images[part], state.take(part))
            for part in torch.arange(len(rows), device=rows.device).split(self.most)
        ]
        injection, none = functools.reduce(join_rows, embedded), torch.zeros_like(rows)
        new = Begun(rows, queries, none, images, injection, state, audited, none.bool())
        self.begun = new if self.begun is None else self.begun.with_(new)

    def busy(self) -> Mask:
        """Which rows are under way."""
        busy = torch.zeros_like(self.y, dtype=torch.bool)
        for part in (self.begun, self.won):
            if part is not None:
                busy[part.rows] = True
        return busy

    def step(self, best: PerSample, scale: PerSample) -> None:
        """One evaluation of all that is not decided.

        Args:
            best: margins of the best points of all rows.
            scale: what their adjoints are multiplied with.
        """
        begun, self.begun = self.begun, None
        if begun is None:
            return
        order = torch.arange(len(begun.rows), device=begun.rows.device)
        parts = order.split(self.most)
        for part in parts:
            left, won = self._decided(begun if len(parts) == 1 else begun.take(part), best, scale)
            if len(left.rows):
                self.begun = left if self.begun is None else self.begun.with_(left)
            if len(won.rows):
                self.won = won if self.won is None else self.won.with_(won)
        self._void()

    def landed(self) -> Won | None:
        """The winners of the rows that are decided, one of each; they leave."""
        won = self.won
        if won is None:
            return None
        open_ = torch.zeros_like(self.y, dtype=torch.bool)
        if self.begun is not None:
            open_[self.begun.rows] = True
        waits = open_[won.rows]
        self.won = won.take(waits.nonzero().squeeze(1)) if bool(waits.any()) else None
        return won.take((~waits).nonzero().squeeze(1))

    def _decided(self, begun: Begun, best: PerSample, scale: PerSample) -> tuple[Begun, Won]:
        """What is left after one more evaluation, and what is better; the rest is given up."""
        rows = begun.rows
        estimate = estimated(self.lockstep, begun.injection, begun.state, self.y[rows], scale[rows])
        gap, doubt = estimate.margins - best[rows], self.doubt(estimate.residual)
        looks, ended = begun.looks + 1, begun.ended | (gap > doubt)
        over = (estimate.residual <= ROUNDING) | (looks >= STEPS)
        over |= (gap.abs() > doubt) & ~begun.audited
        better = over & (gap < 0)
        if bool((better & begun.audited & ended).any()):
            self.doubt.grow()
        begun = begun._replace(looks=looks, state=estimate.state, ended=ended)
        chosen = better.nonzero().squeeze(1)
        won = Won(
            rows[chosen], begun.queries[chosen], begun.images[chosen],
            estimate.margins[chosen], estimate.state.z[chosen],
        )  # fmt: skip
        return begun.take((~over).nonzero().squeeze(1)), won

    def _void(self) -> None:
        """Of each row forget what comes behind the first that is better."""
        if self.won is None:
            return
        first = torch.full_like(self.y, torch.iinfo(self.y.dtype).max)
        first.scatter_reduce_(0, self.won.rows, self.won.queries, "amin")
        self.won = self.won.take((self.won.queries == first[self.won.rows]).nonzero().squeeze(1))
        if self.begun is not None:
            kept = (self.begun.queries < first[self.begun.rows]).nonzero().squeeze(1)
            self.begun = self.begun.take(kept) if len(kept) else None
