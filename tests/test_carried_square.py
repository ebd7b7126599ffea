"""Square on carried states: the reference's search, at less than one evaluation a query."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attacked import BALL, Centered, contested
from hypothesis import given
from hypothesis import strategies as st
from robustdeq.attacks._carried_square import CarriedSquare
from robustdeq.attacks._doubt import ROUNDING, Doubt, calibrated, estimated
from robustdeq.attacks._flight import Flight
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import margin
from robustdeq.attacks._reference import reference_class
from robustdeq.attacks._square import proposals
from torch import Tensor, nn
from toys import Linear

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.equilibrium import (
    Dynamics,
    EquilibriumClassifier,
    FixedPoint,
    JointState,
    Lockstep,
    metered,
)
from robustdeq.targets import Target
from robustdeq.threats import Threat


class Resting(EquilibriumClassifier):
    """A linear classifier as an equilibrium: its cell does not look at the state."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__(FixedPoint(tolerance=1e-6, max_steps=4))
        self.linear = Linear(pixels=192, classes=classes)

    def embed(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
        return injection + 0.0 * z

    def readout(self, z: Tensor) -> Tensor:
        return z


class Slow(EquilibriumClassifier):
    """Its margin is an image's mean, reached by halves."""

    def __init__(self) -> None:
        super().__init__(FixedPoint(tolerance=1e-6, max_steps=60))

    def embed(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([mean, torch.zeros_like(mean)], 1)

    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
        return 0.5 * z + 0.5 * injection

    def readout(self, z: Tensor) -> Tensor:
        return z


class Halved(Doubt):
    """What is left of a solve of `Slow` from 0, for margins up to 3."""

    def __call__(self, residual: Tensor) -> Tensor:
        return torch.where(residual <= ROUNDING, 0.0, 3 * residual)


def searched(
    model: EquilibriumClassifier, x: Tensor, y: Tensor, threat: Threat, queries: int, classes: int
) -> CarriedSquare:
    ledger = Ledger(Target(model, classes), x, y)
    lockstep = Lockstep(Dynamics(model))
    samples = ledger.open()
    search = CarriedSquare(
        lockstep, lockstep.settled(x).take(samples), ledger, samples,
        proposals(x[samples], threat, queries, seed=0),
    )  # fmt: skip
    search.run()
    return search


def the_reference(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, queries: int) -> Tensor:
    attack: Any = reference_class("square", "SquareAttack")(
        model, norm=str(threat.norm), eps=threat.eps, n_queries=queries, p_init=0.8, n_restarts=1,
        seed=0, resc_schedule=False, loss="margin", device=x.device,
    )  # fmt: skip
    attack.init_hyperparam(x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: Tensor = attack.attack_single_run(x.clone(), y.clone())[1]
    return found


@pytest.mark.parametrize("text", ["Linf:0.02", "L2:0.05"])
def test_the_search_is_the_reference_s(text: str) -> None:
    model, threat = Resting(), Threat.parse(text)
    x = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1).detach()
    # Under L2 the reference draws other numbers once an image has fallen.
    far = margin(model(x), y) < -1.5
    x, y = x[far], y[far]
    assert len(x) > 8
    search = searched(model, x, y, threat, 300, 4)
    expected = the_reference(model, x, y, threat, 300)
    torch.testing.assert_close(search.x, expected, rtol=0, atol=1e-5)
    assert not torch.equal(search.x, search.offered.begin)
    assert int((search.best > 0).sum()) == int((model(expected).argmax(1) == y).sum())


@pytest.mark.parametrize("text", ["Linf:0.1", "L2:0.7"])
@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 6, 9), (1, 12, 12)])
def test_candidates_are_in_the_ball(text: str, shape: tuple[int, int, int]) -> None:
    threat = Threat.parse(text)
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(2))
    offered = proposals(x, threat, 60, seed=3)
    assert not any(threat.violations(x, offered.begin))
    best, rows = offered.begin, torch.arange(5)
    for query in range(60):
        best = offered.at(rows, torch.full_like(rows, query), best)
        assert not any(threat.violations(x, best))


def test_candidates_do_not_depend_on_what_is_asked_with_them() -> None:
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    for text in ("Linf:0.1", "L2:0.7"):
        offered = proposals(x, Threat.parse(text), 40, seed=0)
        rows, queries = torch.tensor([0, 1, 1, 4, 5]), torch.tensor([3, 0, 39, 20, 20])
        together = offered.at(rows, queries, offered.begin[rows])
        for k in range(5):
            alone = offered.at(rows[k : k + 1], queries[k : k + 1], offered.begin[rows[k : k + 1]])
            torch.testing.assert_close(alone, together[k : k + 1], rtol=0, atol=1e-6)


