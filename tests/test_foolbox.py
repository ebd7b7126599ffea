"""Attacks of libraries: Foolbox's by name, and Square on images that it does not take."""

from __future__ import annotations

import pickle
import random
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyautoattack.square import SquareAttack
from robustdeq.attacks.autoattack import Square, _factor
from robustdeq.attacks.foolbox import Foolbox, _own_randomness
from torch import Tensor, nn
from toys import Linear

from robustdeq.errors import CaseError, UsageError
from robustdeq.interfaces import Candidates, Scope
from robustdeq.randomness import SampleRandom
from robustdeq.registry import load
from robustdeq.targets import Target
from robustdeq.threats import Norm, Threat


def run(attack: Any, model: nn.Module, x: Tensor, y: Tensor, threat: str) -> Candidates:
    """Candidates, all of them admissible."""
    parsed = Threat.parse(threat)
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    target = Target(model, classes)
    found = attack.run(target, x.clone(), y, parsed, SampleRandom(3, "t", range(len(x))))
    assert isinstance(found, Candidates)
    assert not any(parsed.violations(x, found.x))
    return found


def exactly_robust(model: Linear, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Margin > eps * dual norm, for images well inside of the box."""
    difference = model.weight[y][:, None] - model.weight[None]
    norm = difference.abs().sum(2) if threat.norm is Norm.LINF else difference.norm(dim=2)
    logits = model(x)
    slack = logits.gather(1, y[:, None]) - logits - threat.eps * norm
    slack[torch.arange(len(y)), y] = torch.inf
    return slack.amin(1).detach() > 0


# A stand-in: what of Foolbox the plugin relies on, with every call on record.


class Distance:
    def __init__(self, p: float) -> None:
        self.p = p


class Attack:
    pass


class Stand(Attack):
    """Answers with what it is told to; `calls` receives what it was given."""

    calls: list[dict[str, Any]] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, p: float = torch.inf, length: float = 1.0, distance: Any = None) -> None:
        if length < 0:
            raise ValueError("length below 0")
        self.distance, self.length = Distance(p) if distance is None else distance, length

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, epsilons: float) -> Any:
        draws = (float(torch.rand(())), random.random(), float(np.random.rand()))
        self.calls.append({"epsilons": epsilons, "draws": draws, "bounds": model.bounds})
        leaf = x.clone().requires_grad_()
        nn.functional.cross_entropy(model(leaf), y).backward()
        assert leaf.grad is not None
        raw = x + self.length * leaf.grad.sign()
        return raw, x + epsilons * leaf.grad.sign(), None


class Fixed(Stand):
    """Has the norm that it has."""

    def __init__(self) -> None:
        super().__init__()


class Failing(Fixed):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError


class PyTorchModel:
    def __init__(self, model: nn.Module, bounds: Any, device: Any) -> None:
        assert not model.training
        self.model, self.bounds, self.device = model, bounds, device

    def __call__(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(x.requires_grad):
            return self.model(x)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    module: Any = types.ModuleType("foolbox")
    module.PyTorchModel = PyTorchModel
    module.distances = types.SimpleNamespace(linf=Distance(torch.inf), l2=Distance(2))
    module.attacks = types.SimpleNamespace(
        Attack=Attack, Stand=Stand, Fixed=Fixed, Failing=Failing, helper=len
    )
    monkeypatch.setitem(sys.modules, "foolbox", module)
    Stand.calls.clear()
    yield Stand.calls
    Stand.calls.clear()


@pytest.mark.usefixtures("library")
def test_it_is_called_as_a_library_wants_it(
    library: list[dict[str, Any]], linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    found = run(Foolbox(attack="Fixed"), linear, x, y, "Linf:0.01")
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(linear(leaf), y), leaf)
    torch.testing.assert_close(found.x, (x + 0.01 * slope.sign()).clamp(0, 1))
    assert found.made_by == ("Fixed",) * 24
    (call,) = library
    assert (call["epsilons"], call["bounds"]) == (0.01, (0.0, 1.0))
    assert Foolbox.scope is Scope.CHUNK


# The radius of the smallest ball of norm p around the threat's, for 64 pixels.
@pytest.mark.parametrize(
    ("threat", "p", "radius"),
    [
        ("Linf:0.1", torch.inf, 0.1),
        ("Linf:0.1", 2.0, 0.8),
        ("Linf:0.1", 1.0, 6.4),
        ("L2:0.5", torch.inf, 0.5),
        ("L2:0.5", 2.0, 0.5),
        ("L2:0.5", 1.0, 4.0),
        ("L2:0.5", 0.0, 64.0),
    ],
)
def test_an_attack_in_another_norm_gets_a_ball_around_the_threats_and_is_projected(
    threat: str,
    p: float,
    radius: float,
    library: list[dict[str, Any]],
    linear: Linear,
    linear_data: tuple[Tensor, Tensor],
) -> None:
    x, y = linear_data
    parameters = {"distance": Distance(p), "length": 0.3}
    found = run(Foolbox(attack="Stand", parameters=parameters), linear, x, y, threat)
    assert library[0]["epsilons"] == pytest.approx(radius)
    moved = Threat.parse(threat).distance(x, found.x)
    torch.testing.assert_close(moved, torch.full_like(moved, Threat.parse(threat).eps))


def test_an_attack_without_a_norm_of_its_own_gets_the_threats(
    library: list[dict[str, Any]], linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    run(Foolbox(attack="Stand"), linear, *linear_data, "L2:0.5")
    assert library[0]["epsilons"] == 0.5


def test_what_the_caller_holds_is_left_alone(
    library: list[dict[str, Any]], linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    """Gradients of parameters, grad mode, random states; and equal seeds draw equal numbers."""
    linear.weight.grad = torch.ones_like(linear.weight)
    held, state = linear.weight.grad, torch.get_rng_state()
    with torch.no_grad():
        run(Foolbox(attack="Fixed"), linear, *linear_data, "Linf:0.01")
        run(Foolbox(attack="Fixed"), linear, *linear_data, "Linf:0.01")
        assert not torch.is_grad_enabled()
    assert library[0]["draws"] == library[1]["draws"]
    assert torch.equal(state, torch.get_rng_state())
    assert linear.weight.grad is held
    assert torch.equal(held, torch.ones_like(held))


def test_every_global_generator_is_given_back() -> None:
    """By itself, for the type checks of the tests draw from Python's generator too."""

    def states() -> list[bytes]:
        numpy = pickle.dumps(np.random.get_state())
        return [torch.get_rng_state().numpy().tobytes(), pickle.dumps(random.getstate()), numpy]

    before = states()
    draws = []
    for _ in range(2):
        with _own_randomness(3, torch.device("cpu")):
            draws.append((float(torch.rand(())), random.random(), float(np.random.rand())))
            assert all(now != then for now, then in zip(states(), before, strict=True))
        assert states() == before
    assert draws[0] == draws[1]


@pytest.mark.usefixtures("library")
def test_what_cannot_run_says_why(linear: Linear, linear_data: tuple[Tensor, Tensor]) -> None:
    cases: list[tuple[Foolbox, type[Exception], str]] = [
        (Foolbox(attack="Fixde"), UsageError, "did you mean 'Fixed'"),
        (Foolbox(attack="helper"), UsageError, "unknown Foolbox attack 'helper'"),
        (Foolbox(attack="Stand", parameters={"lenght": 1}), UsageError, "refuses its parameters"),
        (Foolbox(attack="Stand", parameters={"length": -1}), UsageError, "length below 0"),
        (Foolbox(attack="Failing"), CaseError, "Failing fails: AssertionError"),
    ]
    for attack, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(attack, linear, *linear_data, "Linf:0.01")


def test_without_the_library_the_message_names_the_command(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(UsageError, match="pip install foolbox"):
        run(Foolbox(attack="LinfPGD"), linear, *linear_data, "Linf:0.01")


# The library itself.


@pytest.fixture
def installed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("foolbox")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "parameters", "threat"),
    [
        ("LinfPGD", {"steps": 60}, "Linf:0.008"),
        ("LinfDeepFoolAttack", {}, "Linf:0.008"),
        ("LInfFMNAttack", {}, "Linf:0.008"),
        ("L2PGD", {"steps": 60}, "L2:0.05"),
        ("L2DeepFoolAttack", {}, "L2:0.05"),
        ("DDNAttack", {}, "L2:0.05"),
        ("L2BasicIterativeAttack", {"steps": 60}, "Linf:0.008"),
        ("LinfDeepFoolAttack", {}, "L2:0.05"),
        ("InversionAttack", {}, "L2:0.05"),
    ],
)
def test_foolbox_on_a_linear_model(
    name: str,
    parameters: dict[str, Any],
    threat: str,
    linear: Linear,
    linear_data: tuple[Tensor, Tensor],
) -> None:
    """In the threat's own norm it comes near the exact figure; in another it breaks something."""
    x, y = linear_data
    exact = exactly_robust(linear, x, y, Threat.parse(threat))
    found = run(Foolbox(attack=name, parameters=parameters), linear, x, y, threat)
    left = linear(found.x).argmax(1) == y
    assert bool((left >= exact).all())
    own = name.lower().startswith(threat.split(":")[0].lower()) or name == "DDNAttack"
    if own:
        assert int(left.sum()) - int(exact.sum()) <= 3
    elif name != "InversionAttack":
        assert int(left.sum()) < 24
    assert found.made_by == (name,) * 24


