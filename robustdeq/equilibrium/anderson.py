"""Anderson acceleration (Anderson 1965; type II, as in Walker and Ni 2011), batched per sample."""

from __future__ import annotations

from contextlib import nullcontext
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
        regularization: relative to the diagonal of the Gram matrix, times `memory`; at least a few
            roundings. An absolute one (1e-4 in torchdeq) swamps that matrix near convergence and
            stalls at residuals of 1e-3.
    """

    memory: int = 5
    mixing: float = 1.0
    regularization: float = 1e-8

    def method(self) -> Method:
        """See `Solver.method`."""
        return _Mixture(self.memory, self.mixing, self.regularization)


class _Mixture(Method):
    """The weights of the last evaluations, and their mixture."""

    def __init__(self, memory: int, mixing: float, regularization: float) -> None:
        self.memory, self.mixing, self.regularization = memory, mixing, regularization
        self.taken = 0
        self.window: _Window | None = None

    def advance(self, z: Tensor, fz: Tensor, gap: Tensor) -> Tensor:
        if self.window is None:
            self.window = _Window(gap, self.memory, self.regularization)
        slot, self.taken = self.taken % self.memory, self.taken + 1
        size = min(self.taken, self.memory)
        # Autocast would round the products, and with them the weights, to half precision.
        device = fz.device.type
        rounds = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if rounds else nullcontext():
            self.window.write(slot, size, fz, gap)
            if size == 1:
                return z + self.mixing * gap
            return self._mixed(self.window, slot, size).to(fz.dtype)

    def _mixed(self, window: _Window, slot: int, size: int) -> Tensor:
        alpha = weights(window.regularized(size), slot).to(window.gaps.dtype)
        mixed = _combination(alpha, window.images[:, :size])
        if self.mixing == 1.0:
            return mixed
        return mixed - (1.0 - self.mixing) * _combination(alpha, window.gaps[:, :size])

    def keep(self, rows: Tensor) -> None:
        if self.window is not None:
            self.window.keep(rows)


class _Window:
    """The last evaluations in rings (rows, memory, D), and the Gram matrix of their gaps.

    A new evaluation overwrites the oldest, and with it one row and column of the matrix, which is
    in float64; the order within a ring means nothing.
    """

    def __init__(self, gap: Tensor, memory: int, regularization: float) -> None:
        rows, width = gap.shape
        dtype = torch.promote_types(gap.dtype, torch.float32)
        # One block: the C library keeps freed memory for the next solve only up to about the
        # largest block it has seen, and to be given it anew took as long as the mixing.
        rings = gap.new_empty((2, rows, memory, width), dtype=dtype)
        self.images, self.gaps = rings[0], rings[1]
        self.gram = gap.new_empty((rows, memory, memory), dtype=torch.float64)
        eye = torch.eye(memory, dtype=torch.float64, device=gap.device)
        relative = max(regularization, 4 * torch.finfo(dtype).eps)
        self.inflation = 1.0 + memory * relative * eye
        # A gap of 0 marks a solution, which outweighs all others.
        self.floor = 1e-300 * eye

    def write(self, slot: int, size: int, fz: Tensor, gap: Tensor) -> None:
        """Put an evaluation into a slot; `size` slots are then in use."""
        if torch.is_grad_enabled():  # the graph of the last mixture needs what that has read
            self.images, self.gaps = self.images.clone(), self.gaps.clone()
            self.gram = self.gram.clone()
        self.images[:, slot], self.gaps[:, slot] = fz, gap
        row = _products(self.gaps[:, :size], self.gaps[:, slot])
        self.gram[:, slot, :size] = row
        self.gram[:, :size, slot] = row

    def regularized(self, size: int) -> Tensor:
        """The Gram matrix of the slots in use, with a diagonal larger by a relative amount.

        Relative to each of its entries: near convergence the newest gap is orders of magnitude
        smaller than the oldest, and would vanish under a common regularization.
        """
        part = (slice(None, size), slice(None, size))
        return torch.addcmul(
            self.floor[part], self.gram[:, :size, :size], self.inflation[part]
        )  # fmt: skip

    def keep(self, rows: Tensor) -> None:
        """Only these rows, which ascend: in the same memory, a slot at a time."""
        parts = [self.images, self.gaps, self.gram]
        if torch.is_grad_enabled():
            self.images, self.gaps, self.gram = (part.index_select(0, rows) for part in parts)
            return
        for part in parts:
            for slot in range(part.shape[1]):
                part[: len(rows), slot] = part[:, slot].index_select(0, rows)
        self.images, self.gaps, self.gram = (part[: len(rows)] for part in parts)


def weights(gram: Tensor, newest: int) -> Tensor:
    """Argmin |sum_i a_i g_i| subject to sum_i a_i = 1, from Gram matrices (rows, n, n).

    a ~ gram^-1 1, by Cholesky factorization: it rounds every entry relative to its own row and
    column, so that gaps of all magnitudes go together unscaled. All weight to the slot `newest`
    where that fails.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    alpha = torch.cholesky_solve(gram.new_ones(*gram.shape[:2], 1), factor).squeeze(2)
    inverse = alpha.sum(1).reciprocal()
    alpha = alpha * inverse[:, None]
    # The sum is positive for a positive definite matrix; a NaN is not.
    usable = (info == 0) & (inverse > 0)
    if usable.device.type == "cpu" and bool(usable.all()):
        return alpha
    plain = torch.zeros_like(alpha)
    plain[:, newest] = 1.0
    return torch.where(usable[:, None], alpha, plain)


def _products(stack: Tensor, vector: Tensor) -> Tensor:
    """Inner products (rows, n) of the vectors of a stack (rows, n, D) with one (rows, D)."""
    if stack.is_cuda:
        # Matrix units may round to TF32, as the caller has allowed for the model.
        return (stack * vector[:, None]).sum(2)
    # With the vector on the right it takes ten times as long.
    return torch.bmm(vector[:, None], stack.transpose(1, 2)).squeeze(1)


def _combination(weights: Tensor, stack: Tensor) -> Tensor:
    """The vectors of a stack (rows, n, D), combined with weights (rows, n)."""
    if stack.is_cuda:
        return (weights[:, :, None] * stack).sum(1)
    return torch.bmm(weights[:, None], stack).squeeze(1)
