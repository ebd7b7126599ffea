"""Gradients of solves against finite differences, dense float64 references and each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from test_equilibrium import relative
from torch import Tensor, nn
from toys import ToyEquilibrium

from robustdeq.differentiation import Gradient
from robustdeq.equilibrium import (
    Anderson,
    Backprop,
    Broyden,
    Drive,
    FixedPoint,
    Implicit,
    Intermediate,
    Phantom,
    SimultaneousAdjoint,
    Solver,
    Unrolled,
)
from robustdeq.errors import UsageError
from robustdeq.targets import Target

SIX = {"tolerance": 0.0, "max_steps": 6}
LOOSE = {"tolerance": 1e-2, "max_steps": 50}
SOLVERS: list[Solver] = [
    FixedPoint(**SIX),
    FixedPoint(**SIX, damping=0.7),
    Anderson(**SIX),
    Anderson(**SIX, mixing=0.8),
    Broyden(**SIX),
    FixedPoint(**LOOSE),
    Anderson(**LOOSE),
    Broyden(**LOOSE),
]


def named(values: list[object]) -> list[str]:
    return [str(value).replace("max_steps=", "").replace("tolerance=", "") for value in values]


def mixed_images(count: int = 8) -> Tensor:
    """Images half of which let a solve stop much sooner."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(count, 1, 3, 3, dtype=torch.float64, generator=generator)
    x[::2] *= 0.01
    return x


def loss(logits: Tensor) -> Tensor:
    return logits.logsumexp(1)


def gradient_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x)).sum(), x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def through(model: nn.Module, gradient: Gradient, x: Tensor, value: str = "deployed") -> Tensor:
    view = Target(model, 4).through(gradient, "surrogate" if value == "surrogate" else "deployed")
    return gradient_of(lambda z: view(z).logits, x)


def differences(model: nn.Module, x: Tensor, h: float = 3e-5) -> Tensor:
    """Differences of fourth order of the deployed predictor, pixel by pixel."""

    def at(pixel: int, distance: float) -> Tensor:
        moved = x.clone()
        moved.flatten(1)[:, pixel] += distance
        with torch.no_grad():
            return loss(model(moved))

    slopes = [
        (8 * (at(p, h) - at(p, -h)) - (at(p, 2 * h) - at(p, -2 * h))) / (12 * h)
        for p in range(x[0].numel())
    ]
    return torch.stack(slopes, 1).view_as(x)


# Back-propagation through the deployed solver.


@pytest.mark.parametrize("solver", SOLVERS, ids=named(SOLVERS))
def test_backprop_is_the_gradient_of_the_deployed_predictor(solver: Solver) -> None:
    model, x = ToyEquilibrium(solver, Backprop(), rho=0.95), mixed_images(4)
    found, expected = gradient_of(model, x), differences(model, x)
    for row in range(len(x)):
        assert relative(found[row], expected[row]) < 1e-7


