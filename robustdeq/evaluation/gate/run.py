"""All checks of one model, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from robustdeq.errors import sentence
from robustdeq.evaluation.gate import (
    attacks,
    batches,
    continuity,
    convergence,
    differences,
    gradients,
    masking,
    predictions,
    repetition,
)
from robustdeq.evaluation.gate.examined import (
    FEW,
    MANY,
    SEED,
    Examined,
    asked_after_another,
    gap,
    seeded_logits,
)
from robustdeq.evaluation.gate.rows import Row, not_measured
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat


class Check(NamedTuple):
    """A function that measures, and the names of the rows that it gives."""

    measure: Callable[[Examined], list[Row]]
    names: tuple[str, ...]

    def rows(self, exam: Examined) -> list[Row]:
        """What it measures; where the model cannot even be asked, that is the model's failure."""
        try:
            return self.measure(exam)
        except torch.OutOfMemoryError:
            raise
        except Exception as cause:
            return [not_measured(name, sentence(cause)) for name in self.names]


CHECKS = (
    Check(repetition.randomness, ("randomized",)),
    Check(predictions.inputs, ("input_overwritten",)),
    Check(predictions.outputs, ("probabilities",)),
    Check(predictions.modes, ("grad_mode_changes_logits", "inference_mode_changes_logits")),
    Check(gradients.existence, ("gradient_missing",)),
    Check(gradients.values, ("nonfinite_gradient", "zero_gradient", "saturated_logits")),
    Check(gradients.shattering, ("shattered_gradient",)),
    Check(differences.agreement, ("finite_differences", "finite_differences_adversarial")),
    Check(masking.masking, ("gradient_masked",)),
    Check(batches.independence, ("batch_dependent",)),
    Check(continuity.continuity, ("discontinuous",)),
    Check(
        convergence.convergence,
        ("unconverged_clean", "unconverged_adversarial", "adjoint_unconverged"),
    ),
    Check(attacks.doubling, ("doubled_steps",)),
    Check(attacks.boundless, ("unbounded_attack",)),
    Check(attacks.noise, ("random_noise",)),
    Check(repetition.memory, ("keeps_state",)),
)
"""In order; `memory` last, when the model has been asked many things."""


def run_checks(target: Target, x: Images, y: Labels, threat: Threat, seed: int = 0) -> list[Row]:
    """All checks of one model on clean samples, as rows for `records.check_frame`.

    The model must be in eval mode; it is asked for logits and gradients, and is not changed.

    Args:
        target: the model through its own gradient.
        x, y: samples of one chunk, at least one; at most `MANY` are looked at.
        threat: decides the ball that attacks and noise stay in.
        seed: of all random numbers.
    """
    exam = examined(target, x, y, threat, seed)
    return [row for item in CHECKS for row in item.rows(exam)]


def examined(target: Target, x: Images, y: Labels, threat: Threat, seed: int = 0) -> Examined:
    """The model with what must be known before any check; see `run_checks`."""
    x, y = x[:MANY], y[:MANY]
    first = seeded_logits(target, x[:FEW], SEED)
    drift = gap(first, asked_after_another(target, x[:FEW], SEED))
    randomized = repetition.is_randomized(target, x)
    return Examined(target, x, y, threat, seed, randomized, first, drift)
