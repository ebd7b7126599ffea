"""What all gradients of solves share: batches, bits, exact convergence, tuples, short solves."""

from __future__ import annotations

import pytest
import torch
from test_equilibrium import relative
from test_gradients import SIX, SOLVERS, differences, gradient_of, mixed_images, named, through
from torch import Tensor
from toys import ToyEquilibrium

from robustdeq.equilibrium import (
    Anderson,
    Backprop,
    Broyden,
    FixedPoint,
    Implicit,
    Intermediate,
    OneStep,
    Phantom,
    SimultaneousAdjoint,
    SolveGradient,
    Solver,
    Unrolled,
    metered,
)
from robustdeq.errors import UsageError
from robustdeq.targets import Target

EXACT: list[Solver] = [FixedPoint(**SIX), Anderson(**SIX), Broyden(**SIX)]
"""Where a cell is constant in its state, these reach it exactly, with a gap of 0."""
SOLVE_GRADIENTS: list[SolveGradient] = [
    Implicit(),
    Implicit(tolerance=1e-10),
    OneStep(),
    Phantom(5, 0.5),
    Unrolled(6),
    Backprop(),
    Intermediate(2, 3, 0.5),
    SimultaneousAdjoint(),
    SimultaneousAdjoint(0.5),
]


@pytest.mark.parametrize("solver", SOLVERS[5:], ids=named(SOLVERS[5:]))
@pytest.mark.parametrize("gradient", SOLVE_GRADIENTS, ids=named(SOLVE_GRADIENTS))
def test_a_gradient_does_not_depend_on_its_batch_companions(
    gradient: SolveGradient, solver: Solver
) -> None:
    model, x = ToyEquilibrium(solver, rho=0.9), mixed_images(4)
    together = through(model, gradient, x)
    alone = torch.cat([through(model, gradient, x[k : k + 1]) for k in range(len(x))])
    assert relative(together, alone) < 1e-9
    assert float(together.abs().max()) > 0


@pytest.mark.parametrize("solver", SOLVERS[5:], ids=named(SOLVERS[5:]))
@pytest.mark.parametrize("gradient", SOLVE_GRADIENTS, ids=named(SOLVE_GRADIENTS))
def test_deployed_logits_stay_bit_for_bit_also_where_rows_are_dropped(
    gradient: SolveGradient, solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustdeq.equilibrium.iteration._WORTH_GATHERING", 0)
    model, x = ToyEquilibrium(solver, rho=0.9), mixed_images()
    view = Target(model, 4).through(gradient)
    assert torch.equal(view(x.clone().requires_grad_()).logits, model(x))


@pytest.mark.parametrize("solver", EXACT, ids=named(EXACT))
@pytest.mark.parametrize("gradient", SOLVE_GRADIENTS, ids=named(SOLVE_GRADIENTS))
def test_a_cell_that_ignores_its_state_converges_exactly_and_has_a_gradient(
    gradient: SolveGradient, solver: Solver
) -> None:
    class Stateless(ToyEquilibrium):
        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            return torch.tanh(injection)

    model, x = Stateless(solver), mixed_images()
    expected = gradient_of(lambda x: model.readout(torch.tanh(model.embed(x))), x)
    found = through(model, gradient, x)
    # Damped steps lose a known share, the same for all pixels.
    lost = {"phantom(5,0.5)": 0.5**5, "intermediate(2,3,0.5)": 0.5**3}.get(str(gradient), 0.0)
    assert relative(found, (1 - lost) * expected) < 1e-12


@pytest.mark.parametrize("solver", [FixedPoint(), Anderson(**SIX), Broyden(**SIX)])
@pytest.mark.parametrize("gradient", SOLVE_GRADIENTS, ids=named(SOLVE_GRADIENTS))
def test_a_cell_without_input_or_state_has_gradient_zero(
    gradient: SolveGradient, solver: Solver, toy_images: Tensor
) -> None:
    class Constant(ToyEquilibrium):
        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            return torch.ones_like(z)

    assert float(through(Constant(solver), gradient, toy_images).abs().max()) == 0.0


@pytest.mark.parametrize("solver", SOLVERS[5:], ids=named(SOLVERS[5:]))
@pytest.mark.parametrize("gradient", SOLVE_GRADIENTS, ids=named(SOLVE_GRADIENTS))
def test_injections_may_be_tuples_under_every_estimator(
    gradient: SolveGradient, solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pair(ToyEquilibrium):
        def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return 0.25 * super().embed(x), 0.75 * super().embed(x)

        def cell(self, z: Tensor, injection: tuple[Tensor, Tensor], step: int) -> Tensor:  # type: ignore[override]
            return super().cell(z, injection[0] + injection[1], step)

    monkeypatch.setattr("robustdeq.equilibrium.iteration._WORTH_GATHERING", 0)
    x = mixed_images()
    single = through(ToyEquilibrium(solver, rho=0.9), gradient, x)
    assert relative(through(Pair(solver, rho=0.9), gradient, x), single) < 1e-7


@pytest.mark.parametrize("gradient", SOLVE_GRADIENTS, ids=named(SOLVE_GRADIENTS))
def test_solves_of_one_step(gradient: SolveGradient) -> None:
    x = mixed_images()
    model = ToyEquilibrium(FixedPoint(tolerance=0.0, max_steps=1))
    found = through(model, gradient, x)
    assert bool(found.isfinite().all())
    if isinstance(gradient, Backprop):
        assert relative(found, differences(model, x)) < 1e-9
    for solver in (Anderson(max_steps=1), Broyden(max_steps=1)):
        # These answer with the best iterate that they have evaluated: the start, a constant.
        constant = ToyEquilibrium(solver)
        assert float(differences(constant, x).abs().max()) == 0.0
        assert float(through(constant, Backprop(), x).abs().max()) == 0.0
        assert bool(through(constant, gradient, x).isfinite().all())


@pytest.mark.parametrize(
    "gradient", [Unrolled(3), Backprop(), Intermediate(1, 1), SimultaneousAdjoint()]
)
def test_gradients_along_the_solve_refuse_a_warm_start(
    gradient: SolveGradient, toy_images: Tensor
) -> None:
    model = ToyEquilibrium(FixedPoint(**SIX))
    state = Target(model, 4)(toy_images).solves[0].z
    with pytest.raises(UsageError, match="refuses a warm start"):
        Target(model, 4).through(gradient)(toy_images.requires_grad_(), warm=[state])


@pytest.mark.parametrize("gradient", [Backprop(), SimultaneousAdjoint(), Implicit(tolerance=1e-6)])
@pytest.mark.parametrize("solver", SOLVERS[5:], ids=named(SOLVERS[5:]))
def test_evaluations_are_charged_until_a_samples_own_stop(
    gradient: SolveGradient, solver: Solver
) -> None:
    model, x = ToyEquilibrium(solver, gradient, rho=0.9), mixed_images()

    def cost(parts: tuple[Tensor, ...]) -> tuple[int, int]:
        with metered() as meter:
            for part in parts:
                gradient_of(model, part)
        return meter.forward, meter.backward

    assert cost((x,)) == cost(x.split(1))
