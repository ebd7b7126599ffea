"""What a client weighs at the server, and the weighted mean of the clients' models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from robustdeq.errors import CaseError
from robustdeq.training.federated.client import Report, State

Weighting = Literal["samples", "steps", "softmax", "residual"]
DELTA = 1e-2
"""Added to residuals, so that a converged client does not weigh without bound."""


def client_weight(weighting: Weighting, report: Report, temperature: float) -> float:
    """A client's weight, up to a factor that all clients share.

    With n images, K iterations and a mean relative residual r: "samples" is n (FedAvg), "steps"
    n K, "softmax" n softmax(K / temperature), "residual" n / (r + DELTA). The denominator of the
    softmax is common to all clients, so that each weight is known without the others.
    """
    n, steps = report.samples, report.steps
    if weighting == "steps":
        return float(n * steps)
    if weighting == "softmax":
        return n * math.exp(steps / temperature)
    if weighting == "residual":
        return n / (report.residual + DELTA)
    return float(n)


def fused(states: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted mean of models, taken in float64.

    Raises:
        CaseError: if the weights do not sum to a positive number.
    """
    total = math.fsum(weights)
    if not 0 < total < math.inf:
        raise CaseError(
            f"the clients' weights sum to {total}; choose another weighting, or lower the "
            "learning rate."
        )
    # The true sum: with another divisor the parameters would shrink a little every round.
    shares = [weight / total for weight in weights]
    return {
        name: as_in(first, sum(s[name].double() * w for s, w in zip(states, shares, strict=True)))
        for name, first in states[0].items()
    }


def as_in(model: Tensor, mean: Tensor | int) -> Tensor:
    """A mean in the type that the model has; whole numbers (a batch counter) are rounded."""
    mean = torch.as_tensor(mean)
    return (mean if model.is_floating_point() else mean.round()).to(model.dtype)
