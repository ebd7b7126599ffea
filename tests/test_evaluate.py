from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import Linear, ToyEquilibrium

import robustdeq
from robustdeq.equilibrium import FixedPoint, Unrolled
from robustdeq.errors import CaseError, UsageError
from robustdeq.interfaces import Access, Scope
from robustdeq.suite import AttackEntry
from robustdeq.tables import COLUMNS
from robustdeq.threats import Threat

EPS = "Linf:0.015"


@dataclass(frozen=True)
class Scripted:
    """An attack that returns what a test tells it to."""

    needs: ClassVar[Access] = Access.LABELS
    scope: ClassVar[Scope] = Scope.CHUNK
    action: Any = None

    def run(self, target: Any, x: Tensor, y: Tensor, threat: Threat, rng: Any) -> Tensor:
        out: Tensor = self.action(x)
        return out


def test_the_verdict_has_the_tables_columns_and_the_samples(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    y = y.clone()
    y[0] = (y[0] + 1) % 4  # one clean error
    verdict = robustdeq.evaluate(linear, x, y, threat=EPS)
    assert all(hasattr(verdict, column) for column in COLUMNS)
    assert verdict.clean_acc == 23 / 24
    samples = verdict.samples
    assert list(samples.columns) == ["index", "label", "clean", "robust", "broken_by"]
    assert samples["index"].tolist() == list(range(24))
    assert verdict.robust_acc == samples["robust"].mean()
    assert verdict.robust_low < verdict.robust_acc < verdict.robust_high
    assert sum(verdict.broken_by.values()) == int((samples["clean"] & ~samples["robust"]).sum())
    assert not samples["robust"][0]
    assert samples["broken_by"][0] is None
    distances = Threat.parse(EPS).distance(x, verdict.adversarials)
    assert float(distances.max()) <= 0.015 + 1e-6
    wrong = (linear(verdict.adversarials).argmax(1) != y).numpy()
    assert np.array_equal(wrong, ~samples["robust"].to_numpy())
    assert "robust" in str(verdict)


def test_evaluation_leaves_the_model_as_it_was(linear_data: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(Linear(), nn.Dropout(0.5)).train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    verdict = robustdeq.evaluate(model, *linear_data, threat=EPS)
    assert verdict.clean_acc == 1.0  # in eval mode: no dropout
    assert verdict.track == "deterministic"
    assert model.training
    assert model[1].training
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[0].weight.requires_grad
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("action", "flag"),
    [
        (lambda x: torch.zeros_like(x), "outside_ball:scripted=24"),
        (lambda x: x + 0.06, "outside_ball:scripted=24"),
        (lambda x: x.clamp(max=0.0) - 0.01, "outside_box:scripted=24"),
    ],
)
def test_an_attack_that_breaks_the_rules_breaks_no_sample(
    action: Any, flag: str, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    verdict = robustdeq.evaluate(linear, *linear_data, threat=EPS, attacks=[Scripted(action)])
    assert verdict.robust_acc == verdict.clean_acc == 1.0
    assert flag in verdict.flags
    assert verdict.broken_by == {}


@pytest.mark.parametrize("action", [lambda x: x * torch.nan, lambda x: x + torch.inf])
def test_non_finite_examples_are_neither_success_nor_robustness(
    action: Any, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    verdict = robustdeq.evaluate(linear, *linear_data, threat=EPS, attacks=[Scripted(action)])
    assert verdict.robust_acc is None
    assert verdict.status == "failed"
    assert "24 non-finite examples" in verdict.note


def test_a_failing_attack_leaves_no_robust_accuracy_and_stops_no_other(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("out of ideas")

    verdict = robustdeq.evaluate(linear, *linear_data, threat=EPS, attacks=[Scripted(fail), "pgd"])
    assert verdict.robust_acc is None
    assert verdict.clean_acc == 1.0
    assert "out of ideas" in verdict.note
    assert verdict.broken_by["pgd"] > 0
    wrong_shape = Scripted(lambda x: x[:, :, :2])
    verdict = robustdeq.evaluate(linear, *linear_data, threat=EPS, attacks=[wrong_shape])
    assert verdict.robust_acc is None
    assert "shape" in verdict.note


def test_a_model_that_every_attack_skips_has_no_robust_accuracy(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    skipped = AttackEntry(attack="pgd", gradients=("unrolled(3)",))
    verdict = robustdeq.evaluate(linear, *linear_data, threat=EPS, attacks=[skipped])
    assert verdict.clean_acc == 1.0
    assert verdict.robust_acc is None
    assert "no attack applies" in verdict.note


def test_an_attack_that_writes_into_its_input_moves_nothing(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    kept = x.clone()
    robustdeq.evaluate(linear, x, y, threat=EPS, attacks=[Scripted(lambda x: x.zero_())])
    assert torch.equal(x, kept)


def test_worst_case_is_per_sample_over_gradients(linear_data: tuple[Tensor, Tensor]) -> None:
    model = ToyEquilibrium(FixedPoint(), size=10, pixels=64).float()
    x, _ = linear_data
    y = model(x).argmax(1).detach()
    entries = [
        AttackEntry(attack="pgd", parameters={"steps": 3}, gradients=("honest", "unrolled(1)")),
        AttackEntry(attack="pgd", parameters={"steps": 20, "loss": "margin"}),
    ]
    verdict = robustdeq.evaluate(model, x, y, threat="Linf:0.1", attacks=entries)
    assert set(verdict.broken_by) <= {"pgd", "pgd[unrolled(1)]", "pgd#2"}
    alone = robustdeq.evaluate(model, x, y, threat="Linf:0.1", attacks=entries[:1])
    assert verdict.robust_acc <= alone.robust_acc
    assert verdict.autoattack_acc is None
    assert verdict.backward_nfe > 0


def test_equal_seeds_give_equal_verdicts_and_chunks_do_not_mix(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    runs = [robustdeq.evaluate(linear, *linear_data, threat=EPS, chunk=c) for c in (24, 24, 13)]
    assert torch.equal(runs[0].adversarials, runs[1].adversarials)
    assert runs[2].n == 24
    assert runs[2].robust_acc == runs[0].robust_acc  # a linear model: every attack is exact


def test_an_equilibrium_model_inside_a_wrapper_is_counted_by_its_cells(
    linear_data: tuple[Tensor, Tensor],
) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out

    x, y = linear_data
    inner = ToyEquilibrium(FixedPoint(tolerance=0.0, max_steps=5), Unrolled(5), pixels=64).float()
    wrapped = robustdeq.evaluate(Wrapper(inner), x, y, threat=EPS, attacks=["pgd"])
    calls = robustdeq.evaluate(Linear(), x, y, threat=EPS, attacks=["pgd"])
    assert wrapped.forward_nfe % 5 == wrapped.backward_nfe % 5 == 0
    assert wrapped.forward_nfe > 5 * 24
    assert calls.forward_nfe > 24


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precisions(dtype: torch.dtype, linear_data: tuple[Tensor, Tensor]) -> None:
    x, y = linear_data
    verdict = robustdeq.evaluate(Linear().to(dtype), x.double(), y, threat=EPS)
    assert verdict.status == "ok"
    assert verdict.clean_acc > 0.9


class Returns(nn.Module):
    def __init__(self, action: Any) -> None:
        super().__init__()
        self.action = action

    def forward(self, x: Tensor) -> Any:
        return self.action(x)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda x: torch.full((len(x), 4), torch.nan), "not finite for 24 of 24"),
        (lambda x: x.flatten(1)[:, :1], "two classes or more"),
        (lambda x: x, "two classes or more"),
        (lambda x: (x, x), "tuple"),
        (lambda x: x.flatten(1)[:, :4][:1], "shape"),
        (lambda x: x.flatten(1)[:, :4].argsort(1), "type torch.int64"),
        (lambda x: x @ x.new_ones(5, 3), "fails on an input"),
    ],
)
def test_models_that_return_no_logits(
    action: Any, message: str, linear_data: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(CaseError, match=message) as caught:
        robustdeq.evaluate(Returns(action), *linear_data, threat=EPS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threat": "Linf:-1"}, "negative"),
        ({"threat": "Linf"}, "does not parse"),
        ({"battery": "standrad"}, "did you mean 'standard'"),
        ({"attacks": []}, "at least one attack"),
        ({"attacks": ["pdg"]}, "did you mean 'pgd'"),
        ({"attacks": [object()]}, "no attack"),
        ({"chunk": 0}, "at least 1"),
        ({"x": torch.rand(24, 16)}, "channels, height, width"),
        ({"x": torch.rand(24, 1, 8, 8) * 255}, "outside"),
        ({"y": torch.zeros(3, dtype=torch.long)}, "integer labels"),
        ({"y": torch.zeros(24)}, "integer labels"),
        ({"y": torch.full((24,), 9)}, "4 classes"),
        ({"model": lambda x: x}, "torch.nn.Module"),
    ],
)
def test_bad_arguments(
    change: dict[str, Any], message: str, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    arguments = {"model": linear, "x": linear_data[0], "y": linear_data[1], "threat": EPS} | change
    with pytest.raises(UsageError, match=message):
        robustdeq.evaluate(**arguments)


def test_load_model() -> None:
    model = robustdeq.load_model("Madry2018Towards_deq", dataset="digits", threat="Linf:3/16")
    assert not model.training
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(UsageError, match="did you mean 'Madry2018Towards_deq'"):
        robustdeq.load_model("Madry2018Toward_deq")
    with pytest.raises(UsageError, match="no row under"):
        robustdeq.load_model("Madry2018Towards_deq", threat="L2:1")


def test_weights_are_looked_for_in_the_given_folder_first(tmp_path: Path) -> None:
    shipped = resources.files("robustdeq.zoo") / "digits-deq-pgd_at.safetensors"
    (tmp_path / shipped.name).write_bytes(shipped.read_bytes())
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = robustdeq.load_model("Madry2018Towards_deq", weights=tmp_path)
    assert torch.equal(model(x), robustdeq.load_model("Madry2018Towards_deq")(x))
    (tmp_path / shipped.name).write_bytes(b"other weights")
    with pytest.raises(CaseError, match=str(tmp_path)):
        robustdeq.load_model("Madry2018Towards_deq", weights=tmp_path)
