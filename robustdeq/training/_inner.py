"""The inner maximization of adversarial training: a short PGD on the training view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustdeq.arithmetic import reduced
from robustdeq.shapes import Images
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training._carried import Loss, gradients_of
from robustdeq.training._fields import Inner, Maximized, Precision


def warmed(threat: Threat, progress: float, warmup: float) -> Threat:
    """The threat with its radius grown linearly over the first `warmup` of training.

    Small networks on MNIST at Linf 0.3 otherwise fall into predicting one class for good.
    """
    if warmup <= 0 or progress >= warmup:
        return threat
    share = max(progress / warmup, 0.05)
    return Threat(threat.norm, threat.epsilon * int(1000 * share) / 1000)


class Found(NamedTuple):
    """Candidates (batch, channels, height, width), and states from which to solve at them.

    `warm` is empty where the next solve is to start cold.
    """

    x: Images
    warm: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Ascent:
    """Steepest ascent of a loss, projected after each step.

    Attributes:
        steps: how many.
        step_size: relative to the threat's epsilon.
        inner: where gradients come from; see `Maximized`.
        precision: in which they are computed; the candidates stay as they are.
    """

    steps: int
    step_size: float
    inner: Inner = "solve"
    precision: Precision = "float32"

    @classmethod
    def of(cls, recipe: Maximized) -> Ascent:
        """The inner attack of a recipe."""
        return cls(recipe.steps, recipe.step_size, recipe.inner, recipe.inner_precision)

    def __call__(
        self,
        target: Target,
        x: Images,
        threat: Threat,
        loss: Loss,
        start: Images,
        warm: Sequence[Tensor] = (),
    ) -> Found:
        """Candidates in the ball around `x`.

        Args:
            loss: from logits to the loss of each sample.
            start: where to begin, in the ball.
            warm: states near those of `start`; of no use to "solve".

        Raises:
            UsageError: for a model or a gradient that `inner` does not fit.
        """
        gradients = gradients_of(self.inner, target, warm)
        current = start.detach()
        with frozen(target.model), reduced(self.precision, x.device):
            for _ in range(self.steps):
                ascent = threat.steepest(gradients(current, loss)) * (self.step_size * threat.eps)
                current = threat.project(x, current + ascent)
        return Found(current, gradients.onward())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters inside the block: an attack that needs none saves their cost."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def random_start(x: Images, threat: Threat, generator: torch.Generator) -> Images:
    """A random admissible point for each image."""
    uniform = torch.rand(x.shape, generator=generator) * 2 - 1
    radial = torch.rand(len(x), generator=generator)
    return threat.project(x, x + threat.random_offset(uniform.to(x), radial.to(x)))
