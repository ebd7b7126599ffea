"""Ascents that trust no value, and the random search after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attacked import (
    BALL,
    Centered,
    assert_alike_in_any_company,
    attacked,
    contested,
    linear_robust,
    survivors,
)
from robustdeq.attacks.apgd import APGD
from robustdeq.attacks.search import Search
from torch import Tensor, nn
from toys import Linear

from robustdeq.differentiation import parse_gradient
from robustdeq.errors import UsageError
from robustdeq.targets import Target
from robustdeq.threats import Threat

QUICK: dict[str, Any] = {"steps": 10, "restarts": 2, "targets": 2, "queries": 0}


class Saturated(nn.Module):
    """Probabilities of 0 and 1, whose own gradient is 0 and whose margins are all alike."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(3e4 * self.base(x), 1)


class Cut(nn.Module):
    """No gradient at all."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(x)
        return logits.detach()


def images(model: nn.Module, n: int = 40) -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, model(x).argmax(1)


@pytest.mark.parametrize("text", ["Linf:0.012", "L2:0.08"])
def test_a_saturated_model_falls_to_its_exact_robust_accuracy(text: str, linear: Linear) -> None:
    threat, (x, y) = Threat.parse(text), images(linear)
    exact = int(linear_robust(linear, x, y, threat).sum())
    assert 0.2 < exact / len(x) < 0.8
    target = Target(Saturated(linear), 4, gradient=parse_gradient("straight_through"))
    assert (
        survivors(target, attacked(APGD(steps=10, loss="margin"), target, x, y, threat), y) > exact
    )
    assert survivors(target, attacked(Search(**QUICK), target, x, y, threat), y) == exact


@pytest.mark.parametrize("text", ["Linf:0.012", "L2:0.08"])
def test_random_search_needs_no_gradient(text: str, linear: Linear) -> None:
    threat, (x, y) = Threat.parse(text), images(linear)
    target = Target(Cut(linear), 4)
    exact = int(linear_robust(linear, x, y, threat).sum())

    def left(queries: int) -> int:
        found = attacked(Search(**{**QUICK, "queries": queries}), target, x, y, threat)
        return survivors(target, found, y)

    assert left(0) > left(60) > left(1000) >= exact
    assert left(1000) <= exact + 2


def test_models_without_masks_are_left_alone_if_asked(linear: Linear) -> None:
    threat, (x, y) = Threat.parse("Linf:0.012"), images(linear)
    search = Search(masked_only=True, **QUICK)
    straight = parse_gradient("straight_through")
    for model, alone in ((linear, True), (Saturated(linear), False), (Cut(linear), False)):
        found = attacked(search, Target(model, 4, gradient=straight), x, y, threat)
        assert torch.equal(found, x) is alone
    # Through the honest gradient there is nothing to compare with.
    assert not torch.equal(attacked(search, Target(linear, 4), x, y, threat), x)


def test_examples_do_not_depend_on_their_company() -> None:
    model = Centered()
    x, y = contested(model)
    search = Search(**{**QUICK, "queries": 30})
    assert_alike_in_any_company(search, Target(model, 4), x, y, BALL)


def test_the_cost_stays_within_the_budget(linear: Linear) -> None:
    x, y = images(linear)
    calls = [0, 0]

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls[0] += 1
            if x.requires_grad:
                calls[1] += 1
            logits: Tensor = linear(x)
            return logits

    search = Search(**{**QUICK, "queries": 30})
    attacked(search, Target(Counted(), 4), x, y, Threat.parse("Linf:1e-6"))
    budget = search.budget(4)
    # Goals side by side share a call.
    assert calls[0] <= budget.forward
    assert calls[1] <= budget.backward


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"restarts": 0}, {"targets": 0}, {"queries": -1}])
def test_parameters_out_of_range_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"search has {next(iter(wrong))}"):
        Search(**wrong)
