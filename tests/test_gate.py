"""The honesty gate against models whose defects, or honesty, are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Linear, ToyEquilibrium

from robustdeq.equilibrium import FixedPoint, Implicit, Unrolled
from robustdeq.evaluation.gate import check, continuity, is_randomized, run_checks
from robustdeq.evaluation.gate.ascent import ascend
from robustdeq.evaluation.gate.examined import Examined
from robustdeq.evaluation.gate.losses import cosine, input_gradient, margin
from robustdeq.evaluation.gate.precise import precise
from robustdeq.evaluation.gate.quotients import DIRECTIONS, compare, orthonormal
from robustdeq.evaluation.gate.rules import RULES
from robustdeq.evaluation.gate.run import CHECKS, examined
from robustdeq.records import check_frame
from robustdeq.targets import Target
from robustdeq.threats import Threat

THREAT = Threat.parse("Linf:0.1")


class Smooth(nn.Module):
    """A two-layer network; each defect below is planted in a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def layer(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) / columns**0.5)

        self.first, self.last = layer(32, 64), layer(4, 32)

    def logits(self, x: Tensor) -> Tensor:
        hidden = torch.relu(4 * (x.flatten(1) - 0.5) @ self.first.T)
        return 4 * hidden @ self.last.T

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


def planted(forward: Callable[[Smooth, Tensor], Tensor]) -> Smooth:
    """The network with another forward pass."""
    return type("Planted", (Smooth,), {"forward": forward})()


def rows(model: nn.Module, x: Tensor, classes: int = 4, threat: Threat = THREAT) -> dict[str, Any]:
    found = run_checks(Target(model.eval(), classes), x, labels(x), threat, seed=0)
    return {row["name"]: row for row in found}


def failed(model: nn.Module, x: Tensor, **more: Any) -> set[str]:
    return {name for name, row in rows(model, x, **more).items() if row["status"] == "failed"}


def labels(x: Tensor) -> Tensor:
    """What an honest model for such images says."""
    model = Smooth() if x[0].numel() == 64 else ToyEquilibrium()
    return model(x).argmax(1)


def together(model: nn.Module, x: Tensor, name: str) -> dict[str, Any]:
    """The rows that are measured together with one check, and no others."""
    held = examined(Target(model.eval(), 4), x, labels(x), THREAT)
    (item,) = [item for item in CHECKS if name in item.names]
    return {row["name"]: row for row in item.rows(held)}


def judged(model: nn.Module, x: Tensor, name: str) -> Any:
    """The row of one check."""
    return together(model, x, name)[name]


@pytest.fixture
def x() -> Tensor:
    return torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("threat", ["Linf:0.1", "L2:0.5", "Linf:0"])
def test_honest_models_raise_no_flag(x: Tensor, threat: str) -> None:
    assert failed(Smooth(), x, threat=Threat.parse(threat)) == set()


def test_an_honest_equilibrium_model_raises_no_flag_and_shows_its_estimators(
    toy_images: Tensor,
) -> None:
    model = ToyEquilibrium(FixedPoint(), Implicit(FixedPoint()), rho=0.5)
    found = rows(model, toy_images[:2])
    assert not [name for name, row in found.items() if row["status"] == "failed"]
    shown = {name: row for name, row in found.items() if row["status"] == "info"}
    assert {"finite_differences_implicit", "finite_differences_one_step"} <= set(shown)
    assert shown["finite_differences_implicit"]["value"] > 0.999
    assert shown["finite_differences_one_step"]["value"] < 0.999  # biased, and no flag
    assert found["adjoint_unconverged"]["status"] == "passed"


def test_rows_fit_the_records_and_say_what_they_are_held_against(x: Tensor) -> None:
    found = rows(Smooth(), x)
    frame = check_frame(list(found.values()))
    assert set(frame["status"]) <= {"passed", "failed", "skipped", "info"}
    assert list(frame["name"]) == list(dict.fromkeys(frame["name"]))
    judged = frame[frame["status"].isin(["passed", "failed"])]
    assert (judged["reference"].str.len() > 20).all()
    assert judged["value"].notna().all()
    assert set(RULES) == set(frame["name"])


