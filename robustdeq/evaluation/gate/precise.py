"""The model in double precision where it has one, for differences that rounding would drown."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from robustdeq.evaluation.gate.examined import Examined, seeded_logits
from robustdeq.shapes import Images
from robustdeq.targets import Target

ROWS = 2**18
"""Pixels in one forward pass of the difference quotients, about."""
AGREEMENT = 1e-3
"""Relative difference of logits up to which the copy counts as the same model."""


class Precise(NamedTuple):
    """A view of the model for difference quotients.

    Attributes:
        step: the small step, in L2 norm; float32 needs a larger one.
    """

    target: Target
    dtype: torch.dtype
    step: float


def precise(exam: Examined) -> Precise:
    """A float64 copy if it can be made and gives the model's logits; else the model as it is."""
    pixels = exam.x[0].numel()
    most = max(ROWS // pixels, 1)
    size = min(exam.target.batch_size or most, most)
    target = _doubled(exam, size)
    if target is not None:
        return Precise(target, torch.float64, 1e-4)
    target = Target(exam.target.model, exam.target.classes, batch_size=size)
    return Precise(target, exam.dtype or torch.float32, 3e-3)


def _doubled(exam: Examined, size: int) -> Target | None:
    try:
        model = copy.deepcopy(exam.target.model).double()
        target = Target(model, exam.target.classes, batch_size=size)
        logits = seeded_logits(target, exam.few.double(), 1)
    except Exception:  # float32 constants, hooks and handles that cannot be copied, and the like
        return None
    same = logits.dtype == torch.float64 and float(exam.move(exam.first.double(), logits).max())
    return target if same is not False and same <= AGREEMENT else None


def inside(x: Images, margin: float) -> Images:
    """Images drawn in from the edges of the box, so that a step to either side stays in it."""
    return x * (1.0 - 2.0 * margin) + margin
