"""Plain (Picard) iteration, damped if wanted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustdeq.equilibrium.iteration import Method, Solver


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Solver):
    """z <- z + damping * (f(z) - z); converges where f is a contraction.

    The answer is the last iterate: with `tolerance=0` and `max_steps=K` exactly the K-th. The
    residual is that of the step before, which for a contraction bounds the answer's own.
    """

    damping: float = 1.0

    def method(self) -> Method:
        """See `Solver.method`."""
        return _Picard(self.damping)


class _Picard(Method):
    returns_best = False

    def __init__(self, damping: float) -> None:
        self.damping = damping

    def advance(self, z: Tensor, fz: Tensor, gap: Tensor) -> Tensor:
        return fz if self.damping == 1.0 else z + self.damping * gap