def test_the_gate_repeats_itself_and_leaves_generators_alone(x: Tensor) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = rows(Smooth(), x)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    for name, row in rows(Smooth(), x).items():
        same = row["value"] == first[name]["value"]
        assert same or math.isnan(row["value"])


def ripple(model: Smooth, x: Tensor) -> Tensor:
    return model.logits(x + 0.01 * torch.sin(400 * x))


class Mirror(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].flip(3)


def half_detached(model: Smooth, x: Tensor) -> Tensor:
    return model.logits(torch.cat([x[..., :4], x[..., 4:].detach()], 3))


def decoy(model: Smooth, x: Tensor) -> Tensor:
    return model.logits(x if not torch.is_grad_enabled() else x.flip(3))


def exits_early(model: Smooth, x: Tensor) -> Tensor:
    out = model.logits(x)
    sure = torch.softmax(out, 1).amax(1, keepdim=True) > 0.7
    return torch.where(sure, 1.5 * out, out)


def on_a_table(model: Smooth, x: Tensor) -> Tensor:
    """Adds to the logits of images that it has seen in training."""
    known = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    hit = (x[:, None] - known).abs().flatten(2).amax(2).amin(1) < 1e-3
    return model.logits(x) + 20.0 * hit[:, None] * torch.arange(4)


def stopped_together(model: Smooth, x: Tensor) -> Tensor:
    steps = 2 if float(x.std(0).mean() if len(x) > 1 else 0.0) > 0.2 else 3
    return model.logits(x) * (1 + 0.01 * steps)


def normalized_together(model: Smooth, x: Tensor) -> Tensor:
    return model.logits(x - x.mean(0, keepdim=True) + 0.5)


