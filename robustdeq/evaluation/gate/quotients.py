"""Central difference quotients of the deployed predictor, and how a gradient agrees with them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from robustdeq.evaluation.gate.examined import SEED, Examined
from robustdeq.evaluation.gate.losses import cosine, cross_entropy, input_gradient, margin
from robustdeq.evaluation.gate.precise import ROWS, Precise, inside
from robustdeq.evaluation.judge import seeded
from robustdeq.shapes import Images, Labels, Mask, PerSample
from robustdeq.targets import Target
from robustdeq.threats import Norm

DIRECTIONS = 64
"""Directions that gradients are projected on."""
SATURATED = 1e-4
"""Cross-entropy below which its differences are left out."""
CLOSE = 0.99
"""Cosine at the small step from which the large one is not looked at."""
LOSSES = (margin, cross_entropy)


class Comparison(NamedTuple):
    """Points, and the slopes of both losses along some directions there.

    Attributes:
        directions: orthonormal, (pixels, count).
        usable: (losses, samples): where a loss has differences above rounding.
        slopes: per step size, (losses, samples, directions); NaN where they were not taken.
    """

    view: Precise
    x: Images
    y: Labels
    directions: Tensor
    usable: Mask
    slopes: tuple[Tensor, ...]

    def cosines(self, target: Target) -> PerSample:
        """Cosine of a view's gradient with the differences, per sample.

        Of the loss that agrees less, at the step that agrees better; NaN where there is no slope.
        """
        worst = torch.full((len(self.x),), torch.nan, dtype=torch.float64, device=self.x.device)
        for number, loss in enumerate(LOSSES):
            with seeded(SEED, self.x.device):
                gradient = input_gradient(target, self.x, self.y, loss)
            projected = gradient.flatten(1).double() @ self.directions
            steps = torch.stack([_agreement(projected, part[number]) for part in self.slopes])
            best = torch.where(steps.isnan(), -torch.inf, steps).amax(0)
            known = self.usable[number] & best.isfinite()
            worst = torch.where(known, torch.fmin(worst, best), worst)
        return worst


def compare(exam: Examined, view: Precise, x: Images, y: Labels) -> Comparison:
    """Quotients at points drawn a little in from the edges of the box.

    At a small step; and, where the honest gradient does not agree, at a tenth of the radius too:
    kinks between the two points of a quotient are no fault of a gradient.
    """
    pixels = x[0].numel()
    radius = exam.threat.eps * (math.sqrt(pixels) if exam.threat.norm is Norm.LINF else 1.0)
    large = max(0.1 * radius, view.step)
    directions = orthonormal(pixels, exam.generator("directions")).to(x.device)
    x = inside(x, min(float(directions.abs().max()) * large, 0.25)).to(view.dtype)
    with seeded(SEED, x.device), torch.no_grad():
        entropy = cross_entropy(view.target(x).logits, y)
    usable = torch.stack([entropy == entropy, entropy > SATURATED])
    slopes = _slopes(view, x, y, directions, view.step)
    found = Comparison(view, x, y, directions, usable, (slopes,))
    doubtful = ~(found.cosines(view.target) >= CLOSE)
    if not bool(doubtful.any()):
        return found
    again = torch.full_like(slopes, torch.nan)
    again[:, doubtful] = _slopes(view, x[doubtful], y[doubtful], directions, large)
    return found._replace(slopes=(slopes, again))


def orthonormal(pixels: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal directions (pixels, count)."""
    drawn = torch.randn(pixels, min(pixels, DIRECTIONS), generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis


def _slopes(view: Precise, x: Images, y: Labels, directions: Tensor, step: float) -> Tensor:
    """(losses, samples, directions) central differences."""
    offsets = (step * directions.T).reshape(-1, *x.shape[1:]).to(x)
    together = max(ROWS // offsets.numel(), 1)
    parts = []
    for images, labels in zip(x.split(together), y.split(together), strict=True):
        wanted = labels.repeat_interleave(len(offsets))
        ahead, back = (_losses(view, images, wanted, sign * offsets) for sign in (1, -1))
        parts.append((ahead - back).unflatten(1, (len(images), -1)) / (2 * step))
    return torch.cat(parts, 1)


def _losses(view: Precise, x: Images, y: Labels, offsets: Tensor) -> Tensor:
    """(losses, samples x directions) values at moved points."""
    moved = (x[:, None] + offsets[None]).flatten(0, 1)
    with seeded(SEED, x.device), torch.no_grad():
        logits = view.target(moved).logits.double()
    return torch.stack([loss(logits, y) for loss in LOSSES])


def _agreement(projected: Tensor, slopes: Tensor) -> PerSample:
    """Cosine; 0 where one of the two is 0 and the other is not, NaN where both are, or unknown."""
    flat = (projected == 0).all(1) & (slopes == 0).all(1)
    found = torch.nan_to_num(cosine(projected, slopes), nan=0.0)
    return torch.where(flat | slopes.isnan().any(1), torch.nan, found)
