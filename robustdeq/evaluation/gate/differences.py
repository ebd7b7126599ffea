"""The honest gradient, and every estimator's, against central finite differences."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from robustdeq.differentiation import Gradient, parse_gradient
from robustdeq.errors import RobustDEQError, UsageError
from robustdeq.evaluation.gate.examined import SEED, Examined
from robustdeq.evaluation.gate.losses import Loss, cosine, cross_entropy, input_gradient, margin
from robustdeq.evaluation.gate.precise import ROWS, Precise, inside, precise
from robustdeq.evaluation.gate.rows import Row, measured, noted, skipped
from robustdeq.evaluation.judge import seeded
from robustdeq.shapes import Images, Labels, PerSample
from robustdeq.targets import Target
from robustdeq.threats import Norm

SAMPLES = 16
"""Images whose gradients are compared; half as many attacked ones."""
DIRECTIONS = 64
"""Directions that both are projected on."""
SATURATED = 1e-4
"""Cross-entropy below which its differences are left out."""
ESTIMATORS = (
    "implicit",
    "phantom(5,0.5)",
    "unrolled(20)",
    "one_step",
    "backprop",
    "simultaneous_adjoint",
)
_REFERENCE = "an estimator may be biased; 1 is the derivative of the deployed predictor"


class Quotients(NamedTuple):
    """Central differences of one loss, per sample and direction, at two step sizes."""

    loss: Loss
    usable: Tensor
    slopes: tuple[Tensor, Tensor]


class Comparison(NamedTuple):
    """Points, directions (pixels, count) and the differences of the deployed predictor there."""

    view: Precise
    x: Images
    y: Labels
    directions: Tensor
    quotients: tuple[Quotients, ...]

    def cosines(self, target: Target) -> PerSample:
        """Cosine of a view's gradient with the differences, per sample.

        Of the loss that agrees less, at the step that agrees better; NaN where there is no slope.
        """
        worst = torch.full((len(self.x),), torch.nan, dtype=torch.float64, device=self.x.device)
        for part in self.quotients:
            with seeded(SEED, self.x.device):
                gradient = input_gradient(target, self.x, self.y, part.loss)
            projected = gradient.flatten(1).double() @ self.directions
            steps = torch.stack([_agreement(projected, slopes) for slopes in part.slopes])
            best = torch.where(steps.isnan(), -torch.inf, steps).amax(0)
            known = part.usable & best.isfinite()
            worst = torch.where(known, torch.fmin(worst, best), worst)
        return worst


def agreement(exam: Examined) -> list[Row]:
    """The honest gradient at clean and attacked points, and every estimator that applies."""
    names = ("finite_differences", "finite_differences_adversarial")
    if exam.unsteady:
        return [skipped(name, exam.unsteady) for name in names]
    view = precise(exam)
    clean = compare(exam, view, exam.x[:SAMPLES], exam.y[:SAMPLES])
    attacked = compare(exam, view, exam.escalation.x[: SAMPLES // 2], exam.y[: SAMPLES // 2])
    rows = [_row(n, c, view.target) for n, c in zip(names, (clean, attacked), strict=True)]
    return [*rows, *_estimators(clean)]


def compare(exam: Examined, view: Precise, x: Images, y: Labels) -> Comparison:
    """Difference quotients at some points, drawn a little in from the edges of the box."""
    pixels = x[0].numel()
    coarse = 0.1 * exam.threat.eps * (math.sqrt(pixels) if exam.threat.norm is Norm.LINF else 1.0)
    steps = (view.step, max(coarse, view.step))
    directions = _orthonormal(pixels, exam.generator("directions")).to(x.device)
    reach = float(directions.abs().max()) * max(steps)
    x = inside(x, min(reach, 0.25)).to(view.dtype)
    logits = [_steps(view, x, directions, step) for step in steps]
    with seeded(SEED, x.device), torch.no_grad():
        entropy = cross_entropy(view.target(x).logits, y)
    quotients = []
    for loss in (margin, cross_entropy):
        usable = entropy > SATURATED if loss is cross_entropy else torch.ones_like(entropy) > 0
        first, second = (
            _quotient(loss, y, sides, step) for sides, step in zip(logits, steps, strict=True)
        )
        quotients.append(Quotients(loss, usable, (first, second)))
    return Comparison(view, x, y, directions, tuple(quotients))


def _orthonormal(pixels: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal directions (pixels, count)."""
    drawn = torch.randn(pixels, min(pixels, DIRECTIONS), generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis


def _steps(view: Precise, x: Images, directions: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Logits (sample, direction, classes) a step ahead and a step back."""
    offsets = (step * directions.T).reshape(-1, *x.shape[1:]).to(x)
    together = max(ROWS // offsets.numel(), 1)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in x.split(together):
        for sign, side in zip((1, -1), sides, strict=True):
            moved = (part[:, None] + sign * offsets[None]).flatten(0, 1)
            with seeded(SEED, x.device), torch.no_grad():
                side.append(view.target(moved).logits.unflatten(0, (len(part), -1)))
    return torch.cat(sides[0]), torch.cat(sides[1])


def _quotient(loss: Loss, y: Labels, sides: tuple[Tensor, Tensor], step: float) -> Tensor:
    """(sample, direction) slopes of a loss."""
    ahead, back = sides
    labels = y[:, None].expand(ahead.shape[:2]).flatten()
    rise = loss(ahead.flatten(0, 1).double(), labels) - loss(back.flatten(0, 1).double(), labels)
    slopes: Tensor = rise.unflatten(0, ahead.shape[:2]) / (2 * step)
    return slopes


def _agreement(projected: Tensor, slopes: Tensor) -> PerSample:
    """Cosine; 0 where one of the two is 0 and the other is not, NaN where both are."""
    flat = (projected == 0).all(1) & (slopes == 0).all(1)
    found = torch.nan_to_num(cosine(projected, slopes), nan=0.0)
    return torch.where(flat, torch.nan, found)


def _row(name: str, comparison: Comparison, target: Target) -> Row:
    found = comparison.cosines(target)
    known = found[~found.isnan()]
    if not len(known):
        return skipped(name, "the model is constant around these points")
    kind = str(comparison.view.dtype).removeprefix("torch.")
    detail = f"{kind}, steps {comparison.view.step:g} and a tenth of the radius"
    return measured(name, float(known.median()), len(known), detail)


def _estimators(comparison: Comparison) -> list[Row]:
    """Each estimator on its own: cosines that are no verdict on the model."""
    rows = []
    for name in ESTIMATORS:
        gradient = _parsed(name)
        if gradient is None:
            continue
        try:
            found = comparison.cosines(comparison.view.target.through(gradient))
        except (RobustDEQError, RuntimeError):
            continue  # it does not apply to this model
        known = found[~found.isnan()]
        if len(known):
            label = f"finite_differences_{name.partition('(')[0]}"
            rows.append(noted(label, float(known.median()), len(known), _REFERENCE, name))
    return rows


def _parsed(name: str) -> Gradient | None:
    try:
        return parse_gradient(name)
    except UsageError:
        return None
