"""A plain attack of growing length: the same projected ascent, twice as long each time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from robustdeq.evaluation.gate.losses import loss_and_gradient, margin
from robustdeq.shapes import Images, Labels, Mask, PerSample
from robustdeq.targets import Target
from robustdeq.threats import Threat

LENGTHS = (20, 40, 80)


class Escalation(NamedTuple):
    """What attacks of growing length found.

    Attributes:
        x: per sample, the last attack's point of largest margin; the image itself where it was
            wrong from the beginning.
        broken: after each length, which samples any attack so far has broken.
    """

    x: Images
    broken: tuple[Mask, ...]


def escalate(
    target: Target, x: Images, y: Labels, threat: Threat, start: Images, correct: Mask
) -> Escalation:
    """Attack with each of `LENGTHS` what the shorter attacks have left."""
    found, broken, after = x.clone(), torch.zeros_like(correct), []
    for steps in LENGTHS:
        rows = (correct & ~broken).nonzero().squeeze(1)
        if not len(rows):
            after.append(broken.clone())
            continue
        best, margins = ascend(target, x[rows], y[rows], threat, start[rows], steps)
        found[rows] = best
        broken[rows] = margins > 0
        after.append(broken.clone())
    return Escalation(found, tuple(after))


def ascend(
    target: Target, x: Images, y: Labels, threat: Threat, start: Images, steps: int
) -> tuple[Images, PerSample]:
    """Steepest ascent of the margin by steps that shrink linearly to a tenth.

    All steps together could reach 2.5 times the radius. A sample is left at the first point that is
    misclassified, which is on the far side of its decision boundary, and near it.
    """
    best, largest = start.clone(), x.new_full((len(x),), -torch.inf)
    current, rows = start.clone(), torch.arange(len(x), device=x.device)
    shrinkage = [1.0 - 0.9 * step / steps for step in range(steps)]
    first = 2.5 / sum(shrinkage) * threat.eps
    for step in range(steps + 1):
        values, gradient = loss_and_gradient(target, current, y[rows], margin)
        values = torch.nan_to_num(values.to(x), nan=torch.inf)  # no judge counts it as correct
        better = values > largest[rows]
        best[rows[better]] = current[better]
        largest[rows] = torch.maximum(largest[rows], values)
        still = values <= 0
        rows, current, gradient = rows[still], current[still], gradient[still]
        if step == steps or not len(rows):
            break
        move = threat.steepest(torch.nan_to_num(gradient)) * (first * shrinkage[step])
        current = threat.project(x[rows], current + move)
    return best, largest
