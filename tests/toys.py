"""Small models whose derivatives or robust accuracies are known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustdeq.equilibrium import EquilibriumClassifier, FixedPoint, SolveGradient, Solver


class ToyEquilibrium(EquilibriumClassifier):
    """z = tanh(W z + U x), float64, with |W|_2 = rho: every derivative is known in closed form."""

    def __init__(
        self,
        solver: Solver | None = None,
        gradient: SolveGradient | None = None,
        *,
        size: int = 12,
        pixels: int = 9,
        classes: int = 4,
        rho: float = 0.7,
        seed: int = 0,
    ) -> None:
        super().__init__(solver or FixedPoint(tolerance=1e-13, max_steps=500), gradient)
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

        w = matrix(size, size)
        self.w = nn.Parameter(w / torch.linalg.matrix_norm(w, 2) * rho)
        self.u = nn.Parameter(matrix(size, pixels))
        self.r = nn.Parameter(matrix(classes, size))

    def embed(self, x: Tensor) -> Tensor:
        return x.flatten(1).to(self.u) @ self.u.T

    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
        return torch.tanh(z @ self.w.T + injection)

    def readout(self, z: Tensor) -> Tensor:
        return z @ self.r.T

    def dense_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and d(sum of logsumexp)/dx by Newton's method and a dense linear solve."""
        u = self.embed(x)
        z = torch.zeros_like(u)
        eye = torch.eye(z.shape[1], dtype=z.dtype)
        for _ in range(100):
            f = torch.tanh(z @ self.w.T + u)
            jacobian = (1 - f**2)[:, :, None] * self.w
            z = z - torch.linalg.solve(jacobian - eye, (f - z)[:, :, None]).squeeze(2)
        slope = 1 - torch.tanh(z @ self.w.T + u) ** 2
        jacobian = slope[:, :, None] * self.w
        logits = z @ self.r.T
        v = torch.linalg.solve((eye - jacobian).transpose(1, 2), torch.softmax(logits, 1) @ self.r)
        return logits.detach(), ((v * slope) @ self.u).view_as(x).detach()


class Linear(nn.Module):
    """A linear classifier, whose robust accuracy under Linf and L2 has a closed form."""

    def __init__(self, pixels: int = 64, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T
