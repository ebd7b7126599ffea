"""Six ways to keep a model's predictions and hide its gradient; PGD gets through them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from robustdeq.attacks.pgd import PGD
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.differentiation.straight_through import StraightThrough
from robustdeq.randomness import SampleRandom
from robustdeq.targets import Target
from robustdeq.threats import Threat

loaded = cache(robustdeq.load_model)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    part = load_slice("digits", "test", 100)
    return torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)


class Quantized(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base((x * 8).round() / 8)


class RoundedLogits(Quantized):
    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) * 4).round() / 4


class Shuffled(Quantized):
    """The gradient of a path that the value does not take."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        other = self.base(x.flatten(1)[:, order].view_as(x))
        return self.base(x).detach() + other - other.detach()


class Skipped(Quantized):
    """A detached solve, and a gradient through a small skip alone."""

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        z = base.drive()(base.cell, base.embed(x)).z.detach()
        return base.readout(z) + 1e-3 * x.flatten(1)[:, :10]


class EarlyExit(Quantized):
    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        injection = base.embed(x)
        with torch.no_grad():
            z, logits = torch.zeros_like(injection), torch.zeros(len(x), 10)
            done = torch.zeros(len(x), dtype=torch.bool)
            for step in range(12):
                z = base.cell(z, injection, step)
                logits = torch.where(done[:, None], logits, base.readout(z))
                done |= logits.softmax(1).amax(1) > 0.999
        return logits + 1e-3 * x.flatten(1)[:, :10]


class Purified(Quantized):
    def forward(self, x: Tensor) -> Tensor:
        y = x.detach()
        for _ in range(4):
            y = y.detach().requires_grad_()
            with torch.enable_grad():
                log_p = F.log_softmax(self.base(y), 1)
                (slope,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), y)
            y = (y - 0.01 * slope.sign()).clamp(0, 1)
        return self.base(y.detach()) + 1e-3 * x.flatten(1)[:, :10]


def robust(model: nn.Module, data: tuple[Tensor, Tensor], gradient: Any = None) -> float:
    """Accuracy in percent after 12 steps of PGD within 1/8."""
    x, y = data
    target = Target(model, 10, gradient=gradient)
    attack = PGD(steps=12, loss="ce")
    found = attack.run(target, x, y, Threat.parse("Linf:1/8"), SampleRandom(0, "t", range(len(x))))
    with torch.no_grad():
        return 100 * float((target(found).logits.argmax(1) == y).float().mean())


@pytest.mark.parametrize(
    ("wrapper", "base"),
    [
        (Quantized, "Standard_feedforward"),
        (RoundedLogits, "Standard_feedforward"),
        (Shuffled, "Standard_feedforward"),
        (Skipped, "Standard_deq"),
        (EarlyExit, "Standard_deq"),
    ],
)
def test_pgd_reaches_the_base_behind_its_mask(
    wrapper: Any, base: str, digits: tuple[Tensor, Tensor]
) -> None:
    plain = loaded(base)
    model = wrapper(plain).eval()
    assert robust(model, digits) > 90
    assert robust(model, digits, StraightThrough()) <= robust(plain, digits) + 2


def test_pgd_gains_behind_a_purifier_and_more_by_passing_it_over(
    digits: tuple[Tensor, Tensor],
) -> None:
    model = Purified(loaded("Standard_feedforward")).eval()
    assert robust(model, digits) > 90
    assert robust(model, digits, StraightThrough()) < 70
    assert robust(model, digits, StraightThrough(bypass=True)) < 50
