"""Accuracy against epsilon, against attack steps, and without a bound: sanity of an evaluation.

One attack (PGD on the margin through the model's own gradient), judged by the deployed predictor.
Accuracy must fall with epsilon, settle with steps, and end at chance where nothing is bounded; a
curve that does none of this shows a gradient that misleads (Carlini et al. 2019, "On Evaluating
Adversarial Robustness").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from robustdeq.interfaces import Attack
from robustdeq.randomness import SampleRandom
from robustdeq.registry import load
from robustdeq.shapes import Images, Labels, Mask
from robustdeq.suite import Curves
from robustdeq.targets import Target
from robustdeq.threats import Norm, Threat

Right = Callable[[Images], Mask]
"""From candidates to whether the judge finds each right."""


def curve_rows(
    curves: Curves, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom,
    right: Right,
) -> list[dict[str, Any]]:  # fmt: skip
    """All points of one chunk, as rows for `records.curve_frame`: counts, to be summed over chunks.

    Args:
        x: clean images that the model may also get wrong; they count as wrong at every point.
        right: the judge's word on images in the order of `x`.
    """
    points = _Points(target, x, y, rng, right)
    return [
        *points.epsilons(threat, curves.epsilons),
        *points.steps(threat, curves.steps),
        *points.unbounded(threat if curves.unbounded else None),
    ]


class _Points:
    def __init__(
        self, target: Target, x: Images, y: Labels, rng: SampleRandom, right: Right
    ) -> None:
        self.target, self.x, self.y, self.rng, self.right = target, x, y, rng, right
        self.clean = right(x)

    def epsilons(self, threat: Threat, multiples: tuple[float, ...]) -> Iterator[dict[str, Any]]:
        """Sample by sample monotone: an example within a ball is one within each larger ball."""
        alive = self.clean.clone()
        for multiple in sorted(multiples):
            radius = threat.epsilon * Fraction(str(multiple))
            if radius > 0:
                alive &= self._survived(replace(threat, epsilon=radius), 40, restarts=2)
            yield _row("epsilon", float(radius), alive)

    def steps(self, threat: Threat, counts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        """Each number of steps on its own: more steps that break less are a symptom."""
        for count in sorted(counts):
            yield _row("steps", float(count), self.clean & self._survived(threat, count))

    def unbounded(self, threat: Threat | None) -> Iterator[dict[str, Any]]:
        """With the whole box as the ball."""
        if threat is None:
            return
        whole = unbounded(threat, self.x[0].numel())
        # From the image itself: a random start in the whole box breaks it without any gradient.
        alive = self.clean & self._survived(whole, 100, random_start=False)
        yield _row("unbounded", whole.eps, alive)

    def _survived(self, threat: Threat, steps: int, **more: int) -> Mask:
        parameters = {"steps": steps, "loss": "margin", **more}
        attack: Attack = load("attack", "pgd", parameters)
        found = attack.run(self.target, self.x.clone(), self.y, threat, self.rng)
        assert isinstance(found, torch.Tensor)
        return self.right(found.detach())


def unbounded(threat: Threat, pixels: int) -> Threat:
    """The threat of the same norm whose ball around any image holds the whole box [0, 1]."""
    radius = 1 if threat.norm is Norm.LINF else math.ceil(math.sqrt(pixels))
    return replace(threat, epsilon=Fraction(radius))


def _row(curve: str, at: float, alive: Mask) -> dict[str, Any]:
    return {"curve": curve, "at": at, "correct": int(alive.sum()), "n": len(alive)}
