"""Gradients as means: over a model's own randomness, and over noise on its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustdeq.differentiation.finite_difference import check_sigma
from robustdeq.differentiation.module_gradient import ModuleGradient, Predict
from robustdeq.differentiation.noise import between, noise_of
from robustdeq.differentiation.straight_through import StraightThrough
from robustdeq.equilibrium.gradients import at_least_one, number, splice
from robustdeq.shapes import Images, Logits


@dataclass(frozen=True)
class Expectation(ModuleGradient):
    """The mean of the logits over independent draws of a randomized model, and its gradient.

    Expectation over transformation (Athalye et al. 2018, "Synthesizing Robust Adversarial
    Examples"). Fresh draws in every pass, from PyTorch's global generators; the logits are the
    mean, not a draw of the model. Biased for losses that are not linear in the logits, the less the
    more draws. All draws are in memory at once.

    Attributes:
        draws: forward passes, at least 1.
        straight_through: whether each draw is differentiated by `StraightThrough`.
    """

    keeps_value: ClassVar[bool] = False

    draws: int
    straight_through: bool = False

    def __post_init__(self) -> None:
        at_least_one("eot", self.draws)

    def __str__(self) -> str:
        return f"eot({self.draws}{_last_word(self.straight_through)})"

    def __call__(self, model: nn.Module, predict: Predict, x: Images) -> Logits:
        """See `ModuleGradient`."""
        passed = _inner(model, predict, self.straight_through)
        return torch.stack([passed(x) for _ in range(self.draws)]).mean(0)


@dataclass(frozen=True)
class Smoothed(ModuleGradient):
    """The mean gradient over Gaussian noise on the input: that of the noise-smoothed model.

    Smilkov et al. 2017, "SmoothGrad: removing noise by adding noise", with draws in pairs of
    opposite sign, which cancels what is odd in the noise. The noise is drawn from the pixels;
    inputs are clipped to [0, 1], the gradient passing through the clipping as through an identity.
    The logits are the model's own. Biased by the curvature over sigma, on purpose: it sees through
    waves and steps that are narrower than sigma.

    Attributes:
        draws: noisy copies, at least 1; at an odd number one has no partner.
        sigma: standard deviation of the noise, in pixel values.
        straight_through: whether each copy is differentiated by `StraightThrough`.
    """

    draws: int
    sigma: float
    straight_through: bool = False

    def __post_init__(self) -> None:
        at_least_one("smoothed", self.draws)
        check_sigma("smoothed", self.sigma)

    def __str__(self) -> str:
        return f"smoothed({self.draws},{number(self.sigma)}{_last_word(self.straight_through)})"

    def __call__(self, model: nn.Module, predict: Predict, x: Images) -> Logits:
        """See `ModuleGradient`."""
        carrier = None
        if torch.is_grad_enabled():
            passed = _inner(model, predict, self.straight_through)
            copies = [passed(x + offset) for offset in self._offsets(x.detach())]
            carrier = torch.stack(copies).mean(0)
        # Last, so that the solves are those of the model's own logits.
        with torch.no_grad():
            logits = predict(x.detach())
        return logits if carrier is None else splice(logits, carrier)

    def _offsets(self, x: Images) -> Tensor:
        half = self.sigma * noise_of(x, (self.draws + 1) // 2, "smoothed")
        noise = torch.cat([half, -half])[: self.draws]
        return between(x, x + noise) - x


def _inner(model: nn.Module, predict: Predict, straight_through: bool) -> Predict:
    """The forward pass with the gradient that is averaged."""
    if not straight_through:
        return predict
    gradient = StraightThrough()

    def passed(x: Images) -> Logits:
        return gradient(model, predict, x)

    return passed


def _last_word(straight_through: bool) -> str:
    return ",straight_through" if straight_through else ""
