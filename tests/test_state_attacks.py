"""Attacks on states, on the joint iteration and on features: closed forms and planted masking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attacked import (
    BALL,
    Centered,
    assert_alike_in_any_company,
    attacked,
    contested,
    linear_robust,
    survivors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from robustdeq.attacks._features import HeadInput, LastState, eyes
from robustdeq.attacks.apgd import APGD
from robustdeq.attacks.feature import Feature
from robustdeq.attacks.intermediate import Intermediate, StateLogits
from robustdeq.attacks.joint import Joint
from torch import Tensor, nn
from toys import Linear

from robustdeq.equilibrium import (
    Broyden,
    EquilibriumClassifier,
    FixedPoint,
    OneStep,
    Problem,
    Solve,
    SolveGradient,
    Solver,
)
from robustdeq.equilibrium import Intermediate as FromState
from robustdeq.errors import CaseError, UsageError
from robustdeq.interfaces import Attack
from robustdeq.randomness import SampleRandom
from robustdeq.targets import Pool, Target
from robustdeq.threats import Threat

EVERY: list[Attack] = [
    Intermediate(steps=6),
    Intermediate(steps=6, inner="pgd", random_start=False, loss="margin"),
    Joint(steps=10, polish=3),
    Joint(steps=10, memory=4, updates=(2,), restarts=2),
    Feature(steps=6, restarts=2),
]


class LinearEquilibrium(EquilibriumClassifier):
    """z = z/2 + W(x - 1/2)/2: its fixed point, and each state up to a factor, are linear in x."""

    stationary = True

    def __init__(self, pixels: int = 64) -> None:
        super().__init__(FixedPoint(tolerance=1e-6, max_steps=60))
        self.linear = Linear(pixels)

    def embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out

    def cell(self, z: Tensor, injection: Any, step: int) -> Tensor:
        return 0.5 * (z + injection)

    def readout(self, z: Tensor) -> Tensor:
        return z


@pytest.mark.parametrize("text", ["Linf:0.008", "L2:0.05"])
@pytest.mark.parametrize(
    "attack",
    [
        Intermediate(steps=30, ensemble=False, loss="margin"),
        Intermediate(steps=30, states=False, loss="margin"),
        Intermediate(steps=30, states=False, inner="pgd", loss="margin"),
        Joint(steps=60),
        Joint(steps=60, memory=3),
        Feature(steps=30, goals=("towards",)),
    ],
    ids=str,
)
def test_exact_robust_accuracy_of_a_linear_equilibrium(
    attack: Attack, text: str, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    (x, y), threat, model = linear_data, Threat.parse(text), LinearEquilibrium()
    exact = linear_robust(linear, x, y, threat)
    left = model(attacked(attack, Target(model, 4), x, y, threat)).argmax(1) == y
    assert bool((left >= exact).all())
    # Ascent towards the nearest class can hover where two classes meet.
    assert int(left.sum()) - int(exact.sum()) <= 1


@pytest.mark.parametrize(
    ("attack", "text"),
    [(attack, ("Linf:0.06", "L2:0.15")[k % 2]) for k, attack in enumerate(EVERY)],
    ids=str,
)
def test_a_sample_is_attacked_alike_in_any_company(attack: Attack, text: str) -> None:
    model = Centered()
    x, y = contested(model, 10)
    assert_alike_in_any_company(attack, Target(model, 4), x, y, Threat.parse(text))


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    radius=st.sampled_from(["Linf:0.02", "Linf:0.5", "L2:0.1", "L2:3"]),
    attack=st.sampled_from(EVERY),
)
def test_examples_keep_the_rules_of_the_threat(seed: int, radius: str, attack: Attack) -> None:
    """Also from images at the edge of the box, and where mixing leaves the ball."""
    generator = torch.Generator().manual_seed(seed)
    x = (2 * torch.rand(3, 1, 3, 3, generator=generator) - 0.5).clamp(0, 1)
    model = Centered(FixedPoint(tolerance=1e-6, max_steps=20), rho=0.95)
    attacked(attack, Target(model, 4), x, model(x).argmax(1), Threat.parse(radius))


@pytest.mark.parametrize("attack", [Intermediate(), Joint(), Feature()], ids=["i", "j", "f"])
def test_models_that_an_attack_is_not_for(
    attack: Any, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    """The toy has no module inside of it: its features would be its pixels."""
    assert not attack.fits(Target(linear, 4))
    assert attack.fits(Target(Centered(), 4))
    with pytest.raises(CaseError, match="leave it out"):
        attacked(attack, Target(linear, 4), *linear_data, BALL)


def test_the_joint_attack_is_for_one_cell() -> None:
    class Stepwise(Centered):
        stationary = False

    assert not Joint().fits(Target(Stepwise(), 4))
    assert Intermediate().fits(Target(Stepwise(), 4))


class Numb(SolveGradient):
    """No gradient at all: what a released code that detaches its states gives an attacker."""

    def carrier(self, problem: Problem, solution: Solve, solver: Solver) -> Solve:
        image = OneStep().carrier(problem, solution, solver).z
        return solution._replace(z=image.detach() + 0 * image)


@pytest.mark.parametrize(
    "attack",
    [Intermediate(steps=10), Joint(losses=("margin",)), Joint(updates=(2,), memory=5)],
    ids=str,
)
def test_a_numb_model_falls_as_its_honest_twin_does(attack: Attack) -> None:
    honest, numb = Target(Centered(), 4), Target(Centered(gradient=Numb()), 4)
    x, y = contested(Centered())
    exact = survivors(honest, attacked(APGD(steps=20), honest, x, y, BALL), y)
    assert survivors(numb, attacked(APGD(steps=10), numb, x, y, BALL), y) > exact + 4
    assert survivors(numb, attacked(attack, numb, x, y, BALL), y) <= exact + 1


def damped(model: Centered, x: Tensor, state: int, steps: int, damping: float) -> Tensor:
    """Logits of an intermediate state, written out: a state without graph, steps with one."""
    injection = model.embed(x)
    z = torch.zeros_like(injection)
    for _ in range(state):
        z = model.cell(z, injection, 0).detach()
    for _ in range(steps):
        z = (1 - damping) * z + damping * model.cell(z, injection, 0)
    return model.readout(z)


@pytest.mark.parametrize("states", [(1,), (4,), (1, 2, 8)])
def test_logits_of_states_are_what_they_say(states: tuple[int, ...]) -> None:
    model = Centered()
    x = contested(model)[0].double().requires_grad_()
    view = StateLogits(model, tuple(FromState(state, 3, 0.5) for state in states))
    expected = torch.stack([damped(model, x, state, 3, 0.5) for state in states]).mean(0)
    seen = view(x).logits
    torch.testing.assert_close(seen, expected)
    gradients = [
        torch.autograd.grad(logits.logsumexp(1).sum(), x)[0] for logits in (seen, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_grids_and_the_states_that_a_solver_reaches() -> None:
    protocol = Intermediate(grid="white_box_protocol", ensemble=False)
    configurations = list(protocol._configurations(8))
    assert len(configurations) == len(set(configurations)) == 144
    assert len(list(protocol._configurations(3))) == 3 * 18
    assert len(list(Intermediate()._configurations(8))) == 2 + 8
    assert {len(c) for c in Intermediate(states=False)._configurations(4)} == {3}


def test_what_broke_a_sample_is_named() -> None:
    model = Centered(Broyden(tolerance=1e-3, max_steps=4))
    x, y = contested(model)
    for attack in (Intermediate(steps=5), Joint(steps=10, polish=5), Feature(steps=5)):
        found = attack.run(Target(model, 4), x, y, BALL, SampleRandom(0, "test", range(len(x))))
        broken = (model(found.x).argmax(1) != y).tolist()
        assert 2 < sum(broken) < 14
        assert all(name for name, is_broken in zip(found.made_by, broken, strict=True) if is_broken)


class Stairs(nn.Module):
    """Honest features behind logits without a slope."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner, self.head = nn.Linear(16, 12), nn.Linear(12, 4, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner((x - 0.5).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(1000 * self.head(self.features(x))) / 1000


