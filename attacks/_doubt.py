"""Margins before their solve has ended, and how far they may be from its end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from robustdeq.attacks._ledger import margins_of

from robustdeq.equilibrium import Injection, JointState, Lockstep
from robustdeq.shapes import Images, Labels, PerSample

STEPS = 40
"""Most evaluations of the cell for one margin."""
ROUNDING = 1e-4
"""Relative residual at which a state counts as solved."""
_FLOOR = 0.02
"""Relative residual below which the error falls only linearly: the adjoint is of another point."""
_SHARE = 0.9
_MARGIN = 2.0
"""An estimate is reckoned to be off by at most twice what nine in ten are."""


class Estimate(NamedTuple):
    """One evaluation of the cell at a state.

    Attributes:
        margins: of the solved state, estimated: own logit minus the largest other.
        residual: relative, of the state before the evaluation.
        state: after it.
    """

    margins: PerSample
    residual: PerSample
    state: JointState


def estimated(
    lockstep: Lockstep, injection: Injection, state: JointState, y: Labels, scale: PerSample
) -> Estimate:
    """The dual-weighted residual: what is left of the solve moves the margin by adjoint . residual.

    Becker and Rannacher 2001, "An optimal control approach to a posteriori error estimation". Its
    error is of second order in the residual where the adjoint is the margin's at a point near by.

    Args:
        scale: what the state's adjoint is multiplied with; 0 does without the estimate.
    """
    glance = lockstep.glance_into(injection, state)
    step = (glance.state.z - state.z) / lockstep.dynamics.damping
    ahead = (state.adjoint * step).sum(tuple(range(1, step.dim()))).to(scale) * scale
    margins = -margins_of(glance.logits, y).to(scale) + torch.nan_to_num(ahead)
    return Estimate(margins, glance.residual.to(scale), glance.state)


class Doubt:
    """The largest error of an estimate that is reckoned with: it grows where an audit fails.

    Args:
        factor: of residual times (residual + 0.02).
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, residual: PerSample) -> PerSample:
        """For these relative residuals; 0 where the state is solved."""
        bound = self.factor * residual * (residual + _FLOOR)
        return torch.where(residual <= ROUNDING, 0.0, bound)

    def grow(self) -> None:
        """An estimate was further off than this."""
        self.factor *= 2


def calibrated(
    lockstep: Lockstep, state: JointState, x: Images, y: Labels, scale: PerSample
) -> Doubt:
    """What the errors of estimates are at candidates `x`.

    Args:
        state: settled for points that the candidates move, with the adjoint of the margin there.
    """
    injection = lockstep.injection(x, state)
    first = last = estimated(lockstep, injection, state, y, scale)
    for _ in range(STEPS - 1):
        if float(last.residual.max()) <= ROUNDING:
            break
        last = estimated(lockstep, injection, last.state, y, scale)
    height = first.residual
    ratio = (first.margins - last.margins).abs() / (height * (height + _FLOOR))
    ratio = ratio[(height > ROUNDING) & ratio.isfinite()]
    return Doubt(_MARGIN * float(ratio.quantile(_SHARE)) if len(ratio) else 1.0)
