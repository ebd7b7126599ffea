"""Invariants of the Lyapunov module: convexity, decay, orthonormal rows, an exact gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from robustdeq.defenses._lyapunov import (
    Lyapunov,
    Pool,
    smooth_relu,
    smooth_relu_slope,
    stabilized,
)
from robustdeq.defenses.deq import ResidualEquilibrium
from torch import Tensor

from robustdeq.datasets import DataSpec, load_slice, spec_of
from robustdeq.equilibrium import EquilibriumClassifier
from robustdeq.interfaces import trained_form
from robustdeq.registry import load
from robustdeq.threats import Threat
from robustdeq.training.loop import train

CPU = torch.device("cpu")
SEEDS = st.integers(0, 10_000)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wild(seed: int, size: int = 6) -> Lyapunov:
    """A V in float64 with large random weights of both signs: nothing of initialization is left."""
    v = Lyapunov(size, (8, 8), d=0.1, epsilon=1e-3).double()
    with torch.no_grad():
        for parameter in v.parameters():
            draw = torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64)
            parameter.copy_(2 * draw)
    return v


def points(seed: int, count: int = 16, size: int = 6) -> Tensor:
    return 3 * torch.randn(count, size, generator=generator(seed + 1), dtype=torch.float64)


@given(seed=SEEDS, t=st.floats(0, 1))
def test_v_is_convex(seed: int, t: float) -> None:
    v, a, b = wild(seed), points(seed), points(seed + 7)
    with torch.no_grad():
        between, chord = v(t * a + (1 - t) * b), t * v(a) + (1 - t) * v(b)
    assert bool((between <= chord + 1e-9 * (1 + chord.abs())).all())


@given(seed=SEEDS)
def test_v_is_zero_at_zero_and_positive_elsewhere(seed: int) -> None:
    v = wild(seed)
    with torch.no_grad():
        assert float(v(torch.zeros(1, 6, dtype=torch.float64))) == 0.0
        x = points(seed)
        assert bool((v(x) >= 1e-3 * x.square().sum(1)).all())


@given(seed=SEEDS)
def test_the_gradient_of_v_is_autograds(seed: int) -> None:
    v, x = wild(seed), points(seed).requires_grad_()
    value, gradient = v.value_and_gradient(x)
    (reference,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


def test_its_second_derivatives_are_finite_differences() -> None:
    v, x = wild(3), points(3, 2)
    assert torch.autograd.gradcheck(lambda t: v.value_and_gradient(t)[1], x.requires_grad_())


def test_the_smooth_kink_is_monotone_and_convex() -> None:
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    values, slopes = smooth_relu(x, 0.1), smooth_relu_slope(x, 0.1)
    assert bool((values.diff() >= 0).all())
    assert bool((slopes.diff() >= 0).all())
    assert float(values[0]) == 0.0  # the quadratic branch is not for negative inputs
    assert float(values[-1]) == pytest.approx(3 - 0.05)


@given(seed=SEEDS, alpha=st.floats(0, 1))
def test_v_decays_along_the_projected_field(seed: int, alpha: float) -> None:
    v, z = wild(seed), points(seed)
    field = points(seed + 3)
    with torch.no_grad():
        value, gradient = v.value_and_gradient(z)
        projected = stabilized(field, value, gradient, alpha)
        before, after = (gradient * field).sum(1), (gradient * projected).sum(1)
    scale = 1 + before.abs() + value
    assert bool((after <= -alpha * value + 1e-9 * scale).all())
    active = before > -alpha * value
    assert bool((after[active] + alpha * value[active]).abs().le(1e-9 * scale[active]).all())
    torch.testing.assert_close(projected[~active], field[~active], rtol=0, atol=0)


def test_the_projection_is_per_sample() -> None:
    v, z, field = wild(1), points(1), points(2)
    together = stabilized(field, *v.value_and_gradient(z), 0.9)
    alone = [
        stabilized(field[k : k + 1], *v.value_and_gradient(z[k : k + 1]), 0.9) for k in range(16)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_a_projection_with_a_detached_gradient_masks() -> None:
    """Why grad V must stay in the graph: without it an attack sees another model's gradient."""
    torch.manual_seed(0)
    v, z = Lyapunov(6, (8, 8), d=1.0, epsilon=0.1).double(), 0.3 * points(5, 4)

    def module(at: Tensor, detach: bool) -> Tensor:
        value, gradient = v.value_and_gradient(at)
        gradient = gradient.detach() if detach else gradient
        return stabilized(at, value, gradient, 0.9)

    weights = points(6, 4)

    def slope(detach: bool) -> Tensor:
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((module(leaf, detach) * weights).sum(), leaf)
        return gradient

    h, differences = 1e-6, torch.zeros_like(z)
    with torch.no_grad():
        for k in range(z.shape[1]):
            step = torch.zeros_like(z)
            step[:, k] = h
            rise = (module(z + step, False) - module(z - step, False)) * weights
            differences[:, k] = rise.sum(1) / (2 * h)
    torch.testing.assert_close(slope(False), differences, rtol=1e-4, atol=1e-6)
    cosine = torch.nn.functional.cosine_similarity(slope(True), differences, dim=1)
    gap = (slope(True) - differences).norm(dim=1) / differences.norm(dim=1)
    assert float(gap.min()) > 0.1
    assert float(cosine.min()) < 0.95