@pytest.mark.usefixtures("installed")
def test_foolbox_refuses_what_it_does_not_have(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    for name, message in (
        ("LinfDeepfoolAttack", "did you mean 'LinfDeepFoolAttack'"),
        ("MinimizationAttack", "unknown Foolbox attack"),
        ("VirtualAdversarialAttack", "refuses its parameters"),
    ):
        with pytest.raises(UsageError, match=message):
            run(Foolbox(attack=name), linear, x, y, "Linf:0.01")
    with pytest.raises(CaseError, match="DatasetAttack fails"):
        run(Foolbox(attack="DatasetAttack"), linear, x, y, "L2:0.05")


# Square where the library alone does not go.


class Detached(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.detach()).detach()


SHAPES = [(1, 1), (2, 2), (4, 4), (5, 5), (12, 7), (14, 14)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("classes", [2, 4])
def test_square_under_l2_on_images_that_it_does_not_take(
    shape: tuple[int, int], classes: int
) -> None:
    """At twice the median of the exact radii; as often as on images of sides 5 and 15."""
    base = Linear(3 * shape[0] * shape[1], classes)
    x = 0.4 + 0.2 * torch.rand(24, 3, *shape, generator=torch.Generator().manual_seed(0))
    logits = base(x).detach()
    y = logits.argmax(1)
    length = (base.weight[y][:, None] - base.weight[None]).norm(dim=2)
    gap = logits.gather(1, y[:, None]) - logits
    gap[torch.arange(24), y] = torch.inf
    text = f"L2:{2 * float((gap / length.detach().clamp_min(1e-9)).amin(1).median()):.3f}"
    exact = exactly_robust(base, x, y, Threat.parse(text))
    queries = 300 if max(shape) <= 5 else 2000
    left = base(run(Square(queries=queries), Detached(base), x, y, text).x).argmax(1) == y
    assert bool((left >= exact).all())
    assert int(left.sum()) <= 24 - 6


@given(st.integers(1, 60), st.integers(1, 60))
def test_square_under_l2_takes_an_image_that_is_enlarged_as_it_should_be(
    height: int, width: int
) -> None:
    factor = _factor(torch.zeros(1, 1, height, width))
    square = SquareAttack(
        lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2),
        norm="L2", eps=0.1, n_queries=1, device="cpu", verbose=False,
    )  # fmt: skip
    x = torch.full((1, 1, factor * height, factor * width), 0.5)
    square.perturb(x, torch.zeros(1, dtype=torch.long))


def test_a_randomized_model_is_not_taken_for_broken_by_one_lucky_draw() -> None:
    """Square stops at the first draw that errs; most of what it claims must err in most draws."""
    base = Linear(classes=4)
    x = 0.3 + 0.4 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    y = base(x).argmax(1)

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = base(x)
            return logits + 0.5 * torch.randn(logits.shape)

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        found = run(Square(queries=100), Noisy(), x, y, "Linf:0.001")
        errs = torch.stack([Noisy()(found.x).argmax(1) != y for _ in range(400)])
    claimed = torch.tensor([name != "" for name in found.made_by])
    luck = claimed & (errs.double().mean(0) < 0.5)
    assert int(claimed.sum()) > 0
    assert int(luck.sum()) <= 4  # by single draws 7


def test_the_default_parameters_load() -> None:
    attack: Any = load("attack", "foolbox", {"attack": "L2PGD", "parameters": {"steps": 3}})
    assert attack.parameters == {"steps": 3}
