"""Whether an attack sees the logits that are judged: with gradients, without, in inference mode."""

from __future__ import annotations

import torch

from robustdeq.errors import sentence
from robustdeq.evaluation.gate.examined import SAME, SEED, Examined
from robustdeq.evaluation.gate.rows import Row, measured, skipped
from robustdeq.evaluation.judge import seeded
from robustdeq.shapes import Logits


def modes(exam: Examined) -> list[Row]:
    """Logits with gradients enabled, with and without an input that asks for one, and without."""
    if exam.drift > SAME:
        names = ("grad_mode_changes_logits", "inference_mode_changes_logits")
        return [skipped(name, exam.unsteady) for name in names]
    x = exam.few
    judged = exam.logits(x)
    seen = [_enabled(exam, requires_grad=True), _enabled(exam, requires_grad=False)]
    apart = max(float(exam.move(judged, logits).max()) for logits in seen)
    return [measured("grad_mode_changes_logits", apart, len(x)), _inference(exam, judged)]


def outputs(exam: Examined) -> list[Row]:
    """Whether logits are numbers, and are not probabilities already.

    A loss takes the softmax of what it is given; taken twice, it has next to no gradient.
    """
    logits = exam.first
    summed = (logits.sum(1) - 1).abs() < 1e-4
    share = float(((logits.amin(1) >= 0) & summed).float().mean())
    return [measured("probabilities", share, len(logits))]


def inputs(exam: Examined) -> list[Row]:
    """Whether images are the same after the model has seen them."""
    given = exam.few.clone()
    with seeded(SEED, given.device), torch.no_grad():
        exam.target(given)
    written = (given != exam.few).flatten(1).any(1)
    return [measured("input_overwritten", float(written.float().mean()), len(given))]


def _enabled(exam: Examined, *, requires_grad: bool) -> Logits:
    x = exam.few.clone().requires_grad_(requires_grad)
    with seeded(SEED, x.device), torch.enable_grad():
        return exam.target(x).logits.detach()


def _inference(exam: Examined, judged: Logits) -> Row:
    name = "inference_mode_changes_logits"
    try:
        with seeded(SEED, exam.x.device), torch.inference_mode():
            logits = exam.target(exam.few).logits.clone()
    except RuntimeError as cause:
        # Nothing is attacked or judged in that mode; the contract tests insist on it.
        return skipped(name, f"it cannot run in that mode: {sentence(cause)}")
    return measured(name, float(exam.move(judged, logits).max()), len(exam.few))
