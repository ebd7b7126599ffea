"""Anderson acceleration (Anderson 1965; type II, as in Walker and Ni 2011), batched per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustdeq.equilibrium.iteration import Method, Solver


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Mixes the last `memory` evaluations so as to minimize their combined residual.

    Attributes:
        memory: how many past iterates are mixed.
        mixing: weight of f(z) against z in the mixture, in (0, 1].
        regularization: relative to the trace of the Gram matrix. An absolute one (1e-4 in
            torchdeq) swamps that matrix near convergence and stalls at residuals of 1e-3.
    """

    memory: int = 5
    mixing: float = 1.0
    regularization: float = 1e-8

    def method(self) -> Method:
        """See `Solver.method`."""
        return _Mixture(self.memory, self.mixing, self.regularization)


class _Mixture(Method):
    def __init__(self, memory: int, mixing: float, regularization: float) -> None:
        self.memory, self.mixing, self.regularization = memory, mixing, regularization
        self.images: list[Tensor] = []
        self.gaps: list[Tensor] = []

    def advance(self, z: Tensor, fz: Tensor) -> Tensor:
        self.images = [*self.images, fz][-self.memory :]
        self.gaps = [*self.gaps, fz - z][-self.memory :]
        if len(self.gaps) == 1:
            return z + self.mixing * (fz - z)
        gaps = torch.stack(self.gaps, 1)
        alpha = self._weights(gaps).to(fz.dtype)
        mixed = torch.einsum("bm,bmd->bd", alpha, torch.stack(self.images, 1))
        if self.mixing == 1.0:
            return mixed
        return mixed - (1.0 - self.mixing) * torch.einsum("bm,bmd->bd", alpha, gaps)

    def _weights(self, gaps: Tensor) -> Tensor:
        """Argmin |sum_i a_i g_i| subject to sum_i a_i = 1: a ~ (G Gt + r I)^-1 1."""
        gaps = gaps.double()
        gram = torch.bmm(gaps, gaps.transpose(1, 2))
        size = gram.shape[1]
        # Equilibrated to a unit diagonal: near convergence the newest gap is orders of magnitude
        # smaller than the oldest, and would vanish under any common regularization.
        scale = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
        scaled = gram * scale[:, :, None] * scale[:, None, :]
        ridge = self.regularization * size * torch.eye(size, dtype=gram.dtype, device=gram.device)
        solution, info = torch.linalg.solve_ex(scaled + ridge, scale[:, :, None])
        alpha = (solution * scale[:, :, None]).squeeze(2)
        alpha = alpha / alpha.sum(1, keepdim=True)
        usable = (info == 0) & alpha.isfinite().all(1)
        newest = torch.zeros_like(alpha)
        newest[:, -1] = 1.0
        return torch.where(usable[:, None], alpha, newest)

    def keep(self, rows: Tensor) -> None:
        self.images = [part[rows] for part in self.images]
        self.gaps = [part[rows] for part in self.gaps]