def stairs_data() -> tuple[Stairs, Tensor, Tensor]:
    model = Stairs()
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    return model, x, model(x).argmax(1)


def test_a_head_without_slope_does_not_hide_its_features() -> None:
    model, x, y = stairs_data()
    threat = Threat.parse("Linf:0.08")

    class Smooth(Stairs):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x))

    exact = survivors(Target(model, 4), attacked(APGD(), Target(Smooth(), 4), x, y, threat), y)
    blind = survivors(Target(model, 4), attacked(APGD(steps=20), Target(model, 4), x, y, threat), y)
    assert exact < blind - 4
    towards = attacked(Feature(goals=("towards",)), Target(model, 4), x, y, threat)
    away = attacked(Feature(goals=("away",), restarts=4), Target(model, 4), x, y, threat)
    assert survivors(Target(model, 4), towards, y) <= exact
    assert survivors(Target(model, 4), away, y) < blind


class Prototypes(Stairs):
    """The class of the nearest prototype in feature space, as a vote: no linear head, no slope."""

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(self.inner((x - 0.5).flatten(1)), self.head.weight.detach())
        return nn.functional.one_hot(distance.argmin(1), 4).to(x) + 0 * distance


def test_guides_pull_features_into_their_class() -> None:
    torch.manual_seed(0)
    model, x, _ = Prototypes(), *stairs_data()[1:]
    y = model(x).argmax(1)
    # Each sample's guide is the nearest of the images that the model takes for another class.
    far = torch.cdist(x.flatten(1), x.flatten(1)).masked_fill(y[:, None] == y[None], torch.inf)
    guides = x[far.argmin(1)]
    threat, attack = Threat.parse("L2:0.8"), Feature(goals=("pull",), steps=40)
    known = torch.arange(len(x)) % 5 > 0
    pool = Pool("train", torch.where(known[:, None, None, None], guides, 0.0), known)
    target = Target(model, 4, pools=[Pool("train", x, known), Pool("elsewhere", guides, known)])
    assert torch.equal(attacked(attack, target, x, y, threat), x)  # guides of a sample's own class
    guided = attacked(attack, Target(model, 4, pools=[pool]), x, y, threat)
    assert torch.equal(guided[~known], x[~known])
    by_chance = attacked(APGD(steps=40), Target(model, 4), x, y, threat)
    assert survivors(target, guided, y) < survivors(target, by_chance, y) - 3


