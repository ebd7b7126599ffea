"""Gradients of models that offer none: differences of their logits, nothing differentiated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustdeq.differentiation.module_gradient import ModuleGradient, Predict
from robustdeq.differentiation.noise import between, noise_of
from robustdeq.equilibrium.gradients import at_least_one, number, splice
from robustdeq.errors import UsageError
from robustdeq.shapes import Images, Logits

ROWS = 256
"""Rows evaluated at once, where the batch itself is smaller."""


@dataclass(frozen=True)
class FiniteDifference(ModuleGradient):
    """Central differences of the logits in every pixel; 2 evaluations per pixel and sample.

    Evaluations stay in [0, 1]: at its edge a difference is one-sided, over the true distance.
    Biased by O(sigma^2) of the curvature inside the box, O(sigma) at its edge, and blurred over
    sigma where the model has steps.

    Attributes:
        sigma: distance, in pixel values. The default, like that of `NES`, is wide enough to see
            across a quantization of the input or of the logits; on smooth models of 8x8 images its
            mean cosine with the gradient is still above 0.99.
    """

    sigma: float = 0.03

    def __post_init__(self) -> None:
        check_sigma("finite_difference", self.sigma)

    def __str__(self) -> str:
        return f"finite_difference({number(self.sigma)})"

    def __call__(self, model: nn.Module, predict: Predict, x: Images) -> Logits:
        """See `ModuleGradient`; the derivatives of all logits are taken in the forward pass."""
        carrier = _by_pixel(predict, x, self.sigma) if _wanted(x) else None
        return _valued(predict, x, carrier)


@dataclass(frozen=True)
class NES(ModuleGradient):
    """Antithetic differences of the logits along random directions, 2 evaluations for each.

    Ilyas et al. 2018, "Black-box Adversarial Attacks with Limited Queries and Information", who
    average differences times Gaussian directions; here the same differences are fitted by least
    squares, which gives the gradient's projection on the span of the directions: nearer to the
    gradient at equal cost, and exact with as many directions as pixels, whence on the directions
    are the pixels (`FiniteDifference`). The directions are drawn anew at every input, from its
    pixels. Evaluations stay in [0, 1]; each difference belongs to the displacement it was really
    taken over. For deterministic models; noise of the model is divided by sigma. Unbiased but for
    the curvature over sigma, and noisy: its cosine with the gradient is about
    sqrt(samples / pixels).

    Attributes:
        samples: directions, at least 1.
        sigma: standard deviation of a displacement, in pixel values.
    """

    samples: int = 32
    sigma: float = 0.05

    def __post_init__(self) -> None:
        at_least_one("nes", self.samples)
        check_sigma("nes", self.sigma)

    def __str__(self) -> str:
        return f"nes({self.samples},{number(self.sigma)})"

    def __call__(self, model: nn.Module, predict: Predict, x: Images) -> Logits:
        """See `ModuleGradient`; the differences of all logits are taken in the forward pass."""
        if not _wanted(x):
            return _valued(predict, x, None)
        if self.samples >= math.prod(x.shape[1:]):
            return _valued(predict, x, _by_pixel(predict, x, self.sigma))
        return _valued(predict, x, _by_projection(predict, x, self.samples, self.sigma))


def check_sigma(name: str, sigma: float) -> None:
    """Refuse a distance that is not positive and finite."""
    if not 0 < sigma < math.inf:
        raise UsageError(f"{name} has sigma {sigma}; give a positive number, such as 0.01.")


def _wanted(x: Images) -> bool:
    return torch.is_grad_enabled() and x.requires_grad and len(x) > 0


def _valued(predict: Predict, x: Images, carrier: Tensor | None) -> Logits:
    """The model's own logits, evaluated last, so that its solves are those of `x`."""
    with torch.no_grad():
        logits = predict(x.detach())
    return logits if carrier is None else splice(logits, carrier)


def _by_pixel(predict: Predict, x: Images, sigma: float) -> Tensor:
    """Linear in `x`, with the slope of each logit in each pixel."""
    pixels = math.prod(x.shape[1:])
    together = max(1, ROWS // (2 * len(x)))

    def chunks() -> Iterator[Tensor]:
        for begin in range(0, pixels, together):
            chosen = torch.arange(begin, min(begin + together, pixels), device=x.device)
            units = torch.nn.functional.one_hot(chosen, pixels).to(x.dtype)
            yield units.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)

    parts = _differences(predict, x, chunks(), sigma)
    slopes = torch.cat([gap / moved.flatten(2).sum(2, keepdim=True) for gap, moved in parts])
    return torch.einsum("bp,pbc->bc", _moved(x, slopes), slopes)


def _by_projection(predict: Predict, x: Images, samples: int, sigma: float) -> Tensor:
    """Linear in `x`, with the least-squares slope of each logit in the span of the directions."""
    together = max(1, ROWS // (2 * len(x)))
    directions = noise_of(x, samples, "nes").split(together)
    gaps, moves = zip(*_differences(predict, x, directions, sigma), strict=True)
    wide = torch.promote_types(x.dtype, torch.float32)  # half precision has no QR
    gap = torch.cat(gaps).to(wide).transpose(0, 1)
    basis, triangle = torch.linalg.qr(torch.cat(moves).to(wide).flatten(2).permute(1, 2, 0))
    slopes = torch.linalg.solve_triangular(triangle.transpose(1, 2), gap, upper=False)
    # A projection on a random subspace shrinks the gradient by this factor, on average.
    scale: float = basis.shape[1] / samples
    along = torch.einsum("bp,bpd->bd", _moved(x, basis), basis)
    return scale * torch.einsum("bd,bdc->bc", along, slopes)


def _moved(x: Images, like: Tensor) -> Tensor:
    """0 in value; what a linear function of it passes back is its slopes, (batch, pixels)."""
    return (x - x.detach()).flatten(1).to(like)


@torch.no_grad()
def _evaluated(predict: Predict, inputs: Tensor) -> Tensor:
    """Logits (copies, batch, classes) of inputs (copies, batch, *image), in one forward pass."""
    logits: Tensor = predict(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
    return logits


def _differences(
    predict: Predict, x: Images, directions: Iterable[Tensor], sigma: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per chunk of directions, differences of the logits and the displacements they are over."""
    plain = x.detach()
    for direction in directions:
        high = between(plain, plain + sigma * direction)
        low = between(plain, plain - sigma * direction)
        above, below = _evaluated(predict, torch.cat([high, low])).chunk(2)
        yield above - below, high - low
