"""Adversarial training whose inner attack is the joint iteration (Gurumurthy et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from robustdeq.equilibrium import JointAscent
from robustdeq.errors import UsageError
from robustdeq.interfaces import About
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training._carried import admits_warm
from robustdeq.training._fields import Adversarial
from robustdeq.training._inner import frozen, random_start, warmed


@dataclass(frozen=True, kw_only=True)
class JointAdversarialTraining(Adversarial):
    """Cross-entropy on examples found by the joint iteration of state, adjoint and input.

    A step of PGD pays a solve and an adjoint solve, a step of this one evaluation of the cell and
    one product with its Jacobian. The loss is taken at a state solved on from the joint one. The
    authors add a Jacobian penalty and start from 0; here the cell is a contraction by construction
    and the input starts at random.

    Attributes:
        damping: of the state in the joint iteration.
        adjoint_damping: of the adjoint.
        memory: of Anderson mixing, type I; 0 does without, as the default, since a mixture of
            iterates need not ascend.
    """

    about: ClassVar[About] = About(
        "Joint Inference and Input Optimization in Equilibrium Networks",
        "Swaminathan Gurumurthy, Shaojie Bai, Zachary Manchester, J. Zico Kolter",
        "NeurIPS 2021",
        "https://arxiv.org/abs/2111.13236",
    )
    prefix: ClassVar[str] = "Gurumurthy2021Joint"
    adversarial: ClassVar[bool] = True

    steps: int = 40
    step_size: float = 0.1
    gradient: str = "phantom(4,1)"
    solver_steps: int = 4
    damping: float = 1.0
    adjoint_damping: float = 1.0
    memory: int = 0

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
            UsageError: for a model without a joint iteration.
        """
        dynamics = target.dynamics(self.damping, self.adjoint_damping)
        if dynamics is None:
            raise UsageError(
                f"recipe joint iterates one cell, and this {type(target.model).__name__} is not "
                "the fixed point of one; use pgd_at."
            )
        threat = warmed(threat, progress, self.warmup)
        ascent = JointAscent(steps=self.steps, step_size=self.step_size, memory=self.memory)
        with frozen(target.model):
            adversarial, state = ascent(
                dynamics,
                x,
                threat,
                lambda logits: F.cross_entropy(logits, y, reduction="none"),
                random_start(x, threat, generator),
            )
        warm = (state.z,) if admits_warm(target) else ()
        return F.cross_entropy(target(adversarial, warm).logits, y)
