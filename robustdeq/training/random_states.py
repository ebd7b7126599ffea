"""Random intermediate states in the loss of any recipe (Yang et al. 2023, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustdeq.equilibrium import Drive, EquilibriumClassifier
from robustdeq.errors import UsageError
from robustdeq.interfaces import About, option
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training.composition import Around


@dataclass(frozen=True, kw_only=True)
class RandomStates(Around):
    """Every forward pass of the base recipe stops after n solver steps, n uniform in 1..`states`.

    One draw per forward pass, for the whole batch: each step of the inner attack and each branch
    of TRADES draws anew. Inference is of full length.

    Attributes:
        base: name of the recipe around which this is.
        parameters: its parameters.
        states: most solver steps; 0 takes the limit of the solver in training.
    """

    about: ClassVar[About] = About(
        "Improving Adversarial Robustness of Deep Equilibrium Models with Explicit Regulations "
        "Along the Neural Dynamics",
        "Zonghan Yang, Peng Li, Tianyu Pang, Yang Liu",
        "ICML 2023",
        "https://arxiv.org/abs/2306.01435",
    )
    prefix: ClassVar[str] = "Yang2023Improving"

    base: str = "pgd_at"
    parameters: dict[str, Any] = field(default_factory=dict)
    states: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (inner := option(self.local, "inner", "solve")) != "solve":
            raise UsageError(
                f"recipe random_states draws the length of each solve from the cold start, which "
                f"inner={inner!r} of {self.base} does without; use inner='solve'."
            )

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
            UsageError: for a model that does not iterate.
        """
        if not isinstance(target.model, EquilibriumClassifier):
            raise UsageError(
                f"recipe random_states stops solves early, and {type(target.model).__name__} has "
                f"none; use {self.base}."
            )
        most = self.states or (target.solver or target.model.solver).max_steps
        shortened = _RandomLength(target, most, generator)
        return self.local.loss(shortened, x, y, threat, progress, generator)


class _RandomLength(Target):
    """A target whose solves are cut short at random, anew in each forward pass."""

    def __init__(self, target: Target, most: int, generator: torch.Generator) -> None:
        super().__init__(
            target.model,
            target.classes,
            gradient=target.gradient,
            value=target.value,
            solver=target.solver,
        )
        self.most, self.generator = most, generator

    def drive(self, model: EquilibriumClassifier, warm: Sequence[Tensor]) -> Drive:
        """See `Target.drive`."""
        drive = super().drive(model, warm)
        steps = int(torch.randint(1, self.most + 1, (), generator=self.generator))
        drive.solver = drive.solver.with_steps(steps)
        return drive