def test_what_the_features_are() -> None:
    model, x, y = stairs_data()
    (head,) = eyes(Target(model, 4), x)
    assert isinstance(head, HeadInput)
    torch.testing.assert_close(head(x).features, model.features(x))
    other = (y + 1) % 4
    slopes = head.slopes(head(x).features, other, y)
    assert slopes is not None
    torch.testing.assert_close(slopes, model.head.weight[other] - model.head.weight[y])
    toy = Centered()
    images, labels = contested(toy)
    (state,) = eyes(Target(toy, 4), images)
    assert isinstance(state, LastState)
    sight = state(images)
    torch.testing.assert_close(sight.features @ toy.r.T, sight.logits)
    directions = state.slopes(sight.features, (labels + 1) % 4, labels)
    torch.testing.assert_close(directions, toy.r[(labels + 1) % 4] - toy.r[labels])


def test_a_state_that_goes_into_the_head_as_it_is_counts_once() -> None:
    class Headed(Centered):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.head, self.shift = nn.Linear(12, 4).double(), shift

        def readout(self, z: Tensor) -> Tensor:
            out: Tensor = self.head(z + self.shift)
            return out

    x = contested(Centered())[0]
    names = [[eye.name for eye in eyes(Target(Headed(shift), 4), x)] for shift in (0.0, 1.0)]
    assert names == [["head"], ["head", "state"]]


@pytest.mark.parametrize(
    ("attack", "bad"),
    [
        (Intermediate, {"steps": 0}),
        (Intermediate, {"states": False, "ensemble": False}),
        (Joint, {"updates": ()}),
        (Joint, {"updates": (0,)}),
        (Joint, {"losses": ("dlr",)}),
        (Joint, {"polish": -1}),
        (Feature, {"goals": ("sideways",)}),
        (Feature, {"restarts": 0}),
    ],
)
def test_parameters_out_of_range_are_refused(attack: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        attack(**bad)


@pytest.mark.parametrize(
    "attack", [Intermediate(steps=4), Joint(steps=20, polish=4), Feature(steps=4)], ids=str
)
def test_budgets_are_not_overspent(attack: Any) -> None:
    """In gradients: a sample that stays robust costs no more backward passes than announced."""
    from robustdeq.attacks import _ascent

    model = Centered()
    x, y = contested(model, 4)
    calls = 0
    original = _ascent._part

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += len(args[2]) * args[4]
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ascent, "_part", counted)
        attacked(attack, Target(model, 4), x, y, Threat.parse("Linf:0.00001"))
    assert 0 < calls <= attack.budget(4).backward * len(x)
