"""Looks with carried states, against dense references and against solves."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attacked import BALL, Centered, contested
from robustdeq.attacks._apgd import AutoPGD
from robustdeq.attacks._ascent import Lanes, ascend
from robustdeq.attacks._carried import Carried
from robustdeq.attacks._ledger import EVERY, Ledger
from robustdeq.attacks._losses import named_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import ToyEquilibrium

from robustdeq.equilibrium import Dynamics, FixedPoint, Implicit, JointState, Lockstep, metered
from robustdeq.targets import Target


def logsumexp(logits: Tensor) -> Tensor:
    return logits.logsumexp(1)


def honest(model: ToyEquilibrium, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(logsumexp(model(leaf)).sum(), leaf)
    return found


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("updates", [1, 3])
def test_joint_warm_and_cold_looks_agree_at_a_fixed_point(
    toy_images: Tensor, damping: float, updates: int
) -> None:
    tight = FixedPoint(tolerance=1e-13, max_steps=500)
    toy = ToyEquilibrium(tight, Implicit(tight))
    lockstep = Lockstep(Dynamics(toy, damping, damping), updates)
    dense_logits, dense = toy.dense_gradient(toy_images)
    cold = JointState(torch.zeros(len(toy_images), 12).double(), torch.zeros(1).double())
    for state in (lockstep.settled(toy_images), lockstep.dynamics.start(toy_images), cold):
        for _ in range(400):
            look = lockstep.look(toy_images, state, logsumexp)
            state = look.state
        torch.testing.assert_close(look.logits, dense_logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(look.gradient, dense, rtol=1e-8, atol=1e-9)
        assert float(look.residual.max()) < 1e-10
    torch.testing.assert_close(honest(toy, toy_images), dense, rtol=1e-7, atol=1e-9)


def test_the_gradient_has_the_size_of_the_loss_and_the_adjoint_has_not(
    toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    lockstep = Lockstep(Dynamics(toy))
    state = lockstep.settled(toy_images)
    small, large = (
        lockstep.look(toy_images, state, lambda logits, f=factor: f * logsumexp(logits))
        for factor in (1.0, 1e6)
    )
    torch.testing.assert_close(large.gradient, 1e6 * small.gradient)
    torch.testing.assert_close(large.state.adjoint, small.state.adjoint)
    flat = lockstep.look(toy_images, state, lambda logits: 0.0 * logsumexp(logits))
    assert not bool(flat.gradient.any())
    assert bool(flat.state.adjoint.isfinite().all())


def test_a_look_is_as_many_evaluations_and_products_as_updates(
    toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    state = Dynamics(toy).start(toy_images)
    n = len(toy_images)
    for updates in (1, 3):
        with metered() as meter:
            Lockstep(Dynamics(toy), updates).look(toy_images, state, logsumexp)
        assert (meter.forward, meter.backward) == (updates * n, updates * n)
    with metered() as meter:
        Lockstep(Dynamics(toy)).glance(toy_images, state, 4)
    assert (meter.forward, meter.backward) == (4 * n, 0)


def test_more_updates_come_nearer_in_one_look(toy: ToyEquilibrium, toy_images: Tensor) -> None:
    _, dense = toy.dense_gradient(toy_images)
    state = Dynamics(toy).start(toy_images)
    errors = [
        float(
            (Lockstep(Dynamics(toy), k).look(toy_images, state, logsumexp).gradient - dense).norm()
        )
        for k in (1, 4, 16, 64)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * errors[0]


def test_glances_converge_and_leave_the_adjoint(toy: ToyEquilibrium, toy_images: Tensor) -> None:
    lockstep = Lockstep(Dynamics(toy, 0.7))
    state = lockstep.look(toy_images, lockstep.dynamics.start(toy_images), logsumexp).state
    glance = lockstep.glance(toy_images, state, 400)
    torch.testing.assert_close(glance.logits, toy(toy_images), rtol=1e-9, atol=1e-9)
    assert torch.equal(glance.state.adjoint, state.adjoint)
    assert float(glance.residual.max()) < 1e-10


def test_a_state_that_lags_is_told_by_its_residual(toy: ToyEquilibrium, toy_images: Tensor) -> None:
    lockstep = Lockstep(Dynamics(toy))
    state = lockstep.settled(toy_images)
    moved = (toy_images + 0.1).clamp(0, 1)
    residuals = []
    for _ in range(30):
        look = lockstep.look(moved, state, logsumexp)
        residuals.append(float(look.residual.max()))
        state = look.state
    assert residuals[0] > 1e-2
    assert residuals[-1] < 1e-3 * residuals[0]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator: values and numbers of rows asked for."""

    asks = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.asks or any(i is not None and i.dtype is torch.bool for i in chosen):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted_dlr", "margin"])
def test_a_look_never_waits_for_an_accelerator(
    loss: str, toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    lockstep, fun = Lockstep(Dynamics(toy)), named_loss(loss, 4)
    state = lockstep.settled(toy_images)
    y = torch.zeros(len(toy_images), dtype=torch.long)
    with Waits() as waits:
        look = lockstep.look(toy_images, state, lambda logits: fun(logits, y, y + 1))
        lockstep.glance(toy_images, look.state)
    assert waits.seen == []


def test_between_two_scores_an_ascent_never_waits() -> None:
    model, steps = Centered(), 100
    x, y = contested(model, 24)
    ledger = Ledger(Target(model, 4), x, y)
    lockstep = Lockstep(Dynamics(model))
    objective = Carried(lockstep, y, named_loss("ce", 4), lockstep.settled(x))
    samples = torch.arange(len(x))
    lanes = Lanes(samples, torch.full_like(samples, -1), x)
    waited: list[int] = []

    class Noted(AutoPGD):
        def advance(self, step: int, point: Any) -> Any:
            waited.append(len(waits.seen))
            return super().advance(step, point)

    with Waits() as waits:
        ascend(objective, Noted(x, BALL, steps), steps, lanes, ledger, stop=False)
    between = [b - a for a, b in pairwise(waited)]
    assert sum(n > 0 for n in between) <= steps // EVERY
    assert waits.seen  # scores do