def inference(model: Smooth, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out = model.logits(x)
    return out.clone()


@pytest.mark.parametrize(
    ("forward", "flag"),
    [
        (lambda m, x: m.logits(x.detach()), "gradient_missing"),
        (lambda m, x: m.logits(x).detach(), "gradient_missing"),
        (inference, "gradient_missing"),
        (lambda m, x: torch.from_numpy(m.logits(x).detach().numpy()), "gradient_missing"),
        (lambda m, x: m.logits((8 * x).round() / 8), "zero_gradient"),
        (lambda m, x: m.logits(x).clamp(-0.1, 0.1), "zero_gradient"),
        (lambda m, x: m.logits(x) + (0 * x.flatten(1)[:, :1]).sqrt(), "nonfinite_gradient"),
        (lambda m, x: 1e4 * m.logits(x), "saturated_logits"),
        (lambda m, x: torch.softmax(m.logits(x), 1), "probabilities"),
        (ripple, "shattered_gradient"),
        (lambda m, x: m.logits(Mirror.apply(x)), "finite_differences"),
        (half_detached, "finite_differences"),
        (half_detached, "finite_differences_adversarial"),
        (half_detached, "gradient_masked"),
        (lambda m, x: m.logits(x.detach()) + 0.01 * x.flatten(1)[:, :4], "gradient_masked"),
        (lambda m, x: m.logits(x.clamp_(0.2, 0.8)), "input_overwritten"),
        (decoy, "grad_mode_changes_logits"),
        (normalized_together, "batch_dependent"),
        (stopped_together, "batch_dependent"),
        (exits_early, "discontinuous"),
        (on_a_table, "discontinuous"),
        (lambda m, x: m.logits(x + 0.1 * torch.randn_like(x)), "randomized"),
        (lambda m, x: m.logits(x).round(), "random_noise"),
        (lambda m, x: m.logits(x.detach()) + 0 * x.flatten(1)[:, :1], "unbounded_attack"),
    ],
)
def test_planted_defects_are_named(
    forward: Callable[[Smooth, Tensor], Tensor], flag: str, x: Tensor
) -> None:
    assert judged(planted(forward), x, flag)["status"] == "failed"


def test_masking_operations_are_named_with_their_place(x: Tensor) -> None:
    row = judged(planted(half_detached), x, "gradient_masked")
    assert "detach" in row["detail"]
    assert "test_gate.py:" in row["detail"]


def test_confidence_alone_is_named_as_such(linear: Linear, x: Tensor) -> None:
    with torch.no_grad():
        linear.weight.mul_(1e4)
    assert failed(linear, x) == {"saturated_logits"}


class Video(Smooth):
    """Mixes what it saw last into what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        mixed = 0.7 * x + 0.3 * self.frame if self.frame.shape == x.shape else x
        self.frame = mixed.detach()
        return self.logits(mixed)


class Cached(Smooth):
    """Answers from a table of addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.logits(x)
        held = self.known.setdefault(x.data_ptr(), (x, self.logits(x)))
        return held[1] if held[1].shape[0] == len(x) else self.logits(x)


class Later(Smooth):
    """Turns into something else after 50 calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.logits(x if self.calls < 50 else x.flip(3))


@pytest.mark.parametrize("kind", [Video, Cached, Later])
def test_state_between_calls_is_named_and_is_no_randomness(kind: type[Smooth], x: Tensor) -> None:
    flags = failed(kind(), x)
    assert "keeps_state" in flags
    assert "randomized" not in flags


def test_randomness_is_found_even_where_it_is_rare_or_private(x: Tensor) -> None:
    def coin(model: Smooth, x: Tensor) -> Tensor:
        return model.logits(x) * (1 + 0.1 * int(torch.randint(2, ())))

    own = torch.Generator().manual_seed(0)
    private = planted(lambda m, x: m.logits(x + 0.1 * torch.randn(x.shape, generator=own)))
    assert is_randomized(Target(planted(coin), 4), x)
    assert is_randomized(Target(private, 4), x)
    assert not is_randomized(Target(Smooth(), 4), x)
    assert not is_randomized(Target(Video(), 4), x)


def test_too_few_solver_and_adjoint_steps_are_named(toy_images: Tensor) -> None:
    x = toy_images[:2]
    hurried = FixedPoint(tolerance=1e-6, max_steps=3)
    found = together(ToyEquilibrium(hurried, rho=0.95), x, "unconverged_clean")
    assert found["unconverged_clean"]["status"] == "failed"
    assert found["unconverged_adversarial"]["status"] == "failed"
    assert found["adjoint_unconverged"]["status"] == "passed"
    short = Implicit(FixedPoint(tolerance=1e-6, max_steps=1))
    found = together(ToyEquilibrium(FixedPoint(), short), x, "unconverged_clean")
    assert found["adjoint_unconverged"]["status"] == "failed"
    assert found["unconverged_clean"]["status"] == "passed"
    fixed = ToyEquilibrium(FixedPoint(tolerance=0.0, max_steps=3), Unrolled(3))
    row = judged(fixed, x, "unconverged_clean")
    assert row["status"] == "skipped"
    assert "definition" in row["detail"]


def test_a_model_that_cannot_be_asked_fails_the_check_and_no_other(x: Tensor) -> None:
    def needs_company(model: Smooth, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise RuntimeError("batch of one")
        return model.logits(x)

    row = judged(planted(needs_company), x, "batch_dependent")
    assert row["status"] == "failed"
    assert "batch of one" in row["detail"]
    assert judged(planted(needs_company), x, "discontinuous")["status"] == "passed"


def test_a_narrow_batch_changes_no_measurement(x: Tensor) -> None:
    whole = examined(Target(Smooth(), 4), x, labels(x), THREAT)
    split = examined(Target(Smooth(), 4, batch_size=7), x, labels(x), THREAT)
    for name in ("gradient_missing", "discontinuous", "batch_dependent", "doubled_steps"):
        (item,) = [item for item in CHECKS if name in item.names]
        assert item.rows(whole) == item.rows(split)


def exam(model: nn.Module, x: Tensor, threat: Threat = THREAT) -> Examined:
    target = Target(model, 4)
    with torch.no_grad():
        first = model(x)
    return Examined(target, x, first.argmax(1), threat, 0, False, first, 0.0)


def test_differences_agree_with_a_known_derivative_in_both_precisions(x: Tensor) -> None:
    class Fixed(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            return self.logits(x.to(self.first.dtype)).float()

    for model, dtype in ((Smooth(), torch.float64), (Fixed(), torch.float32)):
        held = exam(model, x)
        view = precise(held)
        assert view.dtype == dtype
        compared = compare(held, view, x[:6], held.y[:6])
        true = input_gradient(view.target, compared.x, compared.y, margin)
        slopes = compared.slopes[0][0]
        expected = true.flatten(1).double() @ compared.directions
        assert float((slopes - expected).norm() / expected.norm()) < 2e-2
        assert float(compared.cosines(view.target).min()) > 0.999
        # A gradient that is orthogonal to the true one has cosine 0.
        off = cosine(expected, expected.roll(1, 1))
        assert float(off.abs().max()) < 0.9


def test_directions_are_orthonormal_and_stay_in_the_box() -> None:
    basis = orthonormal(100, torch.Generator().manual_seed(0))
    assert basis.shape == (100, DIRECTIONS)
    assert torch.allclose(basis.T @ basis, torch.eye(64, dtype=torch.float64), atol=1e-12)
    assert orthonormal(9, torch.Generator().manual_seed(0)).shape == (9, 9)


@pytest.mark.parametrize("height", [0.0, 0.05, 0.5])
def test_bisection_finds_the_height_of_a_jump(height: float) -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            steep = x.mean((1, 2, 3))
            up = 2 * steep + height * (steep > 0.6180339)
            return torch.stack([up, -up], 1)

    low, high = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    target = Target(Step(), 2)
    held = Examined(target, low, torch.zeros(1).long(), THREAT, 0, False, target(high).logits, 0.0)
    assert held.scale == pytest.approx(2 + height)
    jump = float(continuity._jump(held, low, high))
    # Relative to the larger logits at the end that is kept.
    assert jump == pytest.approx(height / (2 + height), abs=1e-4)


def test_the_ascent_reaches_the_exact_optimum_of_a_linear_model(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    threat = Threat.parse("Linf:0.001")
    _, largest = ascend(Target(linear, 4), x, y, threat, x, steps=20)
    other = linear(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    slope = (linear.weight[other] - linear.weight[y]).abs().sum(1)
    best = margin(linear(x), y) + 0.001 * slope
    whole = best <= 0  # the others are left where they break
    assert 0 < int(whole.sum()) < len(x)
    assert torch.allclose(largest[whole], best[whole], atol=1e-5)
    assert bool(((largest > 0) & (largest <= best + 1e-5))[~whole].all())


def test_the_ascent_leaves_a_sample_once_it_is_broken(x: Tensor) -> None:
    model = Smooth()
    y = model(x).argmax(1)
    found, largest = ascend(Target(model, 4), x, y, THREAT, x, steps=40)
    broken = largest > 0
    assert bool(broken.any())
    assert torch.equal(model(found).argmax(1) != y, broken)
    assert float(THREAT.distance(x, found).max()) <= 0.1 + 1e-6


def test_a_check_holds_a_value_against_a_threshold() -> None:
    assert check("a", 0.5, 0.5, 3)["status"] == "passed"
    assert check("a", 0.51, 0.5, 3)["status"] == "failed"
    assert check("a", 0.5, 0.9, 3, at_least=True)["status"] == "failed"
    assert check("a", math.nan, 0.5, 3)["status"] == "failed"
    assert check("a", math.nan, 0.5, 3, at_least=True)["status"] == "failed"
