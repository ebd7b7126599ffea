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
from robustdeq.training._fields import Schedule


@dataclass(frozen=True, kw_only=True)
class Clean(Schedule):
    """Cross-entropy on clean images; its parameters are those of `Schedule`."""

    about: ClassVar[About] = About("Empirical risk minimization")
    prefix: ClassVar[str] = "Standard"
    adversarial: ClassVar[bool] = False

    epochs: int = 30

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
