"""The judge and the honesty checks, against planted defects."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from toys import Linear, ToyEquilibrium

from robustdeq.equilibrium import FixedPoint
from robustdeq.evaluation.gate import is_randomized, run_checks
from robustdeq.evaluation.judge import DRAWS, Judge
from robustdeq.targets import Target
from robustdeq.threats import Threat


def failed(model: nn.Module, x: Tensor, classes: int = 4) -> set[str]:
    y = torch.zeros(len(x), dtype=torch.long)
    rows = run_checks(Target(model.eval(), classes), x, y, Threat.parse("Linf:0.02"))
    return {row["name"] for row in rows if row["status"] == "failed"}


class Noisy(Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + 2.0 * torch.randn_like(out)


class Wrapped(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


class Detached(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.detach()).detach()


class Quantized(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.base((8 * x).round() / 8)


class GradDependent(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out * 0.5 if torch.is_grad_enabled() else out


class BatchCoupled(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x - x.mean(0, keepdim=True))


class NaNGradient(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + torch.sqrt(0.0 * x.flatten(1)[:, :1])


@pytest.fixture
def x() -> Tensor:
    return torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_honest_model_raises_no_flag(linear: Linear, x: Tensor, toy_images: Tensor) -> None:
    assert failed(linear, x) == set()
    assert failed(ToyEquilibrium(FixedPoint()).float(), toy_images.float()) == set()


def test_a_confident_honest_model_is_flagged_for_its_saturated_losses_alone(
    linear: Linear, x: Tensor
) -> None:
    with torch.no_grad():
        linear.weight.mul_(1e4)
    assert failed(linear, x) == {"saturated_logits"}


@pytest.mark.parametrize(
    ("defect", "flag"),
    [
        (Detached, "zero_gradient"),
        (Quantized, "zero_gradient"),
        (GradDependent, "grad_mode_changes_logits"),
        (BatchCoupled, "batch_dependent"),
        (NaNGradient, "nonfinite_gradient"),
    ],
)
def test_planted_defects_are_flagged(
    defect: type[Wrapped], flag: str, linear: Linear, x: Tensor
) -> None:
    assert flag in failed(defect(linear), x)


def test_too_few_solver_steps_are_flagged(toy_images: Tensor) -> None:
    model = ToyEquilibrium(FixedPoint(tolerance=1e-6, max_steps=3), rho=0.95)
    assert "unconverged_clean" in failed(model, toy_images)


def test_randomness_is_noticed(linear: Linear, x: Tensor) -> None:
    assert is_randomized(Target(Noisy(), 4), x)
    assert not is_randomized(Target(linear, 4), x)


def test_the_judge_cannot_be_given_a_warm_start() -> None:
    assert set(inspect.signature(Judge.__call__).parameters) == {"self", "x", "y", "indices"}


def test_non_finite_logits_are_never_correct(linear: Linear, x: Tensor) -> None:
    class Broken(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            out = self.base(x)
            out[0, 2] = torch.nan
            return out

    y = linear(x).argmax(1)
    judgment = Judge(Broken(linear), 4, scope="s")(x, y, range(len(x)))
    assert judgment.prediction[0] == -1
    assert judgment.correct.tolist() == [False] + [True] * 19


def test_draws_belong_to_the_index_and_can_be_replayed(x: Tensor) -> None:
    model, y = Noisy(), Linear()(x).argmax(1)
    judge = Judge(model, 4, scope="case", randomized=True)
    torch.manual_seed(1)
    first = judge(x, y, range(20))
    before = torch.get_rng_state()
    second = judge(x[5:], y[5:], range(5, 20))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.votes[5:], second.votes)
    assert 0 < float(first.votes.mean()) < 1
    assert float((first.votes * DRAWS).frac().abs().max()) == 0
    assert torch.equal(first.correct, first.votes > 0.5)
    assert not torch.equal(
        first.votes, Judge(model, 4, scope="x", randomized=True)(x, y, range(20)).votes
    )


def test_batch_size_splits_forward_passes_and_changes_nothing(
    toy: ToyEquilibrium, toy_images: Tensor
) -> None:
    y = torch.zeros(8, dtype=torch.long)
    whole = Judge(toy, 4, scope="s")(toy_images, y, range(8))
    split = Judge(toy, 4, scope="s", batch_size=3)(toy_images, y, range(8))
    assert torch.equal(whole.prediction, split.prediction)
    assert whole.steps is not None
    assert split.steps is not None
    assert whole.steps.tolist() == split.steps.tolist()
