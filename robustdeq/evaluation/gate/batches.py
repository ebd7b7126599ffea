"""Whether a sample's logits depend on what else is in its batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from robustdeq.evaluation.gate.examined import FEW, Examined
from robustdeq.evaluation.gate.rows import Row, measured, skipped
from robustdeq.evaluation.judge import predictions
from robustdeq.shapes import Images, Logits, Mask

FAR = 1e-3
"""Relative move of logits that counts even where the prediction stays."""
NEAR = 1e-5
"""Relative move that rounding can make; between the two, predictions must change to count."""
ALONE = 16
"""Attacked samples that are asked alone: those nearest to their decision boundary."""
GUESTS = 4
"""Samples that are put among companions of one kind, so that the companions decide."""


def independence(exam: Examined) -> list[Row]:
    """Alone, permuted, in the whole chunk, among strange images; at clean and attacked points.

    A solver that stops when the whole batch has converged moves logits little on clean images,
    which are all easy, and more among attacked or strange ones.
    """
    if exam.unsteady:
        return [skipped("batch_dependent", exam.unsteady)]
    at_clean = _dependent(exam, exam.few, FEW)
    at_attacked = _dependent(exam, exam.escalation.x[:FEW], ALONE)
    value = max(float(part.float().mean()) for part in (at_clean, at_attacked))
    detail = f"{int(at_clean.sum())} clean and {int(at_attacked.sum())} attacked samples"
    return [measured("batch_dependent", value, len(exam.few), detail if value else "")]


def _dependent(exam: Examined, x: Images, alone: int) -> Mask:
    """Samples that move far, or move and change their prediction."""
    together = exam.logits(x)
    dependent = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for rows, logits in _elsewhere(exam, x, _nearest(together, alone)):
        move = exam.move(together[rows], logits)
        flipped = predictions(together[rows]) != predictions(logits)
        dependent[rows] |= (move > FAR) | ((move > NEAR) & flipped)
    return dependent


def _elsewhere(exam: Examined, x: Images, nearest: list[int]) -> Iterator[tuple[list[int], Logits]]:
    """Rows of `x` with their logits in other company."""
    everything = list(range(len(x)))
    for row in nearest:
        yield [row], exam.logits(x[row : row + 1])
    order = torch.randperm(len(x), generator=exam.generator("batch")).tolist()
    yield order, exam.logits(x[order])
    if len(exam.x) > len(x):
        yield everything, exam.logits(torch.cat([x, exam.x[len(x) :]]))[: len(x)]
    guests = nearest[:GUESTS]
    for strangers in _strangers(exam):
        yield guests, exam.logits(torch.cat([x[guests], strangers]))[: len(guests)]


def _strangers(exam: Examined) -> Iterator[Images]:
    """Batches of images unlike the data, each of one kind."""
    x, generator = exam.few, exam.generator("companions")
    noise = torch.rand(x.shape, generator=generator).to(x)
    pixels = torch.randperm(x[0].numel(), generator=generator).to(x.device)
    yield from (noise, noise.round(), torch.zeros_like(x), torch.ones_like(x), 1.0 - x)
    yield from (x.flip(2), x.transpose(2, 3) if x.shape[2] == x.shape[3] else x.flip(3))
    yield x.flatten(1)[:, pixels].view_as(x)


def _nearest(logits: Logits, count: int) -> list[int]:
    """The samples whose two largest logits are closest."""
    top = logits.topk(2, dim=1).values
    return [int(row) for row in (top[:, 0] - top[:, 1]).argsort()[:count].tolist()]
