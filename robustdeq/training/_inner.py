"""The inner maximization of adversarial training: a short PGD on the training view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustdeq.shapes import Images
from robustdeq.targets import Target
from robustdeq.threats import Threat


def warmed(threat: Threat, progress: float, warmup: float) -> Threat:
    """The threat with its radius grown linearly over the first `warmup` of training.

    Small networks on MNIST at Linf 0.3 otherwise fall into predicting one class for good.
    """
    if warmup <= 0 or progress >= warmup:
        return threat
    share = max(progress / warmup, 0.05)
    return Threat(threat.norm, threat.epsilon * int(1000 * share) / 1000)


def maximized(
    target: Target,
    x: Images,
    threat: Threat,
    loss: Callable[[Tensor], Tensor],
    start: Images,
    steps: int,
    step_size: float,
) -> Images:
    """`steps` of steepest ascent of `loss(logits)` from `start`, projected after each.

    Args:
        step_size: relative to the threat's epsilon.
    """
    current = start
    with frozen(target.model):
        for _ in range(steps):
            current = current.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(target(current).logits), current)
            ascent = threat.steepest(gradient) * (step_size * threat.eps)
            current = threat.project(x, current.detach() + ascent)
    return current.detach()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters inside the block: an attack that needs none saves their cost."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def random_start(x: Images, threat: Threat, generator: torch.Generator) -> Images:
    """A random admissible point for each image."""
    uniform = torch.rand(x.shape, generator=generator) * 2 - 1
    radial = torch.rand(len(x), generator=generator)
    return threat.project(x, x + threat.random_offset(uniform.to(x), radial.to(x)))
