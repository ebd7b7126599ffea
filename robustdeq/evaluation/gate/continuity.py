"""Whether logits are continuous: bisection towards the steepest place of a segment."""

from __future__ import annotations

import torch

from robustdeq.evaluation.gate.examined import Examined
from robustdeq.evaluation.gate.rows import Row, measured, skipped
from robustdeq.shapes import Images, PerSample

HALVINGS = 18
"""A segment of one pixel value ends at 4e-6, some rounding errors of a float32 long."""
STEEP = 100.0
"""How much steeper than the whole segment its steepest piece may be."""
SMALL = 1e-2
"""Jumps below this share of what logits are here do not count: solvers end within tolerances."""


def continuity(exam: Examined) -> list[Row]:
    """Share of segments on which logits jump.

    Each segment is halved again and again, and the half kept on which logits change more. What a
    continuous function changes shrinks with the length; a jump stays as it is. Rounding,
    thresholds, early exits and values looked up in tables jump. The segments lead from images
    to random points of their balls, to attacked points and to images of other samples.
    """
    if exam.unsteady:
        return [skipped("discontinuous", exam.unsteady)]
    x = exam.few
    ends = [exam.noise("segment", x), exam.escalation.x[: len(x)], x.roll(1, 0)]
    jumps = torch.cat([_jump(exam, x, end) for end in ends])
    detail = f"the largest jump is {float(jumps.max()):.2g} of the logits' size"
    value = float((jumps > SMALL).float().mean())
    return [measured("discontinuous", value, len(jumps), detail)]


def _jump(exam: Examined, low: Images, high: Images) -> PerSample:
    """The relative change that is left on the last piece; 0 where the function is continuous."""
    at_low, at_high = exam.logits(low), exam.logits(high)
    change = largest = exam.move(at_low, at_high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        at_middle = exam.logits(middle)
        before, after = exam.move(at_low, at_middle), exam.move(at_middle, at_high)
        left = before >= after
        image = left[:, None, None, None]
        low, high = torch.where(image, low, middle), torch.where(image, middle, high)
        at_low = torch.where(left[:, None], at_low, at_middle)
        at_high = torch.where(left[:, None], at_middle, at_high)
        change = torch.maximum(before, after)
        largest = torch.maximum(largest, change)
    steep = change > STEEP * 0.5**HALVINGS * largest
    return torch.where(steep, change, 0.0)
