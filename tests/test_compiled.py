"""Copies of models with compiled parts; only traced by torch.compile, for compilers are slow."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from attacked import BALL, Centered, contested
from robustdeq.attacks import _screen
from robustdeq.attacks._screen import Screen
from robustdeq.attacks.autoattack import AutoAttack
from torch import Tensor

from robustdeq.datasets import DataSpec
from robustdeq.equilibrium import Compiled, Dynamics, Lockstep, compiled, metered
from robustdeq.errors import UsageError
from robustdeq.registry import load
from robustdeq.targets import Target

# Tracing looks at the gradients of whatever it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
traced = partial(Compiled, backend="aot_eager")
"""Forward and backward pass are traced as ever, and run by torch's own kernels."""


def logsumexp(logits: Tensor) -> Tensor:
    return logits.logsumexp(1)


class Paired(Centered):
    """Its injection is a pair."""

    def embed(self, x: Tensor) -> Any:
        found = super().embed(x)
        return found, 2 * found

    def cell(self, z: Tensor, injection: Any, step: int) -> Tensor:
        return super().cell(z, (injection[0] + injection[1]) / 3, step)


@pytest.mark.parametrize("kind", [Centered, Paired])
@pytest.mark.parametrize("rows", [1, 31, 33])
def test_looks_and_counts_are_those_of_the_model(kind: type[Centered], rows: int) -> None:
    model = kind()
    x, _ = contested(model, rows)
    twin = compiled(Dynamics(model), x, traced)
    assert isinstance(twin, Compiled)
    shown = []
    for one in (model, twin):
        lockstep = Lockstep(Dynamics(one))
        with metered() as meter:
            state = lockstep.settled(x)
            look = lockstep.look(x, state, logsumexp)
            glance = lockstep.glance(x, look.state, 2)
        shown.append((look, glance, meter))
    (look, glance, meter), (found, seen, counted) = shown
    for name in ("logits", "losses", "gradient", "residual", "slope"):
        torch.testing.assert_close(getattr(found, name), getattr(look, name))
    torch.testing.assert_close(found.state, look.state)
    torch.testing.assert_close(seen, glance)
    assert counted == meter
    assert found.state.z.shape == (rows, 12)


def test_the_model_is_left_alone_and_what_was_shown_is_not_written_over() -> None:
    model = Centered()
    x, _ = contested(model, 40)
    twin = compiled(Dynamics(model), x, traced)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in twin.parameters())
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(
        p.data_ptr() for p in twin.parameters()
    )
    lockstep = Lockstep(Dynamics(twin))
    look = lockstep.look(x, lockstep.settled(x), logsumexp)
    held = look.state.z.clone()
    lockstep.look(1 - x, look.state, logsumexp)
    assert torch.equal(look.state.z, held)


def uncompiled(model: Centered) -> Compiled:
    raise RuntimeError("no compiler here")


class Moved(Compiled):
    def readout(self, z: Tensor) -> Tensor:
        return super().readout(z) + 0.01 * torch.arange(4)


class Masked(Compiled):
    """Its logits are right, and its gradients are half of what they should be."""

    def embed(self, x: Tensor) -> Any:
        found = super().embed(x)
        return (found + found.detach()) / 2


class RightForFew(Compiled):
    def cell(self, z: Tensor, injection: Any, step: int) -> Tensor:
        return super().cell(z, injection, step) * (1.0 if len(z) < 32 else 1.01)


@pytest.mark.parametrize(
    "build",
    [uncompiled, *(partial(kind, backend="eager") for kind in (Moved, Masked, RightForFew))],
)
def test_a_copy_that_is_not_alike_is_not_taken(build: Any) -> None:
    model = Centered()
    x, _ = contested(model, 8)
    assert compiled(Dynamics(model), x, build) is model


def test_the_engine_finds_the_same_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(dynamics: Dynamics, x: Tensor) -> Any:
        built.append(compiled(dynamics, x, traced))
        return built[-1]

    monkeypatch.setattr(_screen, "compiled", build)
    model = Centered()
    x, y = contested(model, 16)
    some, all_ = (
        Screen(
            Target(model, 4), Dynamics(model), x, y, BALL, 0,
            rerun=0.2, queries=99, compile_=compile_,
        ).run()
        for compile_ in (False, True)
    )  # fmt: skip
    assert [type(model) for model in built] == [Compiled]
    torch.testing.assert_close(some.x, all_.x, rtol=0, atol=1e-6)
    assert some.made_by == all_.made_by


def test_convolutions_are_compiled_as_well() -> None:
    defense = load("defense", "deq", {"width": 8, "inner": 8})
    model = defense.build(DataSpec("colors", 10, 3, 12, 12), torch.device("cpu"))
    x = torch.rand(3, 3, 12, 12)
    target = Target(model, 10)
    dynamics = target.dynamics()
    assert dynamics is not None
    assert isinstance(compiled(dynamics, x, traced), Compiled)


def test_many_updates_are_not_compiled() -> None:
    with pytest.raises(UsageError, match="compile=True, updates=2"):
        AutoAttack(engine="joint", compile=True, updates=2)
    with pytest.raises(UsageError, match="engine='reference', compile=True"):
        AutoAttack(compile=True)
