"""Where the inner maximization of adversarial training gets its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from toys import Linear, ToyEquilibrium

from robustdeq.datasets import load_slice
from robustdeq.equilibrium import FixedPoint, Implicit, Phantom, metered
from robustdeq.errors import UsageError
from robustdeq.registry import load, parameters_of
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training._carried import gradients_of
from robustdeq.training._inner import Ascent
from robustdeq.training.checkpoint import Checkpoint
from robustdeq.training.loop import Training, train
from robustdeq.training.task import training_view

CPU = torch.device("cpu")
INNER = ("solve", "warm", "joint")
SHORT = {"gradient": "phantom(4,1)", "solver_steps": 4}


def logsumexp(logits: Tensor) -> Tensor:
    return logits.logsumexp(1)


def digits(count: int, **parameters: Any) -> tuple[Target, Tensor, Tensor, Any]:
    """A small DEQ through the training view of PGD-AT, images, labels, and the recipe."""
    data = load_slice("digits", "train").take(slice(count))
    torch.manual_seed(0)
    model = load("defense", "deq", {"width": 16, "inner": 16}).build(data.spec, CPU)
    recipe = load("recipe", "pgd_at", {"warmup": 0.0, **SHORT, **parameters})
    x, y = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    return training_view(model, recipe, data.spec), x, y, recipe


@pytest.mark.parametrize("inner", INNER)
def test_once_settled_the_gradient_is_the_implicit_one(
    toy: ToyEquilibrium, toy_images: Tensor, inner: Any
) -> None:
    gradients = gradients_of(inner, Target(toy, 4))
    for x in (toy_images, (toy_images + 0.05).clamp(0, 1)):
        for _ in range(150):
            found = gradients(x, logsumexp)
        dense = toy.dense_gradient(x)[1]
        torch.testing.assert_close(found, dense, rtol=1e-8, atol=1e-9)
        assert torch.equal(found.sign(), dense.sign())


def test_joint_signs_follow_an_input_that_moves(toy: ToyEquilibrium, toy_images: Tensor) -> None:
    """Seven steps of a quarter of epsilon, as in training: the signs hardly lag behind."""
    threat, gradients = Threat.parse("Linf:0.1"), gradients_of("joint", Target(toy, 4))
    current, agreed = toy_images, []
    for _ in range(7):
        found, dense = gradients(current, logsumexp), toy.dense_gradient(current)[1]
        agreed.append(float((found.sign() == dense.sign()).double().mean()))
        current = threat.project(toy_images, current + 0.025 * threat.steepest(found))
    assert min(agreed[2:]) > 0.95


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("threat", ["Linf:0.1", "L2:0.6"])
def test_candidates_stay_in_the_ball_and_raise_the_loss(
    toy: ToyEquilibrium, toy_images: Tensor, threat: str, inner: Any
) -> None:
    ball, y = Threat.parse(threat), toy(toy_images).argmax(1)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none")

    found = Ascent(10, 0.25, inner)(Target(toy, 4), toy_images, ball, loss, toy_images)
    assert not any(ball.violations(toy_images, found.x))
    assert bool((loss(toy(found.x)) > loss(toy(toy_images))).all())
    assert [z.shape for z in found.warm] == ([] if inner == "solve" else [(8, 12)])
    assert all(p.requires_grad and p.grad is None for p in toy.parameters())


def test_the_last_state_is_near_the_next_solve(toy_images: Tensor) -> None:
    """What the outer solve saves, to one tolerance."""
    solver = FixedPoint(tolerance=1e-6, max_steps=200)
    toy = ToyEquilibrium(solver, Implicit(solver))
    target, threat = Target(toy, 4), Threat.parse("Linf:0.1")
    for inner in ("warm", "joint"):
        found = Ascent(20, 0.05, inner)(target, toy_images, threat, logsumexp, toy_images)
        cold, warm = target(found.x), target(found.x, found.warm)
        assert int(warm.solves[0].steps.sum()) < 0.8 * int(cold.solves[0].steps.sum())
        torch.testing.assert_close(warm.logits, cold.logits, rtol=1e-4, atol=1e-4)


def test_a_joint_step_is_one_evaluation_and_one_product() -> None:
    counts = {}
    for inner in INNER:
        target, x, y, recipe = digits(32, steps=12, inner=inner)
        with metered() as meter:
            loss = recipe.loss(target, x, y, Threat.parse("Linf:0.1"), 1.0, torch.Generator())
            loss.backward()
        counts[inner] = (meter.forward / 32, meter.backward / 32)
        assert all(p.grad is not None for p in target.model.parameters())
    # Of the outer step: four steps of the solver, four more with a graph, and back through these.
    assert counts["solve"] == (12 * 8 + 8, 12 * 4 + 4)
    # A warm solve may be done before its last step.
    assert counts["warm"][0] <= counts["solve"][0]
    # The first look starts from the state of the training's solver.
    assert counts["joint"][0] <= 4 + 12 + 8
    assert counts["joint"][1] == 12 + 4


def test_a_warm_solve_to_a_tolerance_is_shorter() -> None:
    counts = []
    for inner in ("solve", "warm"):
        target, x, y, recipe = digits(16, gradient="honest", solver_steps=0, inner=inner)
        with metered() as meter:
            recipe.loss(target, x, y, Threat.parse("Linf:0.1"), 1.0, torch.Generator())
        counts.append(meter.forward)
    assert counts[1] < counts[0]


def test_trades_carries_the_clean_state() -> None:
    losses, counts = [], []
    for inner in INNER:
        target, x, y, _ = digits(16)
        recipe = load("recipe", "trades", {"warmup": 0.0, "inner": inner, **SHORT})
        generator = torch.Generator().manual_seed(0)
        with metered() as meter:
            loss = recipe.loss(target, x, y, Threat.parse("Linf:0.1"), 1.0, generator)
            loss.backward()
        losses.append(float(loss.detach()))
        counts.append(meter.forward / 16)
    assert losses == pytest.approx([losses[0]] * 3, rel=0.02)
    # One clean solve without a graph, seven looks, two solves with one.
    assert counts[2] <= 4 + 4 + 7 + 8 + 8 < counts[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd_at", {"inner": "joint"}),
        ("pgd_at", {"inner_precision": "bfloat16"}),
        ("trades", {"inner": "warm"}),
        ("trades", {"inner": "joint", "inner_precision": "bfloat16"}),
    ],
)
def test_interrupted_training_goes_on_to_the_same_weights(
    tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    data = load_slice("digits", "train").take(slice(640))
    defense = load("defense", "deq", {"width": 16, "inner": 16})
    recipe = load("recipe", name, {"epochs": 2, "steps": 2, **SHORT, **options})

    def go(checkpoint: Checkpoint | None, minutes: float | None) -> Training:
        return train(
            defense, recipe, data, Threat.parse("Linf:3/16"), seed=0, device=CPU,
            minutes=minutes, checkpoint=checkpoint,
        )  # fmt: skip

    whole, stops = go(None, None), 0
    path = tmp_path / "w.checkpoint"
    # A budget that is over after its first step or so.
    while not (part := go(Checkpoint(path, "one"), 1e-5)).complete:
        stops += 1
        assert stops < 20
    assert stops > 1
    assert part.log == whole.log
    states = [trained.model.state_dict() for trained in (whole, part)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_reduced_inner_precision_leaves_the_rest_as_it_is() -> None:
    threat = Threat.parse("Linf:3/16")
    for inner in INNER:
        target, x, y, recipe = digits(32, inner=inner, inner_precision="bfloat16")

        def loss(logits: Tensor, y: Tensor = y) -> Tensor:
            return F.cross_entropy(logits, y, reduction="none")

        found = Ascent.of(recipe)(target, x, threat, loss, x)
        full = Ascent.of(digits(32, inner=inner)[3])(target, x, threat, loss, x)
        assert {t.dtype for t in (found.x, *found.warm)} == {torch.float32}
        assert not any(threat.violations(x, found.x))
        agree = float(((found.x - x).sign() == (full.x - x).sign()).float().mean())
        assert 0.9 < agree < 1.0
        outer = recipe.loss(target, x, y, threat, 1.0, torch.Generator())
        assert outer.dtype == torch.float32
        outer.backward()
        slopes = [p.grad for p in target.model.parameters() if p.grad is not None]
        assert all(bool(slope.isfinite().all()) for slope in slopes)


def test_an_option_that_does_not_exist_is_one_sentence() -> None:
    for recipe in ("pgd_at", "trades"):
        with pytest.raises(UsageError, match="'inner'"):
            load("recipe", recipe, {"inner": "cold"})
        with pytest.raises(UsageError, match="'inner_precision'"):
            load("recipe", recipe, {"inner_precision": "float16"})
    with pytest.raises(UsageError, match="use inner='solve'"):
        load("recipe", "random_states", {"parameters": {"inner": "joint"}})


@pytest.mark.parametrize("inner", ["warm", "joint"])
def test_models_and_gradients_without_states_to_carry(inner: Any, toy: ToyEquilibrium) -> None:
    with pytest.raises(UsageError, match="this Linear has none; use inner='solve'"):
        gradients_of(inner, Target(Linear(), 4))
    spec = load_slice("digits", "train").spec
    tied = Target(load("defense", "weight_tied", {}).build(spec, CPU), 10)
    masked = Target(load("defense", "weight_tied", {"mask": "distinct"}).build(spec, CPU), 10)
    if inner == "warm":
        with pytest.raises(UsageError, match=r"gradient unrolled\(8\) does not"):
            gradients_of(inner, tied)
        return
    with pytest.raises(UsageError, match="use inner='warm' or 'solve'"):
        gradients_of(inner, masked)
    # Fixed steps from the model's own start are its definition: the training loss keeps to them.
    x, threat = torch.rand(4, 1, 8, 8), Threat.parse("Linf:0.1")
    assert Ascent(2, 0.25, inner)(tied, x, threat, logsumexp, x).warm == ()
    phantom = Target(toy, 4, gradient=Phantom(2))
    images = torch.rand(4, 1, 3, 3, dtype=torch.float64)
    assert len(Ascent(2, 0.25, inner)(phantom, images, threat, logsumexp, images).warm) == 1


def test_released_weights_know_nothing_of_the_options() -> None:
    """At their defaults they leave no trace: the same training gives the same bytes."""
    assert not {"inner", "inner_precision"} & set(parameters_of(load("recipe", "pgd_at", {})))
    assert parameters_of(load("recipe", "trades", {"inner": "joint"}))["inner"] == "joint"
    nested = parameters_of(load("recipe", "random_states", {}))["parameters"]
    assert "inner" not in nested
