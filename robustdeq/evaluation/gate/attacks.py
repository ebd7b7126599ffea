"""What plain attacks say of the gradient: longer ones, boundless ones, and noise."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from robustdeq.evaluation.gate.ascent import LENGTHS, ascend
from robustdeq.evaluation.gate.examined import FEW, SEED, Examined
from robustdeq.evaluation.gate.rows import Row, measured, skipped
from robustdeq.evaluation.judge import predictions, seeded
from robustdeq.shapes import Mask
from robustdeq.threats import Norm, Threat

BOUNDLESS_STEPS = 40
DRAWS = 8
"""Random points per image."""


def doubling(exam: Examined) -> list[Row]:
    """What twice the steps break beyond half of them: a converged attack leaves nothing."""
    if exam.unsteady:
        return [skipped("doubled_steps", exam.unsteady)]
    n = len(exam.x)
    counts = [int(broken.sum()) for broken in exam.escalation.broken]
    correct = int(exam.correct.sum())
    left = [
        f"{correct - count} after {steps}" for steps, count in zip(LENGTHS, counts, strict=True)
    ]
    value = (counts[-1] - counts[-2]) / n
    limit = max(1 / n, 0.01)
    return [measured("doubled_steps", value, n, f"robust of {n}: {', '.join(left)} steps", limit)]


def boundless(exam: Examined) -> list[Row]:
    """An attack that may do anything to the image leaves at most chance."""
    if exam.unsteady:
        return [skipped("unbounded_attack", exam.unsteady)]
    if len(exam.predicted.unique()) < 2:
        return [skipped("unbounded_attack", "all images get one class: there may be no other")]
    n = min(len(exam.x), FEW)
    rows = exam.correct[:n].nonzero().squeeze(1)
    robust = 0
    if len(rows):
        x, y = exam.x[rows], exam.y[rows]
        with seeded(SEED, x.device):
            _, margins = ascend(exam.target, x, y, _boundless(exam), x, BOUNDLESS_STEPS)
        robust = int((margins <= 0).sum())
    detail = f"{robust} of {n} samples withstand {BOUNDLESS_STEPS} steps in the whole box"
    return [measured("unbounded_attack", robust / n, n, detail, 1 / exam.target.classes)]


def noise(exam: Examined) -> list[Row]:
    """Random points of the ball break fewer samples than attacks along the gradient."""
    if exam.unsteady:
        return [skipped("random_noise", exam.unsteady)]
    fallen = torch.zeros_like(exam.correct)
    for draw in range(DRAWS):
        fallen |= ~_right(exam, draw)
    by_noise, by_gradient = (
        int((fallen & exam.correct).sum()),
        int(exam.escalation.broken[-1].sum()),
    )
    n = len(fallen)
    detail = f"broken of {n}: {by_noise} by {DRAWS} random points each, {by_gradient} by gradients"
    return [measured("random_noise", (by_noise - by_gradient) / n, n, detail)]


def _right(exam: Examined, draw: int) -> Mask:
    points = exam.noise(f"noise{draw}", exam.x)
    return predictions(exam.logits(points)) == exam.y


def _boundless(exam: Examined) -> Threat:
    """The same norm, with a radius that reaches every corner of the box."""
    if exam.threat.norm is Norm.LINF:
        return Threat(Norm.LINF, Fraction(1))
    return Threat(exam.threat.norm, Fraction(math.isqrt(exam.x[0].numel()) + 1))
