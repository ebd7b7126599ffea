"""Broyden's good method (Broyden 1965), limited memory, batched per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustdeq.equilibrium.iteration import Method, Solver


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Quasi-Newton steps on g(z) = f(z) - z, from the inverse Jacobian estimate -I.

    Attributes:
        memory: rank of the estimate; when it is full, the estimate starts afresh from -I.
    """

    memory: int = 20

    def method(self) -> Method:
        """See `Solver.method`."""
        return _RankOneUpdates(self.memory)


class _RankOneUpdates(Method):
    """The inverse Jacobian as B = -I + sum_i u_i v_i^T."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.us: list[Tensor] = []
        self.vs: list[Tensor] = []
        self.previous: tuple[Tensor, Tensor] | None = None

    def advance(self, z: Tensor, fz: Tensor, gap: Tensor) -> Tensor:
        if self.previous is not None:
            self._update(z - self.previous[0], gap - self.previous[1])
        self.previous = (z, gap)
        return z - self._apply(gap)

    def _apply(self, g: Tensor) -> Tensor:
        out = -g
        for u, v in zip(self.us, self.vs, strict=True):
            out = out + u * _dot(v, g)
        return out

    def _apply_transposed(self, p: Tensor) -> Tensor:
        out = -p
        for u, v in zip(self.us, self.vs, strict=True):
            out = out + v * _dot(u, p)
        return out

    def _update(self, dz: Tensor, dg: Tensor) -> None:
        """Sherman-Morrison form: u = (dz - B dg) / (v^T dg) with v = B^T dz."""
        if len(self.us) == self.memory:
            self.us, self.vs = [], []
        v = self._apply_transposed(dz)
        pivot = _dot(v, dg)
        floor = 1e-10 * v.norm(dim=1, keepdim=True) * dg.norm(dim=1, keepdim=True)
        # Where the secant is degenerate (a frozen row moves by 0) the estimate stays as it was.
        usable = pivot.abs() > floor
        u = (dz - self._apply(dg)) / torch.where(usable, pivot, torch.ones_like(pivot))
        self.us.append(torch.where(usable, u, torch.zeros_like(u)))
        self.vs.append(v)

    def keep(self, rows: Tensor) -> None:
        self.us = [part[rows] for part in self.us]
        self.vs = [part[rows] for part in self.vs]
        if self.previous is not None:
            self.previous = (self.previous[0][rows], self.previous[1][rows])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)
