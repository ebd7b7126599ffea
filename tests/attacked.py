"""Small targets and what is asked of every attack on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from toys import Linear, ToyEquilibrium

from robustdeq.equilibrium import FixedPoint, Implicit, SolveGradient, Solver
from robustdeq.interfaces import Attack, Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.targets import Target
from robustdeq.threats import Norm, Threat

BALL = Threat.parse("Linf:0.06")
"""Half of the images of `contested` can be moved across a boundary in it."""


class Centered(ToyEquilibrium):
    """z = tanh(W z + U (x - 1/2)): random images fall into all classes."""

    def __init__(
        self,
        solver: Solver | None = None,
        gradient: SolveGradient | None = None,
        **shape: Any,
    ) -> None:
        solver = solver or FixedPoint(tolerance=1e-9, max_steps=100)
        adjoint = FixedPoint(tolerance=1e-7, max_steps=100)
        super().__init__(solver, gradient or Implicit(adjoint), **shape)

    def embed(self, x: Tensor) -> Tensor:
        return super().embed(x - 0.5)


def contested(model: ToyEquilibrium, n: int = 16) -> tuple[Tensor, Tensor]:
    """Random images, labelled by the model."""
    x = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(5))
    return x, model(x).argmax(1).detach()


def linear_robust(model: Linear, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Whether each sample of a linear model is robust, exactly, where the box does not bind."""
    logits, w = model(x).detach(), model.weight.detach()
    difference = w[y][:, None] - w[None]
    norm = difference.abs().sum(2) if threat.norm is Norm.LINF else difference.norm(dim=2)
    slack = logits.gather(1, y[:, None]) - logits - threat.eps * norm
    return slack.scatter(1, y[:, None], torch.inf).amin(1) > 0


def attacked(attack: Attack, target: Target, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """What the attack finds, all of it in the ball and the box."""
    found = attack.run(target, x, y, threat, SampleRandom(0, "test", range(len(x))))
    if isinstance(found, Candidates):
        assert len(found.made_by) == len(x)
        found = found.x
    assert not any(threat.violations(x, found))
    return found


def survivors(target: Target, x: Tensor, y: Tensor) -> int:
    """How many the deployed predictor still gets right."""
    with torch.no_grad():
        return int((target.model(x).argmax(1) == y).sum())


def assert_alike_in_any_company(
    attack: Attack, target: Target, x: Tensor, y: Tensor, threat: Threat
) -> None:
    """Some of the samples, in another order and in smaller passes, get the same examples."""
    whole = attacked(attack, target, x, y, threat)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[: len(x) // 2]
    rng = SampleRandom(0, "test", order.tolist())
    smaller = Target(target.model, target.classes, pools=target.pools, batch_size=5)
    part = attack.run(smaller, x[order], y[order], threat, rng)
    part = part.x if isinstance(part, Candidates) else part
    torch.testing.assert_close(part, whole[order], rtol=0, atol=1e-6)
    assert not torch.equal(whole, x)
