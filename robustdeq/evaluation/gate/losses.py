"""The losses whose gradients are examined, and their gradients in the input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from robustdeq.shapes import Images, Labels, Logits, PerSample
from robustdeq.targets import Target

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (batch, classes) and labels to the loss of each sample."""


def margin(logits: Logits, y: Labels) -> PerSample:
    """Largest other logit minus the label's: above 0 where the sample is misclassified.

    Unlike cross-entropy it does not saturate: its gradient is 0 only where the model's is.
    """
    own = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - own


def cross_entropy(logits: Logits, y: Labels) -> PerSample:
    """Cross-entropy per sample."""
    return F.cross_entropy(logits, y, reduction="none")


def input_gradient(target: Target, x: Images, y: Labels, loss: Loss) -> Images:
    """The gradient of each sample's loss in its own image; 0 where the graph does not reach it."""
    return loss_and_gradient(target, x, y, loss)[1]


def loss_and_gradient(target: Target, x: Images, y: Labels, loss: Loss) -> tuple[PerSample, Images]:
    """The loss of each sample and its gradient in the image; 0 where the graph does not reach it.

    A sample's gradient is its own as long as the model treats the samples of a batch apart.
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        values = loss(target(x).logits, y)
        (gradient,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
    return values.detach(), torch.zeros_like(x) if gradient is None else gradient.detach()


def cosine(one: Tensor, other: Tensor) -> PerSample:
    """Cosine between the rows of two (batch, size) matrices; NaN where either row is 0."""
    one, other = one.double(), other.double()
    lengths = torch.linalg.vector_norm(one, dim=1) * torch.linalg.vector_norm(other, dim=1)
    products: Tensor = torch.nan_to_num((one * other).sum(1))
    quotient: Tensor = products / lengths
    return quotient
