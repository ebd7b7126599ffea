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
from robustdeq.training._fields import Adversarial
from robustdeq.training._inner import maximized, random_start, warmed


@dataclass(frozen=True, kw_only=True)
class PGDAdversarialTraining(Adversarial):
    """Cross-entropy on the PGD examples of each batch (Madry et al. 2018, equation 2.1).

    Its parameters are those of `Adversarial` and `Schedule`.
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
        """See `robustdeq.interfaces.Recipe`."""
        threat = warmed(threat, progress, self.warmup)
        adversarial = maximized(
            target,
            x,
            threat,
            lambda logits: F.cross_entropy(logits, y, reduction="sum"),
            random_start(x, threat, generator),
            self.steps,
            self.step_size,
        )
        return F.cross_entropy(target(adversarial).logits, y)