@pytest.mark.parametrize("solver", SOLVERS[2:], ids=named(SOLVERS[2:]))
def test_backprop_changes_no_bit_of_the_logits_whether_rows_are_dropped_or_not(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = ToyEquilibrium(solver, Backprop(), rho=0.9), mixed_images()
    whole = gradient_of(model, x)
    monkeypatch.setattr("robustdeq.equilibrium.iteration._WORTH_GATHERING", 0)
    with torch.no_grad():
        ordinary = model(x)
    assert torch.equal(model(x.clone().requires_grad_()), ordinary)
    assert relative(gradient_of(model, x), whole) < 1e-12


def test_backprop_of_plain_iteration_is_unrolling() -> None:
    model, x = ToyEquilibrium(FixedPoint(**SIX), Backprop()), mixed_images()
    assert relative(gradient_of(model, x), through(model, Unrolled(6), x)) < 1e-14


@pytest.mark.parametrize("solver", [FixedPoint, Anderson, Broyden])
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_backprop_goes_through_a_start_that_carries_a_graph(
    solver: type[Solver], tolerance: float
) -> None:
    class Twice(ToyEquilibrium):
        def predict(self, x: Tensor, solve: Drive) -> Tensor:
            first = solve(self.cell, self.embed(x), steps=3)
            start = torch.tanh(2 * first.z)
            return self.readout(solve(self.cell, self.embed(x**2), start=start, steps=3).z)

    model, x = Twice(solver(tolerance=tolerance), Backprop(), rho=0.9), mixed_images()
    expected = differences(model, x)
    assert relative(gradient_of(model, x), expected) < 1e-8
    # An estimator that takes the start as a constant is another one.
    assert relative(through(model, Phantom(3), x), expected) > 1e-3


@pytest.mark.parametrize("solver", [FixedPoint, Anderson, Broyden])
def test_backprop_gives_kept_states_their_gradients(solver: type[Solver]) -> None:
    class Ensemble(ToyEquilibrium):
        def predict(self, x: Tensor, solve: Drive) -> Tensor:
            states = solve(self.cell, self.embed(x), keep_states=True).states
            return self.readout(torch.stack(states).square().sum(0))

    model, x = Ensemble(solver(**SIX), Backprop(), rho=0.9), mixed_images()
    assert relative(gradient_of(model, x), differences(model, x)) < 1e-8
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(model(x.clone().requires_grad_()), expected)


def test_backprop_reaches_the_parameters() -> None:
    model, x = ToyEquilibrium(Anderson(**SIX), Backprop()), mixed_images()
    (found,) = torch.autograd.grad(loss(model(x)).sum(), model.w)
    direction = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator())
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            model.w.add_(sign * 1e-6 * direction)
            values.append(float(loss(model(x)).sum()))
            model.w.sub_(sign * 1e-6 * direction)
    slope = (values[0] - values[1]) / 2e-6
    assert float((found * direction).sum()) == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize("solver", [Anderson, Broyden])
def test_backprop_leaves_out_what_diverges_after_the_answer(solver: type[Solver]) -> None:
    class Breaking(ToyEquilibrium):
        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            image = super().cell(z, injection, step)
            return image if step < 3 else image / torch.zeros_like(image)

    x = mixed_images()
    model = Breaking(solver(**SIX), Backprop())
    sound = ToyEquilibrium(solver(tolerance=0.0, max_steps=3), Backprop())
    found = gradient_of(model, x)
    assert float(found.abs().max()) > 0
    assert relative(found, gradient_of(sound, x)) < 1e-14


# States on the way.


@pytest.mark.parametrize("solver", SOLVERS, ids=named(SOLVERS))
@pytest.mark.parametrize(("state", "damping"), [(1, 0.5), (3, 1.0), (60, 0.5)])
def test_intermediate_is_damped_steps_from_the_answer_after_so_many_evaluations(
    solver: Solver, state: int, damping: float
) -> None:
    model, x = ToyEquilibrium(solver, rho=0.9), mixed_images()

    def by_hand(x: Tensor) -> Tensor:
        u = model.embed(x)
        early = solver.with_steps(min(state, solver.max_steps))
        with torch.no_grad():
            z = model.drive(solver=early)(model.cell, u).z
        for _ in range(4):
            z = (1 - damping) * z + damping * torch.tanh(z @ model.w.T + u)
        return model.readout(z)

    gradient = Intermediate(state, 4, damping)
    assert relative(through(model, gradient, x, "surrogate"), gradient_of(by_hand, x)) < 1e-12


def test_intermediate_states_count_from_one_and_end_with_the_answer() -> None:
    model, x = ToyEquilibrium(FixedPoint(**SIX)), mixed_images()
    last = through(model, Phantom(5, 0.5), x)
    assert torch.equal(through(model, Intermediate(6, 5, 0.5), x), last)
    assert torch.equal(through(model, Intermediate(99, 5, 0.5), x), last)
    assert relative(through(model, Intermediate(5, 5, 0.5), x), last) > 1e-6
    with pytest.raises(UsageError, match="count from 1"):
        Intermediate(0, 5)


def test_states_that_nobody_asked_for_are_not_returned(toy_images: Tensor) -> None:
    drive = ToyEquilibrium(FixedPoint(**SIX)).drive(Intermediate(2, 1))
    x = toy_images.requires_grad_()
    model = ToyEquilibrium(FixedPoint(**SIX))
    assert drive(model.cell, model.embed(x)).states == ()
    assert len(drive(model.cell, model.embed(x), keep_states=True).states) == 7


