"""Anderson's method: its weights, its incremental Gram matrix, its independence of scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import ToyEquilibrium

from robustdeq.equilibrium import Anderson, Backprop, FixedPoint, Problem, Solve
from robustdeq.equilibrium.anderson import _Mixture, weights


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Affine:
    """f(z) = A z + scale * b with |A| = rho, for all rows or some; counts its calls."""

    def __init__(self, rows: int = 6, size: int = 20, rho: float = 0.9, scale: float = 1.0) -> None:
        a = normal(size, size)
        self.a = a / torch.linalg.matrix_norm(a, 2) * rho
        self.b = scale * normal(rows, size, seed=1)

    def __call__(self, z: Tensor, step: int, rows: Tensor | None = None) -> Tensor:
        b = self.b if rows is None else self.b[rows]
        return z @ self.a.T.to(z.dtype) + b.to(z.dtype)

    def solve(self, solver: Anderson, dtype: torch.dtype = torch.float64) -> Solve:
        return solver(self, torch.zeros_like(self.b, dtype=dtype), keep_states=True)


def advanced(method: _Mixture, f: Affine, steps: int, rows: Tensor | None = None) -> list[Tensor]:
    """The gaps of some steps from 0."""
    z, gaps = torch.zeros_like(f.b), []
    for step in range(steps):
        fz = f(z, step, rows)
        gaps.append(fz - z)
        z = method.advance(z, fz, fz - z)
    return gaps


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 13])
def test_the_incremental_gram_matrix_is_the_full_one(steps: int) -> None:
    method = Anderson(memory=5).method()
    assert isinstance(method, _Mixture)
    gaps = torch.stack(advanced(method, Affine(), steps)[-5:], 1)
    size = gaps.shape[1]
    window = method.window
    assert window is not None
    # The ring's slots, from the oldest evaluation to the newest.
    slots = [k % 5 for k in range(max(0, steps - 5), steps)]
    assert torch.equal(window.gaps[:, slots], gaps)
    found = window.gram[:, slots][:, :, slots]
    expected = gaps @ gaps.transpose(1, 2)
    scale = expected.diagonal(dim1=1, dim2=2).rsqrt()
    error = (found - expected) * scale[:, :, None] * scale[:, None, :]
    assert found.shape == (6, size, size)
    assert float(error.abs().max()) < 1e-14
    assert torch.equal(found, found.transpose(1, 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(-12, 12), st.floats(0, 12))
def test_weights_solve_the_constrained_least_squares_problem(
    size: int, seed: int, magnitude: float, spread: float
) -> None:
    gaps = normal(3, size, 10, seed=seed)
    gaps = gaps * 10.0 ** (magnitude - spread * torch.linspace(0, 1, size))[:, None]
    found = weights(gaps @ gaps.transpose(1, 2), 0)
    assert torch.allclose(found.sum(1), torch.ones(3, dtype=torch.float64))
    # Without the constraint: a = e_n + N c, where the columns of N sum to 0.
    last, others = gaps[:, -1:], gaps[:, :-1] - gaps[:, -1:]
    dense = torch.linalg.lstsq(others.transpose(1, 2), -last.transpose(1, 2), driver="gelsd")
    best = (last + dense.solution.transpose(1, 2) @ others if size > 1 else last).norm(dim=2)
    mixed = torch.einsum("bn,bnd->bd", found, gaps).norm(dim=1)
    assert bool((mixed <= (1 + 1e-6) * best.squeeze(1) + 1e-9 * gaps.norm(dim=2).amin(1)).all())


def test_a_solution_in_the_window_takes_all_weight_and_nonsense_gives_a_plain_step() -> None:
    method = Anderson(memory=3).method()
    assert isinstance(method, _Mixture)
    z = normal(1, 4)
    for gap in (normal(1, 4, seed=2), torch.zeros(1, 4, dtype=torch.float64)):
        found = method.advance(z, z + gap, gap)
    assert torch.allclose(found, z)
    gram = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    gram[1], gram[2] = torch.nan, -1.0
    found = weights(gram, 1)
    assert torch.allclose(found[0], torch.full((3,), 1 / 3, dtype=torch.float64))
    assert found[1:].tolist() == [[0.0, 1.0, 0.0]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [2.0**-20, 1e-6, 1e6, 2.0**20])
def test_iterates_scale_with_the_states(dtype: torch.dtype, scale: float) -> None:
    """An absolute regularization fails here."""
    solver = Anderson(tolerance=0.0, max_steps=12)
    one, other = Affine().solve(solver, dtype), Affine(scale=scale).solve(solver, dtype)
    exact = scale == 2.0 ** round(torch.tensor(scale).log2().item())
    bound = 0.0 if exact else 1e-9 if dtype == torch.float64 else 1e-4
    for a, b in zip(one.states, other.states, strict=True):
        assert float((b / scale - a).norm()) <= bound * float(a.norm())
    assert float(other.residual.max()) < 1e-2


def test_float32_needs_no_more_steps_than_float64() -> None:
    for rho in (0.5, 0.9, 0.99):
        f = Affine(size=200, rho=rho)
        solver = Anderson(tolerance=1e-5, max_steps=200)
        steps = [f.solve(solver, dtype).steps.double().mean() for dtype in
                 (torch.float32, torch.float64)]  # fmt: skip
        assert float(steps[0]) <= 1.05 * float(steps[1]) + 0.5


def test_autocast_does_not_reach_the_weights() -> None:
    f = Affine()
    plain = f.solve(Anderson(tolerance=1e-6), torch.float32)

    def exact(z: Tensor, step: int, rows: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return f(z, step, rows)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = Anderson(tolerance=1e-6)(exact, torch.zeros_like(f.b, dtype=torch.float32))
    assert torch.equal(cast.z, plain.z)
    assert torch.equal(cast.steps, plain.steps)


def test_half_precision_states_stay_what_they_are() -> None:
    found = Affine(rho=0.5).solve(Anderson(tolerance=1e-2), torch.bfloat16)
    assert found.z.dtype == torch.bfloat16
    assert float(found.residual.max()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("worth", [0, 2**60])
def test_the_batch_does_not_change_a_samples_result(
    dtype: torch.dtype, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustdeq.equilibrium.iteration._WORTH_GATHERING", worth)
    f = Affine(rows=24)
    f.b[::3] *= torch.linspace(0.001, 1, 8, dtype=torch.float64)[:, None]
    start = torch.zeros_like(f.b, dtype=dtype)
    start[1::3] = torch.linalg.solve(torch.eye(20) - f.a, f.b[1::3].T).T.to(dtype)
    for solver in (Anderson(tolerance=1e-5), FixedPoint(tolerance=1e-5, max_steps=300)):
        together = solver(f, start)
        assert together.steps.unique().numel() > 1
        for row in range(24):
            one = torch.tensor([row])
            alone = solver(lambda z, step, rows, one=one: f(z, step, one), start[one])
            assert int(alone.steps) == int(together.steps[row])
            error = (alone.z - together.z[one]).norm() / alone.z.norm()
            assert float(error) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_what_is_returned_shares_no_memory_with_a_later_solve() -> None:
    f = Affine()
    first = f.solve(Anderson(tolerance=1e-8))
    copies = [state.clone() for state in (*first.states, first.z)]
    Affine(scale=5.0).solve(Anderson(tolerance=1e-8))
    for state, copy in zip((*first.states, first.z), copies, strict=True):
        assert torch.equal(state, copy)
    for k, state in enumerate(first.states):
        assert all(state.data_ptr() != other.data_ptr() or torch.equal(state, other)
                   for other in first.states[k + 1:])  # fmt: skip


@pytest.mark.parametrize("mixing", [1.0, 0.7])
def test_replay_with_a_graph_gives_the_iterates_of_the_solve_without(mixing: float) -> None:
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = ToyEquilibrium(
        Anderson(tolerance=0.0, max_steps=9, mixing=mixing), Backprop(), rho=0.95
    )
    u = model.embed(x).detach().requires_grad_()
    problem = Problem(model.cell, u, torch.zeros_like(u))
    shown = Backprop().deployed(problem, model.solver, keep_states=True)
    with torch.no_grad():
        plain = model.solver(problem, problem.start, keep_states=True)
    for a, b in zip(shown.states, plain.states, strict=True):
        assert torch.equal(a.detach(), b)
    assert torch.autograd.gradcheck(
        lambda u: (
            Backprop()
            .deployed(Problem(model.cell, u, torch.zeros_like(u)), model.solver.with_steps(7))
            .z
        ),
        (u[:1].detach().requires_grad_(),),
        atol=1e-5,
    )
