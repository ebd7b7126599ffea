"""The honest gradient, and every estimator's, against central finite differences."""

from __future__ import annotations

from robustdeq.differentiation import parse_gradient
from robustdeq.errors import RobustDEQError
from robustdeq.evaluation.gate.examined import Examined
from robustdeq.evaluation.gate.precise import precise
from robustdeq.evaluation.gate.quotients import Comparison, compare
from robustdeq.evaluation.gate.rows import Row, measured, noted, skipped
from robustdeq.shapes import PerSample

SAMPLES = 16
"""Images whose gradients are compared, and half as many attacked ones; for large images half."""
LARGE = 256
"""Pixels above which images are large: each costs 128 passes in double precision."""
ESTIMATORS = (
    "implicit",
    "phantom(5,0.5)",
    "unrolled(20)",
    "one_step",
    "backprop",
    "simultaneous_adjoint",
)
_REFERENCE = "an estimator may be biased; 1 is the derivative of the deployed predictor"


def agreement(exam: Examined) -> list[Row]:
    """The honest gradient at clean and attacked points, and every estimator that applies."""
    names = ("finite_differences", "finite_differences_adversarial")
    if exam.unsteady:
        return [skipped(name, exam.unsteady) for name in names]
    view = precise(exam)
    clean = SAMPLES if exam.x[0].numel() <= LARGE else SAMPLES // 2
    attacked = clean // 2
    at_clean = compare(exam, view, exam.x[:clean], exam.y[:clean])
    at_attacked = compare(exam, view, exam.escalation.x[:attacked], exam.y[:attacked])
    rows = [_row(n, c) for n, c in zip(names, (at_clean, at_attacked), strict=True)]
    return [*rows, *_estimators(at_clean)]


def _row(name: str, comparison: Comparison) -> Row:
    known = _known(comparison.cosines(comparison.view.target))
    if not len(known):
        return skipped(name, "the model is constant around these points")
    kind = str(comparison.view.dtype).removeprefix("torch.")
    detail = f"{kind}, step {comparison.view.step:g}"
    if len(comparison.slopes) > 1:
        detail += " or a tenth of the radius"
    return measured(name, float(known.median()), len(known), detail)


def _estimators(comparison: Comparison) -> list[Row]:
    """Each estimator on its own: cosines that are no verdict on the model."""
    rows = []
    for name in ESTIMATORS:
        try:
            view = comparison.view.target.through(parse_gradient(name))
            known = _known(comparison.cosines(view))
        except (RobustDEQError, RuntimeError):
            continue  # it does not apply to this model
        if len(known):
            label = f"finite_differences_{name.partition('(')[0]}"
            rows.append(noted(label, float(known.median()), len(known), _REFERENCE, name))
    return rows


def _known(cosines: PerSample) -> PerSample:
    return cosines[~cosines.isnan()]
