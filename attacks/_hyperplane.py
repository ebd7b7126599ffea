"""The nearest point of a hyperplane within the box of valid pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdeq.shapes import PerSample
from robustdeq.threats import Norm

_MOST = 64
"""Newton steps; each passes one kink at least, and a handful is enough."""


def onto(x: Tensor, normal: Tensor, offset: PerSample, norm: Norm) -> Tensor:
    """The shortest move of each row of `x` onto normal . z = offset, staying in [0, 1].

    Where the box does not reach the hyperplane, the move to its nearest corner. Moves grow with
    one multiplier until they meet the box: how far they lead is concave in it and piecewise
    linear, so Newton's method from 0 never overshoots and ends at the solution (Croce and Hein
    2020, "Minimally distorted Adversarial Examples...", section 2.3, solve by sorting).

    Args:
        x: (rows, pixels), in [0, 1].
        normal: (rows, pixels).
    """
    missing = offset - (normal * x).sum(1)
    normal = normal * torch.where(missing < 0, -1.0, 1.0).to(x)[:, None]
    size = normal.abs()
    room = torch.where(normal > 0, 1.0 - x, x) * (size > 0)
    speed = torch.ones_like(size) if norm is Norm.LINF else size
    multiplier = _multiplier(size * speed, size * room, missing.abs())
    return torch.minimum(multiplier[:, None] * speed, room) * normal.sign()


def _multiplier(rates: Tensor, caps: Tensor, goal: PerSample) -> PerSample:
    """T with sum(min(t * rates, caps)) = goal, infinite where the caps do not add up to it."""
    t = torch.zeros_like(goal)
    for _ in range(_MOST):
        free = t[:, None] * rates < caps
        slope = (rates * free).sum(1)
        reached = (caps * ~free).sum(1)
        following = (goal - reached) / slope
        following = torch.where(slope > 0, following, torch.inf).clamp_min(0.0)
        if not bool((following > t * (1 + 1e-6)).any()):
            return following.nan_to_num(0.0, posinf=torch.finfo(t.dtype).max)
        t = torch.maximum(t, following)
    return t.nan_to_num(0.0, posinf=torch.finfo(t.dtype).max)
