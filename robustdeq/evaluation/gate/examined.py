"""What all checks share: the model, its samples, and a few things worth computing once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from robustdeq.equilibrium import parameter_dtype
from robustdeq.evaluation.gate.ascent import Escalation, escalate
from robustdeq.evaluation.judge import predictions, seeded
from robustdeq.randomness import SampleRandom, derived_seed
from robustdeq.shapes import Images, Labels, Logits, Mask, PerSample
from robustdeq.targets import Target
from robustdeq.threats import Threat

FEW = 32
"""Samples that the costlier checks look at."""
MANY = 100
"""Samples that are attacked."""
SAME = 1e-5
"""Relative difference of logits that rounding can make."""
SEED = 1
"""Of all forward passes that are to be compared: a randomized model then draws the same."""


@dataclass(eq=False)
class Examined:
    """One model under examination, on clean samples of one chunk.

    Attributes:
        x, y: at most `MANY` samples.
        randomized: whether its logits depend on the seed.
        first: logits of `few` from before anything else was asked of the model.
        drift: how far they were from those right after another question.
    """

    target: Target
    x: Images
    y: Labels
    threat: Threat
    seed: int
    randomized: bool
    first: Logits
    drift: float

    @property
    def unsteady(self) -> str:
        """Why two passes of the model cannot be compared; empty where they can."""
        if self.randomized:
            return "randomized: two passes draw different numbers"
        return "logits depend on the calls before" if self.drift > SAME else ""

    @property
    def dtype(self) -> torch.dtype | None:
        """The model's own floating-point type; None where it has no parameters."""
        return parameter_dtype(self.target.model)

    @property
    def few(self) -> Images:
        """The first samples, for the costlier checks."""
        return self.x[:FEW]

    @property
    def labels(self) -> Labels:
        """The labels of `few`."""
        return self.y[:FEW]

    def logits(self, x: Images, seed: int = SEED) -> Logits:
        """Logits without gradients, under one seed."""
        return seeded_logits(self.target, x, seed)

    def generator(self, name: str) -> torch.Generator:
        """Random numbers of one check."""
        return torch.Generator().manual_seed(derived_seed(self.seed, "gate", name))

    def streams(self, name: str, n: int) -> SampleRandom:
        """Random numbers of one check, per sample."""
        return SampleRandom(self.seed, f"gate/{name}", range(n))

    def noise(self, name: str, x: Images) -> Images:
        """One random admissible point per image."""
        streams = self.streams(name, len(x))
        offset = self.threat.random_offset(streams.uniform(x), streams.fraction(x))
        return self.threat.project(x, x + offset)

    @cached_property
    def scale(self) -> float:
        """How far a clean image's logits are from their mean, at most: the median image's."""
        return float(_spread(self.first).median())

    def move(self, one: Logits, other: Logits) -> PerSample:
        """How far two sets of logits are apart, per sample, relative to what logits are here.

        Infinite where either is not finite.
        """
        size = torch.maximum(_spread(one), one.new_tensor(self.scale)).clamp_min(1e-30)
        gap = (one - other).abs().amax(1) / size
        return torch.nan_to_num(gap, nan=torch.inf, posinf=torch.inf)

    @cached_property
    def predicted(self) -> Labels:
        """The class that each sample is given."""
        return predictions(self.logits(self.x))

    @cached_property
    def correct(self) -> Mask:
        """Which samples are classified correctly."""
        return self.predicted == self.y

    @cached_property
    def escalation(self) -> Escalation:
        """Longer and longer attacks through the model's own gradient."""
        with seeded(SEED, self.x.device):
            return escalate(self.target, self.x, self.y, self.threat, self._start, self.correct)

    @cached_property
    def _start(self) -> Images:
        return self.noise("start", self.x)


def seeded_logits(target: Target, x: Images, seed: int) -> Logits:
    """Logits without gradients, under a seed, of a copy that the model may write into."""
    with seeded(seed, x.device), torch.no_grad():
        return target(x.clone()).logits


def asked_after_another(target: Target, x: Images, seed: int) -> Logits:
    """Logits of `x` right after other images have been asked for."""
    seeded_logits(target, 1.0 - x, seed)
    return seeded_logits(target, x, seed)


def gap(one: Logits, other: Logits) -> float:
    """Largest difference over the largest logit; infinite where not finite."""
    scale = one.abs().max().clamp_min(1e-30)
    distance = float((one - other).abs().max() / scale)
    return distance if distance == distance else float("inf")


def _spread(logits: Logits) -> PerSample:
    """Largest distance of a logit from the sample's mean: a common offset is no evidence."""
    return (logits - logits.mean(1, keepdim=True)).abs().amax(1)
