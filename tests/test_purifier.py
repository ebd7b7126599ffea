"""The attack on defenses that move their own input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from robustdeq.attacks._losses import margin
from robustdeq.attacks.apgd import APGD
from robustdeq.attacks.purifier import Purifier, Rounds, entropy_of, optimizes_inside
from torch import Tensor, nn
from torch.autograd import grad as differentiate
from torch.nn import functional as F  # noqa: N812
from toys import Linear

import robustdeq
from robustdeq.datasets import load_slice, spec_of
from robustdeq.errors import UsageError
from robustdeq.interfaces import Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.registry import load
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.weights import load_weights

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"steps": 20, "restarts": 1, "targets": 2, "polish": 5}


def run(attack: Any, model: nn.Module, x: Tensor, y: Tensor, threat: str, classes: int) -> Tensor:
    """Candidates, all of them admissible."""
    parsed = Threat.parse(threat)
    out = attack.run(Target(model, classes), x, y, parsed, SampleRandom(0, "t", range(len(x))))
    found = out.x if isinstance(out, Candidates) else out
    assert not any(parsed.violations(x, found))
    return found


class Cleaned(nn.Module):
    """Entropy descent before a classifier, detached: the gradient of the whole is 0.

    With two linear classes the descent widens the gap that there is, so that no prediction changes
    and the exact robust accuracy is the classifier's own.
    """

    def __init__(self, base: nn.Module, offers: bool = True) -> None:
        super().__init__()
        self.base, self.offers = base, offers

    def undefended(self) -> dict[str, nn.Module]:
        return {"base": self.base} if self.offers else {}

    def forward(self, x: Tensor) -> Tensor:
        moved = x.detach()
        for _ in range(3):
            with torch.enable_grad():
                leaf = moved.detach().requires_grad_()
                (slope,) = torch.autograd.grad(entropy_of(self.base(leaf)).sum(), leaf)
            moved = moved - 0.004 * slope.sign()
        return self.base(moved).detach()


@pytest.mark.parametrize("threat", ["Linf:0.012", "L2:0.08"])
def test_a_purifier_that_hides_the_gradient_falls_to_its_exact_robust_accuracy(threat: str) -> None:
    base = Linear(classes=2)
    x = 0.3 + 0.4 * torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    y = base(x).argmax(1)
    model, parsed = Cleaned(base), Threat.parse(threat)
    difference = (base.weight[0] - base.weight[1]).detach()
    dual = difference.abs().sum() if parsed.norm == "Linf" else difference.norm()
    exact = -margin(base(x), y).detach() > parsed.eps * dual
    assert 0.2 < float(exact.float().mean()) < 0.8
    assert torch.equal(model(x).argmax(1), y)
    by_gradient = model(run(APGD(steps=10), model, x, y, threat, 2)).argmax(1) == y
    assert int(by_gradient.sum()) > int(exact.sum()) + 5
    left = model(run(Purifier(**QUICK), model, x, y, threat, 2)).argmax(1) == y
    assert torch.equal(left, exact)


def test_behind_and_in_front_break_more_than_the_models_own_gradient() -> None:
    """Digits, n = 25, Linf:3/16, entropy reduction at inference."""
    data = load_slice("digits", "test", 25)
    x, y = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    parameters = {"width": 48, "inner": 48, "gain": 0.8, "regulation": "entropy"}
    model = load("defense", "neural_dynamics", parameters).build(spec_of("digits"), CPU).eval()
    weights = "digits48-neural_dynamics-plain_pgd_at.safetensors"
    load_weights(model, Path(robustdeq.__file__).parent / "zoo" / weights)
    honest, purifier = (
        model(run(attack, model, x, y, "Linf:3/16", 10)).argmax(1) == y
        for attack in (APGD(steps=10), Purifier(steps=10, restarts=1, targets=1, polish=3))
    )
    assert int(purifier.sum()) <= int(honest.sum()) - 3


def test_a_sample_does_not_depend_on_its_companions() -> None:
    torch.manual_seed(0)
    defense = load(
        "defense", "neural_dynamics", {"width": 16, "inner": 16, "regulation": "entropy"}
    )
    model = defense.build(spec_of("digits"), CPU).double().eval()
    x = torch.from_numpy(load_slice("digits", "test", 4).images).float() / 255
    with torch.no_grad():
        y = model(x.double()).argmax(1)
    target, threat = Target(model, 10), Threat.parse("Linf:0.02")
    attack = Purifier(steps=2, restarts=1, targets=2, polish=1)
    whole = attack.run(target, x, y, threat, SampleRandom(0, "p", range(4))).x
    part = attack.run(target, x[1:3], y[1:3], threat, SampleRandom(0, "p", [1, 2])).x
    torch.testing.assert_close(whole[1:3], part)


def test_rounds_add_up_the_margins_of_all_solves() -> None:
    torch.manual_seed(0)
    parameters = {"width": 16, "inner": 16, "regulation": "entropy", "tolerance": 0.0}
    model: Any = load("defense", "neural_dynamics", parameters).build(spec_of("digits"), CPU)
    x = torch.from_numpy(load_slice("digits", "test", 4).images).float() / 255
    y = torch.tensor([1, 2, 3, 4])
    target = Target(model, 10)
    leaf = x.clone().requires_grad_()
    reading = Rounds(target, y)(leaf, torch.arange(4), torch.full((4,), -1), ())
    with torch.no_grad():
        output = target(x)
        each = [margin(model.readout(solve.z), y) for solve in output.solves]
    assert len(each) == 4
    torch.testing.assert_close(reading.logits, output.logits)
    torch.testing.assert_close(reading.losses, sum(each) + margin(output.logits, y))
    (slope,) = differentiate(reading.losses.sum(), leaf)
    (last,) = differentiate(margin(target(leaf).logits, y).sum(), leaf)
    assert not torch.allclose(slope, 2 * last, rtol=1e-2)


def test_the_entropy_is_that_of_the_prediction() -> None:
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    torch.testing.assert_close(entropy_of(logits), torch.tensor([0.5, 0.0]).mul(2).log1p())
    assert bool(entropy_of(1e6 * logits).isfinite().all())


def helper(x: Tensor) -> Tensor:
    (slope,) = differentiate(x.square().sum(), x)
    return slope


class ByHelper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x)


class ByBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        F.relu(leaf).sum().backward()
        return x


class Inheriting(ByBackward):
    pass


class InALambda(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda z: torch.autograd.grad(z.sum(), z)[0])(x)


@pytest.mark.parametrize("cls", [ByHelper, ByBackward, Inheriting, InALambda])
def test_models_that_optimize_within_their_forward_pass_are_known(cls: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(cls(), nn.ReLU()))
    assert optimizes_inside(model)
    assert Purifier().fits(Target(model, 2))


@pytest.mark.parametrize(
    "defense", ["deq", "feedforward", "weight_tied", "lyadeq", "neural_dynamics", "wide_resnet"]
)
def test_models_that_do_not_are_left_alone(defense: str) -> None:
    model = load("defense", defense, {}).build(spec_of("digits"), CPU)
    assert not optimizes_inside(model)
    assert Purifier().fits(Target(model, 10)) == (defense == "lyadeq")


def test_a_purifier_that_offers_nothing_is_known_by_its_code() -> None:
    assert Purifier().fits(Target(Cleaned(Linear(classes=2), offers=False), 2))
    assert not Purifier().fits(Target(Linear(), 4))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"entropy": 0.0}, {"polish": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"purifier has .*; give"):
        load("attack", "purifier", wrong)