def test_an_estimate_is_of_second_order() -> None:
    model = Centered(FixedPoint(tolerance=1e-14, max_steps=500))
    x, y = contested(model)
    x = x.double()
    lockstep = Lockstep(Dynamics(model))
    state = lockstep.settled(x)
    for _ in range(80):
        look = lockstep.look(x, state, lambda logits: -margin(logits, y))
        state = look.state
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    errors: list[float] = []
    plain: list[float] = []
    for size in (1e-3, 5e-4):
        moved = x + size * direction
        injection = lockstep.injection(moved, state)
        truth = lockstep.glance_into(injection, state, 400).logits
        for scale, kept in ((look.slope, errors), (torch.zeros_like(look.slope), plain)):
            estimate = estimated(lockstep, injection, state, y, scale)
            kept.append(float((estimate.margins + margin(truth, y)).abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert plain[0] / plain[1] == pytest.approx(2, rel=0.1)


def test_queries_that_end_early_decide_as_solved_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, threat = robustdeq.load_model("Madry2018Towards_deq"), Threat.parse("Linf:1/8")
    part = load_slice("digits", "test", 24)
    x, y = torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)
    with metered() as early:
        found = searched(model, x, y, threat, 400, 10)
    monkeypatch.setattr(Doubt, "__call__", lambda self, residual: torch.full_like(residual, 1e9))
    with metered() as whole:
        solved = searched(model, x, y, threat, 400, 10)
    # Not the same path: near ties go either way. The same depth.
    difference = found.best.clamp_min(0) - solved.best.clamp_min(0)
    assert abs(float(difference.mean())) < 0.05
    assert early.forward < 0.3 * whole.forward


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Deceiving(Centered):
    """Its backward pass has the wrong sign: estimates point away from what they estimate."""

    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
        return super().cell(_Reversed.apply(z), injection, step)


def test_a_wrong_gradient_costs_evaluations_and_not_candidates() -> None:
    honest, masked = Centered(rho=0.9), Deceiving(rho=0.9)
    x, y = contested(honest, 24)
    truth, found = (searched(model, x, y, BALL, 600, 4) for model in (honest, masked))
    assert found.doubt.factor > 2 * truth.doubt.factor
    assert int((found.best <= 0).sum()) >= int((truth.best <= 0).sum()) - 1
    assert int((truth.best <= 0).sum()) > 4


def test_an_audit_that_fails_widens_the_bound() -> None:
    model = Centered()
    x, y = contested(model, 8)
    search = searched(model, x, y, Threat.parse("Linf:0.001"), 4, 4)
    rows = torch.arange(len(search.samples))
    # As if the best points were a little worse than they are and no error were reckoned with: an
    # estimate that is far too high gives up what would have won.
    search.doubt, search.best = Doubt(1e-6), search.best + 1e-3
    search.adjoint, search.z = search.z * 0 + 1.0, search.z - 0.1
    search.scale = search.scale * 0 + 1e3
    for audited in (False, True):
        flight = Flight(search.lockstep, search.y, search.doubt, 5)
        asked = torch.full_like(rows, audited, dtype=torch.bool)
        flight.launch(rows, rows, search.x, asked, JointState(search.z, search.adjoint))
        while bool(flight.busy().any()):
            flight.step(search.best, search.scale)
            flight.landed()
        assert (search.doubt.factor > 1e-6) == audited


@given(
    data=st.data(),
    most=st.integers(1, 7),
    best=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    waves=st.integers(1, 3),
)
def test_rows_land_with_the_first_of_their_candidates_that_is_better(
    data: st.DataObject, most: int, best: list[float], waves: int
) -> None:
    """Whatever flies beside them, and however long any of them takes."""
    model = Slow()
    lockstep = Lockstep(Dynamics(model))
    flight = Flight(lockstep, torch.zeros(3, dtype=torch.long), Halved(1.0), most)
    held = torch.tensor(best)
    scale = torch.ones(3)
    found: dict[int, int] = {}
    expected: dict[int, int] = {}
    for wave in range(3):
        begun = [row for row in range(3) if wave == row % waves]
        for row in begun:
            margins = data.draw(st.lists(st.floats(-3, 3), min_size=1, max_size=5))
            # Ties are decided by rounding.
            margins = [m for m in margins if abs(m - best[row]) > 0.05]
            first = [k for k, m in enumerate(margins) if m < best[row]]
            if not margins:
                continue
            if first:
                expected[row] = first[0]
            images = torch.tensor(margins).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
            rows = torch.full((len(margins),), row)
            state = JointState(torch.zeros(len(margins), 2), torch.zeros(len(margins), 2))
            audited = torch.arange(len(margins)) % 3 == 0
            flight.launch(rows, torch.arange(len(margins)), images, audited, state)
        flight.step(held, scale)
        _note(flight, found)
    while bool(flight.busy().any()):
        flight.step(held, scale)
        _note(flight, found)
    assert found == expected


def _note(flight: Flight, found: dict[int, int]) -> None:
    won = flight.landed()
    if won is not None:
        for row, query in zip(won.rows.tolist(), won.queries.tolist(), strict=True):
            assert row not in found
            found[row] = query


def test_a_bound_is_infinite_in_no_case_and_zero_where_solved() -> None:
    model = Centered()
    x, y = contested(model, 6)
    lockstep = Lockstep(Dynamics(model))
    state = lockstep.settled(x)
    doubt = calibrated(lockstep, state, x, y, torch.zeros(6))
    assert math.isfinite(doubt.factor)
    residual = torch.tensor([0.0, 1e-5, 1e-2, 1.0])
    bound = doubt(residual)
    assert bound[:2].tolist() == [0.0, 0.0]
    assert 0 < float(bound[2]) < float(bound[3])


def test_states_that_are_no_numbers_do_not_stay() -> None:
    model = Centered()
    x, y = contested(model, 4)
    lockstep = Lockstep(Dynamics(model))
    good = lockstep.settled(x)
    bad = JointState(good.z.clone(), good.adjoint.clone())
    bad.z[1], bad.adjoint[2] = torch.nan, torch.inf
    for _ in range(60):
        good, bad = (
            lockstep.look(x, state, lambda logits: margin(logits, y)).state for state in (good, bad)
        )
    torch.testing.assert_close(bad.z, good.z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bad.adjoint, good.adjoint, rtol=1e-5, atol=1e-6)
    state = JointState(torch.full_like(good.z, torch.nan), good.adjoint)
    assert bool(lockstep.glance(x, state).state.z.isfinite().all())