def test_for_a_quadratic_v_the_module_is_a_constant() -> None:
    """The reason for the ablation `scale`: z - grad V (...) = -alpha/2 z at V = c/2 |z|^2."""
    z, c, alpha = points(8), 1.7, 0.9
    moved = stabilized(z, c / 2 * z.square().sum(1), c * z, alpha)
    torch.testing.assert_close(moved, -alpha / 2 * z, rtol=1e-9, atol=1e-9)


@given(height=st.integers(1, 9), width=st.integers(1, 9), side=st.integers(1, 4))
@settings(max_examples=25)
def test_pooling_averages_and_its_adjoint_is_its_transpose(
    height: int, width: int, side: int
) -> None:
    pool = Pool((2, height, width), side).double()
    z = torch.randn(3, 2, height, width, generator=generator(0), dtype=torch.float64)
    y = torch.randn(3, pool.size, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close((pool(z) * y).sum(), (z * pool.adjoint(y)).sum())
    torch.testing.assert_close(pool(torch.ones_like(z)), torch.ones_like(y))
    reference = torch.nn.functional.adaptive_avg_pool2d(z, pool.sides)
    torch.testing.assert_close(pool(z), reference.flatten(1))


def built(**parameters: Any) -> EquilibriumClassifier:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"width": 16, "inner": 16, "hidden": 8, "gain": 0.7} | parameters
    model = load("defense", "lyadeq", settings).build(spec_of("digits"), CPU)
    assert isinstance(model, EquilibriumClassifier)
    return model.double()


VARIANTS: list[dict[str, Any]] = [
    {"reading": reading, "stability": stability, "head": head}
    for reading in ("module", "dynamics", "centered")
    for stability in ("lyapunov", "scale", "none")
    for head in ("orthogonal", "linear")
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_do_not_depend_on_grad_mode_and_gradients_are_finite_differences(
    variant: dict[str, Any],
) -> None:
    model = built(**variant, tolerance=1e-12, max_steps=300)
    x = torch.rand(3, 1, 8, 8, generator=generator(0), dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)
    with torch.inference_mode():
        inferred = model(x)
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    assert torch.equal(plain, inferred)
    assert torch.equal(plain, logits.detach())
    weights = torch.randn(logits.shape, generator=generator(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf)
    direction = torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
    with torch.no_grad():
        rise = ((model(x + 1e-6 * direction) - model(x - 1e-6 * direction)) * weights).sum() / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), rise, rtol=2e-4, atol=1e-7)


def test_a_convolutional_state_is_projected_in_every_reading() -> None:
    spec = DataSpec("some", 10, 1, 20, 20)
    x = torch.rand(2, 1, 20, 20, generator=generator(0))
    for reading in ("module", "dynamics", "centered"):
        parameters = {"width": 4, "inner": 4, "hidden": 8, "reading": reading}
        model = load("defense", "lyadeq", parameters).build(spec, CPU)
        assert model(x).shape == (2, 10)


def test_the_field_at_zero_leaves_the_fixed_point_and_the_centered_one_comes_to_it() -> None:
    """Root degeneracy: with V around 0 the only equilibrium is at V = 0, whatever the image."""
    x = torch.rand(4, 1, 8, 8, generator=generator(0), dtype=torch.float64)
    dynamics: Any = built(reading="dynamics", euler_size=0.01)
    with torch.no_grad():
        injection = dynamics.embed(x)
        fixed = dynamics.start(injection)
        for step in range(200):
            fixed = ResidualEquilibrium.cell(dynamics, fixed, injection, step)
        z = dynamics.start(injection)
        for step in range(1000):
            z = dynamics.cell(z, injection, step)
        assert bool((dynamics.lyapunov(z) < 0.01 * dynamics.lyapunov(fixed)).all())
        assert bool(((z - fixed).norm(dim=1) > 0.2 * fixed.norm(dim=1)).all())
        centered = built(reading="centered", euler_steps=1000, euler_size=0.05)(x)
        plain = built(reading="module", stability="none")(x)
    torch.testing.assert_close(centered, plain, rtol=1e-2, atol=1e-2)


def orthonormal(model: torch.nn.Module) -> bool:
    weight = model.get_parameter("head.weight").detach().double()
    gram = weight @ weight.T
    return bool(torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-5))


def test_rows_of_the_head_stay_orthonormal_in_training() -> None:
    defense = trained_form(load("defense", "lyadeq", {"width": 24, "inner": 24, "hidden": 8}))
    recipe = load("recipe", "clean", {"epochs": 3, "learning_rate": 1e-2})
    data = load_slice("digits", "train").take(slice(512))
    model = train(defense, recipe, data, Threat.parse("Linf:0.1"), seed=0, device=CPU).model
    assert orthonormal(model)
    linear = load("defense", "lyadeq", {"head": "linear"}).build(data.spec, CPU)
    assert not orthonormal(linear)
