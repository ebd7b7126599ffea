"""Whether the honest gradient exists, is a number, is not 0, and survives the usual loss."""

from __future__ import annotations

import torch

from robustdeq.evaluation.gate.examined import SEED, Examined
from robustdeq.evaluation.gate.losses import (
    Loss,
    cosine,
    cross_entropy,
    input_gradient,
    margin,
)
from robustdeq.evaluation.gate.rows import Row, measured
from robustdeq.evaluation.judge import seeded
from robustdeq.shapes import Images, Labels, Mask

NEIGHBORS = 4
"""Points around each image at which its gradient is looked at again."""
NEAR = 0.25
"""Their distance, relative to the threat's radius."""
PIXEL = 0.03
"""Most that a pixel moves: over large radii honest gradients turn as well."""


def existence(exam: Examined) -> list[Row]:
    """Whether logits depend on the image in autograd's eyes at all."""
    x = exam.few[:2].clone().requires_grad_()
    with seeded(SEED, x.device), torch.enable_grad():
        logits = exam.target.model(x if exam.dtype is None else x.to(exam.dtype))
        reached = bool(logits.requires_grad)
        if reached:
            (gradient,) = torch.autograd.grad(logits.sum(), x, allow_unused=True)
            reached = gradient is not None
    detail = "" if reached else "the graph does not lead from the logits back to the image"
    return [measured("gradient_missing", float(not reached), len(exam.few), detail)]


def values(exam: Examined) -> list[Row]:
    """Finite, not 0, and not 0 for cross-entropy where the margin has one."""
    slope = _gradient(exam, exam.few, exam.labels, margin)
    finite, zero = slope.flatten(1).isfinite().all(1), _zero(slope)
    of_entropy = _gradient(exam, exam.few, exam.labels, cross_entropy)
    saturated = _zero(of_entropy) & ~zero
    n = len(slope)
    return [
        measured("nonfinite_gradient", _share(~finite), n),
        measured("zero_gradient", _share(zero), n),
        measured("saturated_logits", _share(saturated), n, _saturation(exam)),
    ]


def shattering(exam: Examined) -> list[Row]:
    """Whether gradients of neighboring points have anything to do with each other.

    A gradient that turns within a quarter of the ball, and within changes that nobody would see, is
    right where it stands and leads nowhere: an input warped at a high frequency, or noise that is
    a function of the input.
    """
    here = _gradient(exam, exam.few, exam.labels, margin).flatten(1)
    likeness = []
    for number in range(NEIGHBORS):
        offset = NEAR * (exam.noise(f"neighbor{number}", exam.few) - exam.few)
        largest = offset.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
        near = (exam.few + offset * (PIXEL / largest).clamp_max(1.0)).clamp(0.0, 1.0)
        likeness.append(cosine(here, _gradient(exam, near, exam.labels, margin).flatten(1)))
    median = torch.stack(likeness).nanmean(0).nanmedian()
    value = float(torch.nan_to_num(median, nan=1.0))  # no gradient anywhere has its own check
    return [measured("shattered_gradient", value, len(here))]


def _gradient(exam: Examined, x: Images, y: Labels, loss: Loss) -> Images:
    with seeded(SEED, x.device):
        return input_gradient(exam.target, x, y, loss)


def _saturation(exam: Examined) -> str:
    top = exam.first.topk(2, dim=1).values
    apart = float((top[:, 0] - top[:, 1]).median())
    return f"the median gap between the two largest logits is {apart:.3g}"


def _zero(gradient: Images) -> Mask:
    return (gradient.flatten(1) == 0).all(1)


def _share(mask: Mask) -> float:
    return float(mask.float().mean())
