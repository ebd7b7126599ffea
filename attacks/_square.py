"""The candidates of Square, drawn ahead, so that several of a row can be looked at together.

Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial attack via
random search"; the sizes, the patterns and the order of random numbers are the reference
implementation's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from robustdeq.attacks._reference import reference_class
from torch import Tensor

from robustdeq.shapes import Counts, Images
from robustdeq.threats import Norm, Threat

_DRAWN = 250
"""Queries whose random numbers are drawn at a time: signs are kept in a byte each."""


def proposals(x: Images, threat: Threat, queries: int, seed: int) -> Proposals:
    """Those of a threat's norm, for clean images `x`."""
    kind = LinfProposals if threat.norm is Norm.LINF else L2Proposals
    return kind(x, threat.eps, queries, seed)


class Proposals(ABC):
    """One random search per image; all of them see the same windows.

    Args:
        x: clean images.
        queries: most queries per image.
    """

    fewest = 1
    """Least side of a window."""

    def __init__(self, x: Images, eps: float, queries: int, seed: int) -> None:
        self.x, self.eps, self.queries = x, eps, queries
        norm = "Linf" if isinstance(self, LinfProposals) else "L2"
        self.reference: Any = reference_class("square", "SquareAttack")(
            None, norm=norm, eps=eps, n_queries=queries, p_init=0.8, n_restarts=1, seed=seed,
            resc_schedule=False, loss="margin", device=x.device,
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.sides = torch.tensor([self._side(k) for k in range(queries)])
        self.begin = self._begun()
        self._draw()

    @abstractmethod
    def at(self, rows: Counts, queries: Counts, best: Images) -> Images:
        """Candidates for some rows.

        Args:
            rows: the image of each.
            queries: which query of that image it is, from 0.
            best: the image's best point so far.
        """

    @abstractmethod
    def _begun(self) -> Images:
        """The first points."""

    @abstractmethod
    def _draw(self) -> None:
        """The random numbers of all queries."""

    def _side(self, query: int) -> int:
        """Of the window of a query, in pixels."""
        height, width = self.x.shape[2:]
        side: int = round(math.sqrt(self.reference.p_selection(query) * height * width))
        return min(max(side, self.fewest), height, width)

    def _corners(self, share: Tensor, length: int) -> Counts:
        return ((length - self.sides) * share).long().to(self.x.device)

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _window(self, top: Counts, left: Counts, sides: Counts) -> Tensor:
        """(rows, 1, height, width): where each row's window is."""
        height, width = (torch.arange(k, device=self.x.device) for k in self.x.shape[2:])
        top, left, sides = top[:, None], left[:, None], sides[:, None].to(top)
        down = (height >= top) & (height < top + sides)
        across = (width >= left) & (width < left + sides)
        return (down[:, :, None] & across[:, None, :])[:, None]


class LinfProposals(Proposals):
    """Stripes to begin with, then a window's channels moved by twice epsilon up or down."""

    def _begun(self) -> Images:
        n, channels, _, width = self.x.shape
        signs = _signs(self._rand(n, channels, 1, width)).to(self.x)
        return (self.x + self.eps * signs).clamp(0.0, 1.0)

    def _draw(self) -> None:
        drawn = self._rand(self.queries, 2 + self.x.shape[1])
        self.top = self._corners(drawn[:, 0], self.x.shape[2])
        self.left = self._corners(drawn[:, 1], self.x.shape[3])
        self.signs = _signs(drawn[:, 2:]).to(self.x)
        self.sides = self.sides.to(self.x.device)

    def at(self, rows: Counts, queries: Counts, best: Images) -> Images:
        """See `Proposals`."""
        window = self._window(self.top[queries], self.left[queries], self.sides[queries])
        moved = best + window * (2.0 * self.eps * self.signs[queries][:, :, None, None])
        clean = self.x[rows]
        return moved.clamp(clean - self.eps, clean + self.eps).clamp(0.0, 1.0)


class L2Proposals(Proposals):
    """Pyramids; a window takes the length that it, and another one that is emptied, had.

    The reference draws signs for the images that still stand, here each image has its own: the
    same numbers until the first image falls.
    """

    fewest = 3

    def _side(self, query: int) -> int:
        side = super()._side(query)
        height, width = self.x.shape[2:]
        return min(side + 1 - side % 2, height, width)

    def _begun(self) -> Images:
        n, channels, height, width = self.x.shape
        side = max(height // 5, 1)
        first = max((height - 5 * side) // 2, 0)
        delta = torch.zeros_like(self.x)
        for top in range(first, first + side * (height // side), side):
            for left in range(first, first + side * (width // side), side):
                pattern = self._pattern(side, bool(self._rand(1) > 0.5))
                signs = _signs(self._rand(n, channels, 1, 1)).to(self.x)
                part = delta[:, :, top : top + side, left : left + side]
                part += pattern[: part.shape[2], : part.shape[3]] * signs
        return (self.x + self.eps * _unit(delta)).clamp(0.0, 1.0)

    def _draw(self) -> None:
        n, channels, height, width = self.x.shape
        places, signs = [], []
        for begin in range(0, self.queries, _DRAWN):
            count = min(_DRAWN, self.queries - begin)
            drawn = self._rand(count, 5 + n * channels)
            places.append(drawn[:, :5])
            signs.append(_signs(drawn[:, 5:]).to(torch.int8).view(count, n, channels))
        place = torch.cat(places)
        self.signs = torch.cat(signs).to(self.x.device)
        self.top, self.left = self._corners(place[:, 0], height), self._corners(place[:, 1], width)
        self.other = self._corners(place[:, 2], height), self._corners(place[:, 3], width)
        self.turned = place[:, 4] > 0.5

    def at(self, rows: Counts, queries: Counts, best: Images) -> Images:
        """See `Proposals`."""
        out = torch.empty_like(best)
        sides = self.sides[queries.cpu()]
        for side in sides.unique().tolist():
            chosen = (sides == side).nonzero().squeeze(1).to(best.device)
            out[chosen] = self._moved(rows[chosen], queries[chosen], best[chosen], int(side))
        return out

    def _moved(self, rows: Counts, queries: Counts, best: Images, side: int) -> Images:
        clean = self.x[rows]
        delta = best - clean
        sides = torch.full_like(queries, side)
        into = self._window(self.top[queries], self.left[queries], sides)
        emptied = self._window(self.other[0][queries], self.other[1][queries], sides)
        span = torch.arange(side, device=best.device)
        down = (self.top[queries][:, None] + span)[:, :, None]
        across = (self.left[queries][:, None] + span)[:, None, :]
        row = torch.arange(len(rows), device=best.device)[:, None, None]
        old = delta[row, :, down, across].permute(0, 3, 1, 2)
        new = self._patterns(rows, queries, side) + old / (1e-12 + _lengths(old))
        free = (self.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0.0)
        length = (free / best.shape[1] + _lengths(delta * (into | emptied)).square()).sqrt()
        new = new / (1e-12 + _lengths(new)) * length
        delta = delta * ~emptied
        delta[row, :, down, across] = new.permute(0, 2, 3, 1)
        return (clean + self.eps * _unit(delta)).clamp(0.0, 1.0)

    def _patterns(self, rows: Counts, queries: Counts, side: int) -> Tensor:
        """(rows, channels, side, side): pyramids of each row's signs."""
        turned = self.turned[queries.cpu()].to(self.x.device).view(-1, 1, 1, 1)
        pattern = torch.where(turned, self._pattern(side, True), self._pattern(side, False))
        return pattern * self.signs[queries, rows][:, :, None, None]

    def _pattern(self, side: int, turned: bool) -> Tensor:
        """The reference's two pyramids of opposite sign, of length 1."""
        half = side // 2
        upper = self.reference.eta_rectangles(half, side) if half else self.x.new_zeros(0, side)
        lower: Tensor = -self.reference.eta_rectangles(side - half, side)
        whole = torch.cat([upper, lower]).to(self.x)
        unit: Tensor = whole / torch.linalg.vector_norm(whole)
        return unit.t() if turned else unit


def _signs(uniform: Tensor) -> Tensor:
    return (2 * uniform - 1).sign()


def _lengths(delta: Tensor) -> Tensor:
    """(rows, channels, 1, 1)."""
    return delta.square().sum((2, 3), keepdim=True).sqrt()


def _unit(delta: Tensor) -> Tensor:
    return delta / (delta.square().sum((1, 2, 3), keepdim=True).sqrt() + 1e-12)
