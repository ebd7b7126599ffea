"""The parameters that training recipes share."""

from __future__ import annotations

from dataclasses import dataclass


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
