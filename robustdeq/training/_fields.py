"""The parameters that training recipes share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Inner = Literal["solve", "warm", "joint"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step.
        learning_rate: peak of a one-cycle schedule, cosine down to almost 0, counted in steps.
        weight_decay: of AdamW.
        gradient: the estimator that training differentiates through, on its own logits.
        solver_steps: step limit of the solver in training; 0 keeps the deployed one.
    """

    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    gradient: str = "honest"
    solver_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Adversarial(Schedule):
    """A schedule with an inner attack.

    Attributes:
        steps: of the inner attack.
        step_size: of the inner attack, relative to epsilon.
        warmup: share of the training over which epsilon grows from 0.
    """

    steps: int = 7
    step_size: float = 0.25
    warmup: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Maximized(Adversarial):
    """A schedule whose inner attack ascends along one of three kinds of gradients.

    Attributes:
        inner: how a step of the inner attack gets its gradient on an equilibrium model. "solve"
            solves from the cold start. "warm" solves, as long and as tightly, from the state of
            the step before. "joint" carries state and adjoint: one evaluation of the cell and one
            product with its Jacobian (Gurumurthy et al. 2021), whatever `gradient` says. With the
            last two, the solve of the training loss starts from the last state, too, unless
            `gradient` follows the solve from its own start. Deployed models start cold always.
        inner_precision: "bfloat16" runs the inner attack under autocast; the training loss stays
            in the precision of the training. Solves to a tolerance below 1e-2 then run to their
            last step.
    """

    inner: Inner = field(default="solve", metadata={"young": True})
    inner_precision: Precision = field(default="float32", metadata={"young": True})
