"""What surrogate values and warm starts claim: only the deployed predictor, cold, is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attacked import BALL, Centered, attacked, contested, survivors
from robustdeq.attacks._apgd import AutoPGD
from robustdeq.attacks._ascent import Lanes, LogitLoss, ascend
from robustdeq.attacks._ledger import Ledger, margins_of
from robustdeq.attacks._losses import named_loss
from robustdeq.attacks.apgd import APGD
from robustdeq.attacks.pgd import PGD
from torch import Tensor

from robustdeq.equilibrium import (
    FixedPoint,
    OneStep,
    Phantom,
    Problem,
    Solve,
    SolveGradient,
    Solver,
    Unrolled,
    metered,
)
from robustdeq.errors import UsageError
from robustdeq.interfaces import Attack
from robustdeq.targets import Target
from robustdeq.threats import Threat


@pytest.fixture(scope="module")
def toy() -> Centered:
    return Centered()


@pytest.fixture(scope="module")
def toy_data(toy: Centered) -> tuple[Tensor, Tensor]:
    return contested(toy)


class Twisted(SolveGradient):
    """A carrier with the derivative's sign turned: the deployed model lies about its gradient."""

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        honest = OneStep().carrier(problem, solution, solver).z
        return solution._replace(z=2 * honest.detach() - honest)


@pytest.mark.parametrize("value", ["deployed", "surrogate"])
@pytest.mark.parametrize("attack", [APGD(steps=20), PGD(steps=20)], ids=["apgd", "pgd"])
def test_planted_masking_falls_to_the_right_estimator_only(
    attack: Attack, value: Any, toy: Centered, toy_data: tuple[Tensor, Tensor]
) -> None:
    x, y = toy_data
    exact = survivors(Target(toy, 4), attacked(attack, Target(toy, 4), x, y, BALL), y)
    masked = Target(Centered(gradient=Twisted()), 4)
    fooled = survivors(masked, attacked(attack, masked, x, y, BALL), y)
    through = masked.through(Phantom(20), value)
    found = survivors(masked, attacked(attack, through, x, y, BALL), y)
    assert found == exact < fooled - 2


class Branches(Centered):
    """Bistable: from the cold start the input decides, from a warm one the state stays."""

    def cell(self, z: Tensor, injection: Any, step: int) -> Tensor:
        return torch.tanh(2.0 * z + injection)

    def embed(self, x: Tensor) -> Tensor:
        return 0.2 * super().embed(x)


def watched(target: Target, x: Tensor, y: Tensor, threat: Threat, **how: Any) -> Ledger:
    ledger = Ledger(target, x, y)
    objective = LogitLoss(target, y, named_loss("ce", 4), **how)
    lanes = Lanes(torch.arange(len(x)), torch.full_like(y, -1), x)
    ascend(objective, AutoPGD(x, threat, 13), 13, lanes, ledger, stop=False)
    return ledger


@pytest.mark.parametrize(
    "see",
    [
        lambda target: (target, {"warm": True}),
        lambda target: (target.through(Phantom(1, 0.5), "surrogate"), {}),
        lambda target: (target.through(Phantom(1, 0.5), "surrogate"), {"warm": True}),
        lambda target: (target, {}),
    ],
    ids=["warm", "surrogate", "warm surrogate", "honest"],
)
def test_what_is_claimed_is_the_cold_deployed_margin(
    see: Callable[[Target], tuple[Target, dict[str, Any]]],
) -> None:
    model = Branches(FixedPoint(tolerance=1e-9, max_steps=60))
    x, y = contested(model)
    target, how = see(Target(model, 4))
    ledger = watched(target, x, y, BALL, **how)
    with torch.no_grad():
        cold = margins_of(model(ledger.x), y)
    torch.testing.assert_close(ledger.margin, cold, rtol=0, atol=1e-9)
    assert bool((ledger.margin >= margins_of(model(x).detach(), y)).all())
    assert int((ledger.margin > 0).sum()) > 2


def test_warm_starts_of_the_planted_branches_do_lie() -> None:
    """Without which the test above would prove nothing."""
    model = Branches(FixedPoint(tolerance=1e-9, max_steps=60))
    x, _ = contested(model)
    start = Target(model, 4)(x).solves[0].z
    moved = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    warm, cold = Target(model, 4)(moved, [start]).logits, model(moved)
    assert int((warm.argmax(1) != cold.argmax(1)).sum()) > 2


@pytest.mark.parametrize("attack", [APGD(steps=15), PGD(steps=15)], ids=["apgd", "pgd"])
def test_warm_starts_save_evaluations_and_break_the_same(attack: APGD | PGD) -> None:
    slow = Centered(FixedPoint(tolerance=1e-9, max_steps=400), rho=0.9)
    (x, y), spent, left = contested(slow), [], []
    for each in (attack, replace(attack, warm=True)):
        with metered() as meter:
            left.append(survivors(Target(slow, 4), attacked(each, Target(slow, 4), x, y, BALL), y))
        spent.append(meter.forward)
    assert left[1] == left[0] < 12
    assert spent[1] < 0.9 * spent[0]


@pytest.mark.parametrize(
    "model",
    [Centered(), Centered(FixedPoint(tolerance=0.0, max_steps=9))],
    ids=["unrolled", "tied"],
)
def test_fixed_lengths_are_attacked_cold(model: Centered, toy_data: tuple[Tensor, Tensor]) -> None:
    x, y = toy_data
    target = Target(model, 4)
    if model.solver.tolerance > 0:
        target = target.through(Unrolled(30))
    cold, warm = (attacked(APGD(steps=8, warm=w), target, x, y, BALL) for w in (False, True))
    assert torch.equal(cold, warm)


class Refusing(Phantom):
    """A gradient of another package that has no use for warm starts."""

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        if problem.warm:
            raise UsageError("no warm start, please.")
        return super().carrier(problem, solution, solver)


def test_a_gradient_that_refuses_warm_starts_does_without(
    toy: Centered, toy_data: tuple[Tensor, Tensor]
) -> None:
    target = Target(toy, 4).through(Refusing(5))
    cold, warm = (attacked(APGD(steps=12, warm=w), target, *toy_data, BALL) for w in (False, True))
    left = [survivors(target, found, toy_data[1]) for found in (cold, warm)]
    assert left[0] == left[1] < 12
