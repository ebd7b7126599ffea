"""The joint iteration of state, adjoint and input, against dense references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from toys import Linear, ToyEquilibrium

from robustdeq.datasets import load_slice, spec_of
from robustdeq.equilibrium import Dynamics, EquilibriumClassifier, JointAscent, metered
from robustdeq.equilibrium.joint import JointState, _TypeOne
from robustdeq.errors import UsageError
from robustdeq.registry import load
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training._inner import Ascent

CPU = torch.device("cpu")


def logsumexp(logits: Tensor) -> Tensor:
    return logits.logsumexp(1)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_a_fixed_input_leads_to_the_implicit_gradient(
    toy: ToyEquilibrium, toy_images: Tensor, damping: float
) -> None:
    dynamics = Dynamics(toy, damping, damping)
    state = dynamics.start(toy_images)
    assert float(state.adjoint.abs().max()) == 0.0
    for _ in range(400):
        state, logits, gradient = dynamics.step(toy_images, state, logsumexp)
    dense_logits, dense = toy.dense_gradient(toy_images)
    torch.testing.assert_close(logits, dense_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, dense, rtol=1e-8, atol=1e-9)


def test_a_step_is_one_evaluation_and_one_product(toy: ToyEquilibrium, toy_images: Tensor) -> None:
    dynamics = Dynamics(toy)
    state = dynamics.start(toy_images)
    with metered() as meter:
        dynamics.step(toy_images, state, logsumexp)
    assert (meter.forward, meter.backward) == (len(toy_images), len(toy_images))
    with metered() as meter:
        ascent = JointAscent(steps=3, updates=2)
        ascent(dynamics, toy_images, Threat.parse("Linf:0.1"), logsumexp, toy_images)
    assert meter.forward == 6 * len(toy_images)


def test_states_are_per_sample(toy: ToyEquilibrium, toy_images: Tensor) -> None:
    dynamics = Dynamics(toy)
    state = dynamics.start(toy_images)
    for _ in range(5):
        state = dynamics.step(toy_images, state, logsumexp).state
    rows = torch.tensor([5, 2])
    whole = dynamics.step(toy_images, state, logsumexp)
    part = dynamics.step(toy_images[rows], state.take(rows), logsumexp)
    torch.testing.assert_close(part.gradient, whole.gradient[rows], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(part.state.adjoint, whole.state.adjoint[rows], rtol=1e-12, atol=0)
    mask = torch.arange(len(toy_images)) < 3
    mixed = state.where(mask, whole.state)
    assert torch.equal(mixed.z[:3], state.z[:3])
    assert torch.equal(mixed.adjoint[3:], whole.state.adjoint[3:])


@pytest.mark.parametrize("memory", [0, 4])
@pytest.mark.parametrize("threat", ["Linf:0.1", "L2:0.6"])
def test_joint_ascent_stays_in_the_ball_and_finds_what_pgd_finds(
    toy: ToyEquilibrium, toy_images: Tensor, threat: str, memory: int
) -> None:
    ball = Threat.parse(threat)
    target = Target(toy, 4)
    y = toy(toy_images).argmax(1)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none")

    dynamics = target.dynamics()
    assert dynamics is not None
    ascent = JointAscent(steps=80, step_size=0.1, memory=memory)
    found, state = ascent(dynamics, toy_images, ball, loss, toy_images)
    assert not any(ball.violations(toy_images, found))
    assert state.z.shape == (8, 12)
    reference = Ascent(40, 0.1)(target, toy_images, ball, loss, toy_images).x
    with torch.no_grad():
        start, joint, nested = (loss(toy(x)) for x in (toy_images, found, reference))
    rise = (joint - start) / (nested - start)
    assert float(rise.median()) > (0.97 if memory == 0 else 0.8)
    assert float((joint > start).double().mean()) == 1.0


@given(seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_type_one_mixing_solves_a_linear_problem_in_its_dimension(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 4
    matrix = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    matrix = 0.9 * matrix / torch.linalg.matrix_norm(matrix, 2)[:, None, None]
    offset = torch.randn(2, size, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - matrix, offset)

    def point(v: Tensor) -> tuple[Tensor, JointState]:
        return v[:, 2:3, None, None], JointState(v[:, :2], v[:, 3:])

    mixture = _TypeOne(size + 1)
    v = torch.zeros(2, size, dtype=torch.float64)
    for _ in range(size + 2):
        x, state = mixture(point(v), point((matrix @ v[:, :, None]).squeeze(2) + offset))
        v = torch.cat([state.z, x.flatten(1), state.adjoint], 1)
    gap = float((v - exact).norm() / exact.norm())
    plain = float((torch.linalg.matrix_power(matrix, size + 2) @ exact[:, :, None]).norm())
    assert gap < 1e-5 or gap < 0.1 * plain / float(exact.norm())


MODELS: list[tuple[str, dict[str, Any], bool]] = [
    ("deq", {}, True),
    ("joint_optimization", {}, True),
    ("weight_tied", {}, True),
    ("lyadeq", {"reading": "module"}, True),
    ("lyadeq", {"reading": "centered"}, False),
    ("weight_tied", {"mask": "distinct"}, False),
    ("neural_dynamics", {}, True),
    ("neural_dynamics", {"regulation": "entropy"}, False),
    ("neural_dynamics", {"output": "ensemble"}, False),
    ("feedforward", {}, False),
]


@pytest.mark.parametrize(("name", "parameters", "has"), MODELS)
def test_a_model_has_dynamics_where_one_cell_is_all_there_is(
    name: str, parameters: dict[str, Any], has: bool
) -> None:
    model = load("defense", name, parameters).build(spec_of("digits"), CPU)
    assert (Target(model, 10).dynamics() is not None) == has
    if has:
        assert isinstance(model, EquilibriumClassifier)


def test_recipe_joint_refuses_models_without_dynamics() -> None:
    recipe = load("recipe", "joint", {"steps": 2})
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(UsageError, match="use pgd_at"):
        recipe.loss(Target(Linear(), 4), x, y, Threat.parse("Linf:0.1"), 0.0, generator)
    with pytest.raises(UsageError, match="give at least 1"):
        JointAscent(steps=0)


def test_recipe_joint_costs_one_evaluation_and_product_a_step() -> None:
    data = load_slice("digits", "train").take(slice(32))
    model = load("defense", "deq", {"width": 16, "inner": 16}).build(data.spec, CPU)
    recipe = load("recipe", "joint", {"steps": 12, "warmup": 0.0})
    from robustdeq.training.task import training_view

    target = training_view(model, recipe, data.spec)
    x, y = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    with metered() as meter:
        loss = recipe.loss(target, x, y, Threat.parse("Linf:0.1"), 1.0, torch.Generator())
        loss.backward()
    # Twelve joint steps, then four steps to solve on and four to differentiate.
    assert meter.forward <= (12 + 4 + 4) * 32
    assert meter.backward == (12 + 4) * 32
    assert all(p.grad is not None for p in model.parameters())
