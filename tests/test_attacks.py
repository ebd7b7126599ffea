from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack as Reference
from torch import Tensor, nn
from toys import Linear, ToyEquilibrium

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.interfaces import Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.registry import load
from robustdeq.targets import Target
from robustdeq.threats import Norm, Threat


def linear_robust(model: Linear, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Whether each sample of a linear model is robust, exactly: margin > eps * dual norm.

    Exact where the box does not bind, as for images well inside of it.
    """
    logits, w = model(x), model.weight
    difference = w[y][:, None] - w[None]
    norm = difference.abs().sum(2) if threat.norm is Norm.LINF else difference.norm(dim=2)
    slack = logits.gather(1, y[:, None]) - logits - threat.eps * norm
    slack[torch.arange(len(y)), y] = torch.inf
    return slack.amin(1).detach() > 0


def run(
    name: str, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, **parameters: Any
) -> Tensor:
    target = Target(model, 4)
    out = load("attack", name, parameters).run(
        target, x, y, threat, SampleRandom(0, name, range(len(x)))
    )
    return out.x if isinstance(out, Candidates) else out


@pytest.mark.parametrize("text", ["Linf:0.008", "L2:0.05"])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("pgd", {"steps": 60, "loss": loss}) for loss in ("ce", "margin", "dlr")]
    + [("autoattack", {})],
)
def test_attacks_reach_the_exact_robust_accuracy_of_a_linear_model(
    name: str,
    parameters: dict[str, Any],
    text: str,
    linear: Linear,
    linear_data: tuple[Tensor, Tensor],
) -> None:
    x, y = linear_data
    threat = Threat.parse(text)
    exact = linear_robust(linear, x, y, threat)
    assert 0.2 < float(exact.float().mean()) < 0.9
    adversarial = run(name, linear, x, y, threat, **parameters)
    assert not any(threat.violations(x, adversarial))
    left = linear(adversarial).argmax(1) == y
    assert bool((left >= exact).all())
    # Ascent towards the nearest class can hover where two classes meet: PGD may miss one sample.
    assert int(left.sum()) - int(exact.sum()) <= (0 if name == "autoattack" else 1)


def test_fgsm_is_pgd_of_one_full_step(linear: Linear, linear_data: tuple[Tensor, Tensor]) -> None:
    x, y = linear_data
    threat = Threat.parse("Linf:0.008")
    found = run("pgd", linear, x, y, threat, steps=1, step_size=1.0, random_start=False)
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(linear(leaf), y, reduction="sum")
    fgsm = (x + 0.008 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)
    broken = linear(fgsm).argmax(1) != y
    torch.testing.assert_close(found[broken], fgsm[broken])


def test_pgd_of_a_sample_does_not_depend_on_its_companions(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    threat, attack = Threat.parse("Linf:0.008"), load("attack", "pgd", {"steps": 5, "restarts": 3})
    whole = attack.run(Target(linear, 4), x, y, threat, SampleRandom(0, "pgd", range(24)))
    part = attack.run(Target(linear, 4), x[7:9], y[7:9], threat, SampleRandom(0, "pgd", [7, 8]))
    assert isinstance(whole, Tensor)
    torch.testing.assert_close(whole[7:9], part)


def test_more_restarts_never_break_less(linear: Linear, linear_data: tuple[Tensor, Tensor]) -> None:
    x, y = linear_data
    threat = Threat.parse("L2:0.05")
    broken = [
        linear(run("pgd", linear, x, y, threat, steps=2, restarts=k)).argmax(1) != y for k in (1, 4)
    ]
    assert bool((broken[0] <= broken[1]).all())


def test_square_is_a_black_box(linear: Linear, linear_data: tuple[Tensor, Tensor]) -> None:
    """It breaks a model without gradients, where gradient attacks are helpless."""

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear(x.detach()).detach()

    x, y = linear_data
    threat = Threat.parse("Linf:0.02")
    exact = linear_robust(linear, x, y, threat)
    by_pgd = (
        linear(run("pgd", Detached(), x, y, threat, steps=10, random_start=False)).argmax(1) == y
    )
    by_square = linear(run("square", Detached(), x, y, threat, queries=400)).argmax(1) == y
    assert bool(by_pgd.all())
    breakable = 24 - int(exact.sum())
    assert 24 - int(by_square.sum()) >= breakable / 2 > 3


def digits(n: int) -> tuple[Tensor, Tensor]:
    data = load_slice("digits", "test", n)
    return torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)


@pytest.mark.parametrize(
    ("model_id", "threat", "n", "chunk"),
    [
        ("Madry2018Towards_deq", "Linf:3/16", 8, 8),
        ("Madry2018Towards_feedforward", "L2:0.8", 20, 11),
    ],
)
def test_harness_and_library_agree_sample_by_sample(
    model_id: str, threat: str, n: int, chunk: int
) -> None:
    """The harness's AutoAttack is pyautoattack's own, driven chunk by chunk, on the same seed."""
    x, y = digits(n)
    model = robustdeq.load_model(model_id, dataset="digits")
    verdict = robustdeq.evaluate(model, x, y, threat=threat, seed=3, chunk=chunk)
    norm, eps = threat.split(":")[0], Threat.parse(threat).eps
    robust = []
    for rows in (slice(k, k + chunk) for k in range(0, n, chunk)):
        library = Reference(model, norm=norm, eps=eps, seed=3, version="standard", device="cpu")
        x_adv, _ = library.run_standard_evaluation(x[rows], y[rows], batch_size=n)
        robust += (model(x_adv).argmax(1) == y[rows]).tolist()
    assert verdict.samples["robust"].tolist() == robust
    assert verdict.autoattack_acc == verdict.robust_acc == pytest.approx(sum(robust) / n)
    assert 0.05 < sum(robust) / n < 0.95


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_autoattack_with_few_classes_says_what_it_left_out(classes: int) -> None:
    model = Linear(classes=classes)
    x = 0.3 + 0.4 * torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    y = model(x).argmax(1).detach()
    threat = Threat.parse("Linf:0.008")
    verdict = robustdeq.evaluate(model, x, y, threat=threat)
    exact = linear_robust(model, x, y, threat)
    assert verdict.samples["robust"].tolist() == exact.tolist()
    assert any("apgd-t" in flag for flag in verdict.flags) == (classes < 4)


def test_nan_gradients_do_not_turn_into_robustness_or_success(
    linear_data: tuple[Tensor, Tensor],
) -> None:
    """The library alone returns NaN images for such a model, and counts them as fooled."""
    base = Linear()

    class NaNGradient(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return base(x) + torch.sqrt(0.0 * x.flatten(1)[:, :1])

    x, y = linear_data
    threat = Threat.parse("L2:0.05")
    verdict = robustdeq.evaluate(NaNGradient(), x, y, threat=threat)
    assert bool(verdict.adversarials.isfinite().all())
    assert any(flag.startswith("nonfinite_gradient") for flag in verdict.flags)
    exact = linear_robust(base, x, y, threat)
    assert int((verdict.samples["robust"].to_numpy() < exact.numpy()).sum()) == 0


def test_the_callers_randomness_is_left_alone(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    before = torch.get_rng_state()
    run("autoattack", linear, *linear_data, Threat.parse("Linf:0.02"))
    assert torch.equal(before, torch.get_rng_state())


def test_rand_version_runs_on_a_randomized_model(linear_data: tuple[Tensor, Tensor]) -> None:
    class Noisy(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.01 * torch.randn(len(x), 4)

    x, y = linear_data
    verdict = robustdeq.evaluate(Noisy(), x[:6], y[:6], threat="Linf:0.2")
    assert verdict.track == "randomized"
    assert "randomized" in verdict.flags
    assert verdict.autoattack_acc is not None
    assert verdict.robust_acc is not None
    assert verdict.robust_acc <= 0.2


def test_solve_gradients_are_refused_where_there_is_no_solve(linear: Linear) -> None:
    from robustdeq.equilibrium import Phantom
    from robustdeq.errors import UsageError

    with pytest.raises(UsageError, match="has none; use 'honest'"):
        Target(linear, 4).through(Phantom(3))
    assert Target(ToyEquilibrium(), 4).through(Phantom(3)).iterates


def test_the_git_package_is_driven_where_it_is_what_is_installed(
    linear: Linear, linear_data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`autoattack` from git names its parts alike; its constructor takes other arguments."""
    made: list[dict[str, Any]] = []

    class Git:
        def __new__(
            cls, model: nn.Module, norm: str = "Linf", eps: float = 0.3, seed: int | None = None,
            verbose: bool = True, attacks_to_run: Any = (), version: str = "standard",
            is_tf_model: bool = False, device: str = "cuda", log_path: str | None = None,
        ) -> Any:  # fmt: skip
            made.append({"verbose": verbose, "device": device})
            return Reference(model, norm=norm, eps=eps, seed=seed, version=version, device=device)

    threat = Threat.parse("Linf:0.008")
    expected = run("autoattack", linear, *linear_data, threat)
    module = types.ModuleType("autoattack")
    module.AutoAttack = Git
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setitem(sys.modules, "autoattack", module)
    assert torch.equal(run("autoattack", linear, *linear_data, threat), expected)
    assert made == [{"verbose": False, "device": "cpu"}]