@pytest.mark.parametrize("damping", [1.0, 0.4])
@pytest.mark.parametrize("solver", SOLVERS, ids=named(SOLVERS))
def test_simultaneous_adjoint_advances_once_per_state(solver: Solver, damping: float) -> None:
    model, x = ToyEquilibrium(solver, rho=0.9), mixed_images()
    found = through(model, SimultaneousAdjoint(damping), x).flatten(1)
    with torch.no_grad():
        u = model.embed(x)
        for row in range(len(x)):  # each sample alone, so that it has its own length
            solve = model.drive()(model.cell, u[row : row + 1], keep_states=True)
            g = torch.softmax(model.readout(solve.z), 1) @ model.r
            slopes = [1 - torch.tanh(z @ model.w.T + u[row]) ** 2 for z in solve.states]
            v = g
            for slope in slopes:
                v = (1 - damping) * v + damping * ((v * slope) @ model.w + g)
            assert relative(found[row], ((v * slopes[-1]) @ model.u)[0]) < 1e-11


def test_simultaneous_adjoint_approaches_the_dense_gradient_and_records_its_residual() -> None:
    x = mixed_images()
    residuals = []
    for steps in (2, 8, 60):
        model = ToyEquilibrium(FixedPoint(tolerance=0.0, max_steps=steps), SimultaneousAdjoint())
        drive, leaf = model.drive(), x.clone().requires_grad_()
        loss(model.predict(leaf, drive)).sum().backward()
        trace = drive.solves[0].adjoint
        assert trace is not None
        assert trace.residual is not None
        assert trace.steps is not None
        assert trace.steps.tolist() == [steps + 1] * 8
        residuals.append(float(trace.residual.max()))
    assert residuals == sorted(residuals, reverse=True)
    assert leaf.grad is not None
    assert relative(leaf.grad, model.dense_gradient(x)[1]) < 1e-7


# The implicit gradient at the fixed point itself.


def test_tight_implicit_takes_its_jacobians_at_the_fixed_point(toy_images: Tensor) -> None:
    model = ToyEquilibrium(FixedPoint(tolerance=0.0, max_steps=3), rho=0.9)
    tight = Implicit(tolerance=1e-12)
    logits, expected = model.dense_gradient(toy_images)
    assert relative(through(model, tight, toy_images, "surrogate"), expected) < 1e-10
    view = Target(model, 4).through(tight, "surrogate")
    assert relative(view(toy_images).logits.detach(), logits) < 1e-10
    with torch.no_grad():
        assert relative(view(toy_images).logits, logits) < 1e-10
    # The deployed view has its loss where the deployed solver stopped.
    with torch.no_grad():
        g = torch.softmax(model(toy_images), 1) @ model.r
    z, u = torch.zeros_like(g), model.embed(toy_images).detach()
    for _ in range(400):
        z = torch.tanh(z @ model.w.detach().T + u)
    jacobian = (1 - z**2)[:, :, None] * model.w.detach()
    v = torch.linalg.solve(torch.eye(12).to(g) - jacobian.transpose(1, 2), g[:, :, None])
    expected = (v.squeeze(2) * (1 - z**2)) @ model.u.detach()
    found = through(model, tight, toy_images)
    assert relative(found.flatten(1), expected) < 1e-10
    assert relative(through(model, Implicit(), toy_images).flatten(1), expected) > 1e-4


def test_tight_implicit_falls_back_to_the_best_iterate(toy_images: Tensor) -> None:
    class Drifting(ToyEquilibrium):
        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            return z + torch.cos(z) * 0.1 + 1.0 + injection.abs()  # has no fixed point

    model = Drifting(FixedPoint(**SIX))
    assert bool(through(model, Implicit(tolerance=1e-8), toy_images).isfinite().all())


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1e-3, math.nan])
def test_impossible_tolerances_are_refused(tolerance: float) -> None:
    with pytest.raises(UsageError, match="outside"):
        Implicit(tolerance=tolerance)


@pytest.mark.parametrize("solver", [FixedPoint, Anderson, Broyden])
def test_backprop_goes_through_a_start_that_depends_on_the_injection(
    solver: type[Solver], toy_images: Tensor
) -> None:
    class Own(ToyEquilibrium):
        def start(self, injection: Tensor) -> Tensor:  # type: ignore[override]
            return torch.tanh(0.5 * injection)

    model = Own(solver(tolerance=0.0, max_steps=4), Backprop(), rho=0.9)
    assert relative(gradient_of(model, toy_images), differences(model, toy_images)) < 1e-8
