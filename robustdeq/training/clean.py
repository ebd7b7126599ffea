"""Clean training: the undefended control, `Standard` in RobustBench's naming."""

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


@dataclass(frozen=True, kw_only=True)
class Clean:
    """Cross-entropy on clean images.

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step.
        learning_rate: peak of a one-cycle schedule.
        weight_decay: of AdamW.
        gradient: the estimator that training differentiates through, on its own logits.
        solver_steps: step limit of the solver in training; 0 keeps the deployed one.
    """

    about: ClassVar[About] = About("Empirical risk minimization")
    prefix: ClassVar[str] = "Standard"
    adversarial: ClassVar[bool] = False

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
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
        del threat, progress, generator
        return F.cross_entropy(target(x).logits, y)
