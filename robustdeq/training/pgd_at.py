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
from robustdeq.training._inner import maximized, random_start, warmed


@dataclass(frozen=True, kw_only=True)
class PGDAdversarialTraining:
    """Cross-entropy on the PGD examples of each batch (Madry et al. 2018, equation 2.1).

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step.
        learning_rate: peak of a one-cycle schedule.
        weight_decay: of AdamW.
        steps: inner PGD steps.
        step_size: of the inner attack, relative to epsilon.
        warmup: share of the training over which epsilon grows from 0.
        gradient: the estimator that training differentiates through, on its own logits.
        solver_steps: step limit of the solver in training; 0 keeps the deployed one.
    """

    about: ClassVar[About] = About(
        "Towards Deep Learning Models Resistant to Adversarial Attacks",
        "Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu",
        "ICLR 2018",
        "https://arxiv.org/abs/1706.06083",
    )
    prefix: ClassVar[str] = "Madry2018Towards"
    adversarial: ClassVar[bool] = True

    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    steps: int = 7
    step_size: float = 0.25
    warmup: float = 0.3
    gradient: str = "honest"
    solver_steps: int = 0

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
