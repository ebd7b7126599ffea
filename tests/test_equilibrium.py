"""Solvers, adjoints and estimators against dense float64 references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import ToyEquilibrium

from robustdeq.differentiation import parse_gradient
from robustdeq.equilibrium import (
    Anderson,
    Broyden,
    Drive,
    EquilibriumClassifier,
    FixedPoint,
    Implicit,
    OneStep,
    Phantom,
    SolveGradient,
    Solver,
    Unrolled,
    metered,
    splice,
)
from robustdeq.errors import UsageError
from robustdeq.targets import Target

TIGHT = {"tolerance": 1e-12, "max_steps": 400}
SOLVERS = [
    FixedPoint(**TIGHT),
    FixedPoint(**TIGHT, damping=0.7),
    Anderson(**TIGHT),
    Broyden(**TIGHT),
]
ids = [type(s).__name__ for s in SOLVERS]


def gradient_of(model: EquilibriumClassifier, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
    return logits.detach(), gradient


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_solvers_find_the_fixed_point_of_newton(
    solver: Solver, rho: float, toy_images: Tensor
) -> None:
    model = ToyEquilibrium(solver, rho=rho)
    logits, _ = model.dense_gradient(toy_images)
    assert relative(model(toy_images).detach(), logits) < 1e-10


@pytest.mark.parametrize("solver", SOLVERS[2:], ids=ids[2:])
def test_quasi_newton_solvers_need_no_contraction(solver: Solver, toy_images: Tensor) -> None:
    model = ToyEquilibrium(solver, rho=3.0)
    drive = model.drive()
    model.predict(toy_images, drive)
    z, u = drive.solves[0].z.detach(), model.embed(toy_images)
    assert float((model.cell(z, u, 0) - z).detach().abs().max()) < 1e-10
    plain = ToyEquilibrium(FixedPoint(**TIGHT), rho=3.0)
    failed = plain.drive()
    plain.predict(toy_images, failed)
    assert float(failed.solves[0].residual.max()) > 1e-3


@pytest.mark.parametrize(
    "solver", [Anderson(max_steps=60), Broyden(max_steps=60), FixedPoint(max_steps=400)]
)
def test_float32_reaches_the_default_tolerance(solver: Solver, toy_images: Tensor) -> None:
    model = ToyEquilibrium(solver, rho=0.95).float()
    drive = model.drive()
    model.predict(toy_images.float(), drive)
    assert float(drive.solves[0].residual.max()) <= 1e-6
    assert int(drive.solves[0].steps.max()) < solver.max_steps


# The stated relative error of each estimator on the toy model with |W| = 0.7.
ESTIMATORS = [
    (Implicit(FixedPoint(tolerance=1e-13, max_steps=500)), 1e-11),
    (Implicit(Anderson(tolerance=1e-13, max_steps=100)), 1e-11),
    (Implicit(Broyden(tolerance=1e-13, max_steps=100)), 1e-11),
    (Phantom(60), 1e-11),
    (Phantom(5, 0.5), 0.1),
    (Unrolled(80), 1e-10),
    (OneStep(), 0.4),
]


@pytest.mark.parametrize(("gradient", "error"), ESTIMATORS, ids=[str(g) for g, _ in ESTIMATORS])
def test_estimators_agree_with_the_dense_gradient(
    gradient: SolveGradient, error: float, toy_images: Tensor
) -> None:
    model = ToyEquilibrium(gradient=gradient).eval()
    logits, expected = model.dense_gradient(toy_images)
    found_logits, found = gradient_of(model, toy_images)
    assert relative(found_logits, logits) < 1e-11
    assert relative(found, expected) < error


def test_phantom_error_shrinks_with_its_length_and_one_step_is_its_shortest(
    toy_images: Tensor,
) -> None:
    def error(gradient: SolveGradient) -> float:
        model = ToyEquilibrium(gradient=gradient)
        return relative(gradient_of(model, toy_images)[1], model.dense_gradient(toy_images)[1])

    errors = [error(Phantom(k)) for k in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]
    assert error(OneStep()) == pytest.approx(errors[0], rel=1e-6)


def test_implicit_gradient_matches_finite_differences_of_inputs_and_parameters(
    toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    x = toy_images[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(toy, (x,), atol=1e-6)
    loss = toy(toy_images).logsumexp(1).sum()
    loss.backward()
    for parameter in toy.parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(sign * 1e-6 * direction)
                values.append(float(toy(toy_images).logsumexp(1).sum()))
                parameter.sub_(sign * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_the_second_backward_pass_gives_the_same_gradient(
    toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    x = toy_images.clone().requires_grad_()
    loss = toy(x).logsumexp(1).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_a_prediction_does_not_depend_on_its_batch_companions(solver: Solver) -> None:
    x = torch.rand(128, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model = ToyEquilibrium(solver, rho=0.9)
    together = model(x).detach()
    alone = torch.cat([model(x[k : k + 1]) for k in range(len(x))]).detach()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))
    assert float((together - alone).abs().max()) < 1e-9
    assert float((together[order] - model(x[order])).detach().abs().max()) < 1e-9


@pytest.mark.parametrize(
    "solver", [FixedPoint(tolerance=1e-2), Anderson(tolerance=1e-2), Broyden(tolerance=1e-2)]
)
def test_stopping_is_per_sample_even_at_a_loose_tolerance(solver: Solver) -> None:
    """Where torchdeq moved by 2e-3 with the companions, at this tolerance."""
    x = torch.rand(64, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[::2] *= 0.01  # half of the batch converges at once
    model = ToyEquilibrium(solver, rho=0.95)
    drive = model.drive()
    together = model.predict(x, drive).detach()
    alone = torch.cat([model(x[k : k + 1]) for k in range(len(x))]).detach()
    assert drive.solves[0].steps.unique().numel() > 1
    assert float((together - alone).abs().max()) < 1e-9


def test_compaction_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(64, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[::2] *= 0.01
    rows: list[int] = []

    class Watched(ToyEquilibrium):
        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            rows.append(len(z))
            return super().cell(z, injection, step)

    for solver in (FixedPoint(), Anderson(), Broyden()):
        model = Watched(solver, rho=0.95)
        whole = model(x)
        assert set(rows) == {64}
        monkeypatch.setattr("robustdeq.equilibrium.iteration._WORTH_GATHERING", 0)
        packed = model(x)
        assert min(rows) <= 32
        assert float((whole - packed).detach().abs().max()) < 1e-12
        monkeypatch.undo()
        rows.clear()


def test_training_mode_and_grad_mode_change_no_value(
    toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    reference = toy.eval()(toy_images)
    assert reference.requires_grad
    assert torch.equal(reference, toy.train()(toy_images))
    with torch.no_grad():
        assert torch.equal(reference, toy(toy_images))
    with torch.inference_mode():
        assert torch.equal(reference, toy(toy_images))
    toy.eval()
    _, evaluated = gradient_of(toy, toy_images)
    _, trained = gradient_of(toy.train(), toy_images)
    assert torch.equal(evaluated, trained)


@pytest.mark.parametrize("text", ["implicit", "one_step", "phantom(5,0.5)", "unrolled(3)"])
def test_deployed_views_keep_the_logits_bit_for_bit(
    text: str, toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    x = toy_images.clone().requires_grad_()
    view = Target(toy, 4).through(parse_gradient(text))
    assert torch.equal(view(x).logits, toy(toy_images))
    (gradient,) = torch.autograd.grad(view(x).logits.sum(), x)
    assert float(gradient.abs().max()) > 0


def test_surrogate_view_shows_the_estimators_own_logits(
    toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    shown = Target(toy, 4).through(Unrolled(2), "surrogate")(toy_images).logits
    u = toy.embed(toy_images)
    z = torch.tanh(torch.tanh(u) @ toy.w.T + u)
    torch.testing.assert_close(shown, toy.readout(z))
    with torch.no_grad():
        assert torch.equal(
            shown, Target(toy, 4).through(Unrolled(2), "surrogate")(toy_images).logits
        )


def test_fixed_length_runs_exactly_its_steps(toy_images: Tensor) -> None:
    model = ToyEquilibrium(FixedPoint(tolerance=0.0, max_steps=3), Unrolled(3))
    steps: list[int] = []

    class Watched(ToyEquilibrium):
        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            steps.append(step)
            return super().cell(z, injection, step)

    watched = Watched(FixedPoint(tolerance=0.0, max_steps=3), Unrolled(3))
    with torch.no_grad():
        out = watched(torch.zeros_like(toy_images))  # converged at once, and yet:
    assert steps == [0, 1, 2]
    u = model.embed(toy_images)
    z = torch.zeros_like(u)
    for k in range(3):
        z = model.cell(z, u, k)
    torch.testing.assert_close(model(toy_images), model.readout(z))
    assert out.shape == (8, 4)


def test_warm_start_saves_steps_and_unrolling_refuses_it(
    toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    target = Target(toy, 4)
    cold = target(toy_images)
    warm = target(toy_images, warm=[cold.solves[0].z])
    assert int(warm.solves[0].steps.max()) < int(cold.solves[0].steps.min())
    assert relative(warm.logits.detach(), cold.logits.detach()) < 1e-11
    assert torch.equal(target(toy_images).logits, cold.logits)  # nothing was kept
    with pytest.raises(UsageError, match="refuses a warm start"):
        target.through(Unrolled(5), "surrogate")(toy_images, warm=[cold.solves[0].z])


def test_adjoint_residual_is_recorded(toy_images: Tensor) -> None:
    model = ToyEquilibrium(gradient=Implicit(FixedPoint(tolerance=1e-12, max_steps=2)), rho=0.95)
    drive = model.drive()
    x = toy_images.clone().requires_grad_()
    logits = model.predict(x, drive)
    trace = drive.solves[0].adjoint
    assert trace is not None
    assert trace.residual is None
    torch.autograd.grad(logits.sum(), x)
    assert trace.residual is not None
    assert float(trace.residual.min()) > 1e-3
    assert trace.steps is not None
    assert trace.steps.tolist() == [2] * 8


def test_nfe_counts_every_cell_call_wherever_it_is_made(
    toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    class Twice(ToyEquilibrium):
        def predict(self, x: Tensor, solve: Drive) -> Tensor:
            first = solve(self.cell, self.embed(x), steps=4)
            z = self.cell(first.z, self.embed(x), 0)  # by hand
            return self.readout(solve(self.cell, self.embed(x), start=z, steps=2).z)

    with metered() as outer, torch.no_grad():
        Twice(FixedPoint(tolerance=0.0, max_steps=9))(toy_images)
    assert outer.forward == 8 * (4 + 1 + 2)
    with metered() as meter:
        x = toy_images.clone().requires_grad_()
        logits = ToyEquilibrium(FixedPoint(tolerance=0.0, max_steps=5), Unrolled(3))(x)
        torch.autograd.grad(logits.sum(), x)
    assert (meter.forward, meter.backward) == (8 * (5 + 3), 8 * 3)


def test_nfe_is_charged_until_a_samples_own_stop() -> None:
    x = torch.rand(32, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[::2] *= 0.01
    model = ToyEquilibrium(FixedPoint(), Implicit(FixedPoint()), rho=0.9)

    def cost(parts: list[Tensor]) -> tuple[int, int]:
        with metered() as meter:
            for part in parts:
                leaf = part.clone().requires_grad_()
                torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf)
        return meter.forward, meter.backward

    assert cost([x]) == cost(list(x.split(1)))
    drive = model.drive()
    with metered() as meter, torch.no_grad():
        model.predict(x, drive)
    assert meter.forward == int(drive.solves[0].steps.sum())


def test_states_are_kept_on_request(toy: ToyEquilibrium, toy_images: Tensor) -> None:
    drive = toy.drive(solver=FixedPoint(tolerance=0.0, max_steps=4))
    solve = drive(toy.cell, toy.embed(toy_images), keep_states=True)
    assert len(solve.states) == 5
    assert torch.equal(solve.states[0], torch.zeros_like(solve.z))
    assert torch.equal(solve.states[-1], solve.z)


def test_injections_may_be_tuples(toy_images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair(ToyEquilibrium):
        def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().embed(x), 0.5 * super().embed(x)

        def cell(self, z: Tensor, injection: tuple[Tensor, Tensor], step: int) -> Tensor:  # type: ignore[override]
            return torch.tanh(z @ self.w.T + injection[0] + injection[1])

    monkeypatch.setattr("robustdeq.equilibrium.iteration._WORTH_GATHERING", 0)
    model = Pair(gradient=Implicit(FixedPoint(tolerance=1e-13, max_steps=500)))
    assert torch.autograd.gradcheck(model, (toy_images[:2].clone().requires_grad_(),), atol=1e-6)


def test_non_finite_cells_are_reported_not_raised(toy_images: Tensor) -> None:
    class Exploding(ToyEquilibrium):
        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            return 1e200 * (z + injection) ** 3

    for solver in (FixedPoint(), Anderson(), Broyden()):
        drive = Exploding(solver).drive()
        model = Exploding(solver)
        with torch.no_grad():
            model.predict(toy_images, drive)
        assert not bool((drive.solves[0].residual < 1e-3).any())


def test_a_cell_that_is_zero_has_residual_zero(toy_images: Tensor) -> None:
    class Zero(ToyEquilibrium):
        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            return 0.0 * z

    for solver in (FixedPoint(), Anderson(), Broyden()):
        drive = Zero(solver).drive()
        with torch.no_grad():
            Zero(solver).predict(toy_images, drive)
        assert drive.solves[0].residual.tolist() == [0.0] * 8


BAD_GRADIENTS = ("", "implicitly", "phantom", "phantom(0)", "phantom(2,0)", "phantom(1.5)")


@pytest.mark.parametrize("text", [*BAD_GRADIENTS, "unrolled()", "unrolled(x)", "one_step(2)"])
def test_gradient_names_that_do_not_parse(text: str) -> None:
    with pytest.raises(UsageError):
        parse_gradient(text)


@pytest.mark.parametrize(
    "text", ["honest", "implicit", "one_step", "phantom(5,0.5)", "unrolled(20)"]
)
def test_gradient_names_are_read_back(text: str) -> None:
    assert str(parse_gradient(text)) == text


@pytest.mark.parametrize("settings", [{"max_steps": 0}, {"tolerance": -1.0}, {"tolerance": 1.0}])
def test_impossible_solvers_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        FixedPoint(**settings)  # type: ignore[arg-type]


def test_splice_takes_the_value_of_one_and_the_gradient_of_the_other() -> None:
    value, carrier = torch.tensor([0.1]), torch.tensor([3.0], requires_grad=True)
    spliced = splice(value, 2 * carrier)
    assert torch.equal(spliced, value)
    assert torch.autograd.grad(spliced.sum(), carrier)[0].item() == 2.0
