"""Adversarial training with PGD (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from robustdeq.interfaces import About
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training._fields import Maximized
from robustdeq.training._inner import Ascent, random_start, warmed


@dataclass(frozen=True, kw_only=True)
class PGDAdversarialTraining(Maximized):
    """Cross-entropy on the PGD examples of each batch (Madry et al. 2018, equation 2.1).

    Its parameters are those of `Maximized`, `Adversarial` and `Schedule`.
    """

    about: ClassVar[About] = About(
        "Towards Deep Learning Models Resistant to Adversarial Attacks",
        "Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu",
        "ICLR 2018",
        "https://arxiv.org/abs/1706.06083",
    )
    prefix: ClassVar[str] = "Madry2018Towards"
    adversarial: ClassVar[bool] = True

    def loss(
        self,
        target: Target,
        x: Images,
        y: Labels,
        threat: Threat,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        """See `robustdeq.interfaces.Recipe`.

        Raises:
            UsageError: for a model or a gradient that `inner` does not fit.
        """
        threat = warmed(threat, progress, self.warmup)
        found = Ascent.of(self)(
            target,
            x,
            threat,
            lambda logits: F.cross_entropy(logits, y, reduction="none"),
            random_start(x, threat, generator),
        )
        return F.cross_entropy(target(found.x, found.warm).logits, y)
