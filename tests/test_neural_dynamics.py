"""Entropy reduction at inference, its controls, and random intermediate states in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from toys import Linear

import robustdeq
from robustdeq.datasets import load_slice, spec_of
from robustdeq.equilibrium import EquilibriumClassifier, metered
from robustdeq.errors import UsageError
from robustdeq.interfaces import trained_form
from robustdeq.registry import load
from robustdeq.running.run import Options, run_suite
from robustdeq.suite import parse_suite
from robustdeq.targets import Output, Target
from robustdeq.threats import Threat
from robustdeq.training.run import jobs_of, run_job
from robustdeq.training.task import training_view
from robustdeq.weights import read_info

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"width": 16, "inner": 16, "gain": 0.8}
FORMS: list[dict[str, Any]] = [
    {},
    {"regulation": "entropy"},
    {"regulation": "random_sign"},
    {"output": "ensemble"},
    {"output": "early", "early_steps": 2},
    {"regulation": "entropy", "solver": "fixed_point"},
    {"output": "ensemble", "solver": "anderson"},
]


def built(**parameters: Any) -> Any:
    torch.manual_seed(0)
    return load("defense", "neural_dynamics", {**SMALL, **parameters}).build(spec_of("digits"), CPU)


def images(count: int = 16) -> Tensor:
    return torch.from_numpy(load_slice("digits", "test", count).images).float() / 255


@pytest.mark.parametrize("form", FORMS)
def test_no_form_depends_on_grad_mode_or_batch_companions(form: dict[str, Any]) -> None:
    model, x = built(**form).double(), images().double()
    with torch.no_grad():
        plain = model(x)
        alone = torch.cat([model(x[k : k + 1]) for k in range(len(x))])
    with torch.inference_mode():
        inferred = model(x)
    logits = model(x.clone().requires_grad_())
    assert torch.equal(plain, inferred)
    assert torch.equal(plain, logits.detach())
    torch.testing.assert_close(alone, plain, rtol=0, atol=1e-9)
    assert logits.requires_grad


def entropy(model: Any, z: Tensor, x: Tensor) -> Tensor:
    log_p = F.log_softmax(model.readout(model.cell(z, model.embed(x), 0)), 1)
    return -(log_p.exp() * log_p).sum(1)


def test_purification_lowers_the_entropy_and_stays_near_the_received_image() -> None:
    model, x = built(regulation="entropy", input_radius=0.05, input_size=0.01), images()
    z = model.start(model.embed(x))
    with torch.no_grad():
        moved = model._purified(x, x, z, 0)
        before, after = entropy(model, z, x), entropy(model, z, moved)
    assert float((moved - x).abs().max()) <= 0.05 + 1e-6
    assert float(moved.min()) >= 0.0
    assert float(moved.max()) <= 1.0
    assert bool((after < before).all())
    control = built(regulation="random_sign", input_radius=0.05, input_size=0.01)
    with torch.no_grad():
        drifted = entropy(control, z, control._purified(x, x, z, 0))
    assert float((after - drifted).mean()) < 0


def test_the_control_costs_what_the_purifier_costs() -> None:
    counts = []
    for regulation in ("entropy", "random_sign"):
        model = built(regulation=regulation, tolerance=0.0)
        with metered() as meter, torch.no_grad():
            model(images())
        counts.append((meter.forward, meter.backward))
    assert counts[0] == counts[1]
    # Eight solver steps, and ten moves after each of the first three rounds.
    assert counts[0] == ((8 + 30) * 16, 30 * 16)


def test_an_attack_passes_through_the_purifier_as_through_an_identity() -> None:
    """x' is not detached: the gradient is that of the last round at x', where nothing clips."""
    model, x = built(regulation="entropy", tolerance=0.0), 0.3 + 0.4 * images()
    leaf = x.clone().requires_grad_()
    (through,) = torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf)
    assert bool((through.flatten(1).norm(dim=1) > 0).all())

    received: list[Tensor] = []
    embed = model.embed

    def recorded(image: Tensor) -> Tensor:
        received.append(image)
        out: Tensor = embed(image)
        return out

    model.embed = recorded
    drive = model.drive()
    with torch.no_grad():
        model.predict(x, drive)
    purified = received[-1].detach().requires_grad_()
    model.embed = embed
    last = model.drive()(model.cell, model.embed(purified), start=drive.solves[-2].z, steps=2)
    (direct,) = torch.autograd.grad(model.readout(last.z).logsumexp(1).sum(), purified)
    unclipped = (purified - x).abs() < model.settings.input_radius - 1e-4
    torch.testing.assert_close(through[unclipped], direct[unclipped], rtol=1e-3, atol=1e-5)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="takes no regulation"):
        built(regulation="entropy", output="early")
    with pytest.raises(UsageError, match="shared out"):
        built(rounds=3)


@pytest.mark.parametrize(("base", "passes"), [("pgd_at", 4), ("trades", 6), ("clean", 1)])
def test_each_forward_pass_draws_its_own_length(
    monkeypatch: pytest.MonkeyPatch, base: str, passes: int
) -> None:
    model = built(tolerance=0.0)
    parameters: dict[str, Any] = {"gradient": "one_step"}
    if base != "clean":
        parameters |= {"steps": 3}
    recipe = load("recipe", "random_states", {"base": base, "parameters": parameters})
    target = training_view(model, recipe, spec_of("digits"))
    lengths: list[int] = []
    call = Target.__call__

    def recorded(self: Target, x: Tensor, warm: Any = ()) -> Output:
        out = call(self, x, warm)
        lengths.append(int(out.solves[0].steps.max()))
        return out

    monkeypatch.setattr(Target, "__call__", recorded)
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        recipe.loss(target, x, y, Threat.parse("Linf:0.1"), 1.0, generator)
    assert len(lengths) == 40 * passes
    assert set(lengths) == set(range(1, 9))
    share = lengths.count(3) / len(lengths)
    assert 0.02 < share < 0.3


def test_random_states_take_all_else_from_the_recipe_inside() -> None:
    recipe: Any = load(
        "recipe", "random_states", {"base": "trades", "parameters": {"epochs": 7, "beta": 2.0}}
    )
    assert (recipe.epochs, recipe.batch_size, recipe.adversarial) == (7, 128, True)
    assert recipe.parameters["beta"] == 2.0
    assert recipe.parameters["steps"] == 7  # defaults stand in the metadata too
    assert not load("recipe", "random_states", {"base": "clean"}).adversarial
    with pytest.raises(UsageError, match="did you mean 'trades'"):
        load("recipe", "random_states", {"base": "tradse"})
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="use trades"):
        recipe.loss(Target(Linear(), 4), x, y, Threat.parse("Linf:0.1"), 0.0, torch.Generator())


SUITE = """
name = "forms"
threats = ["Linf:1/16"]
chunk = 10
datasets = [{ name = "digits", samples = 10 }]
attacks = [{ attack = "pgd", parameters = { steps = 3 } }]
"""
ROW = """
[[defenses]]
id = "ID"
defense = "neural_dynamics"
parameters = { width = 16, inner = 16EXTRA }
weights = "w.safetensors"
training = { recipe = "random_states", parameters = { parameters = { epochs = 1, steps = 1 } } }
"""


def test_one_file_serves_all_forms_of_a_model(tmp_path: Path) -> None:
    text = SUITE
    for name, extra in (("a", ', regulation = "entropy"'), ("b", ', output = "early"'), ("c", "")):
        text += ROW.replace("ID", name).replace("EXTRA", extra)
    suite = parse_suite(text, "forms", tmp_path)
    (job,) = jobs_of(suite, tmp_path)
    trained = run_job(job, device=CPU)
    assert read_info(trained.path).parameters["regulation"] == "none"
    verdicts = run_suite(suite, Options(out=tmp_path / "out"))
    assert [v.status for v in verdicts] == ["ok"] * 3
    wrong = SUITE + ROW.replace("EXTRA", ", gain = 0.5").replace("ID", "d")
    (verdict,) = run_suite(parse_suite(wrong, "forms", tmp_path), Options(out=tmp_path / "wrong"))
    assert verdict.status == "failed"
    assert "gain" in verdict.note or "parameters" in verdict.note


def test_the_trained_form_has_the_same_weights() -> None:
    for form in FORMS:
        defense = load("defense", "neural_dynamics", {**SMALL, **form})
        plain = trained_form(defense).build(spec_of("digits"), CPU)
        model = defense.build(spec_of("digits"), CPU)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert isinstance(model, EquilibriumClassifier)
        assert trained_form(trained_form(defense)) == trained_form(defense)


def test_the_verdict_on_a_purified_model_runs_every_estimator() -> None:
    model, x = built(regulation="entropy"), images(6)
    y = model(x).argmax(1)
    from robustdeq.suite import AttackEntry

    entry = AttackEntry(
        attack="pgd", parameters={"steps": 2}, gradients=("honest", "phantom(2,0.5)", "unrolled(3)")
    )
    verdict = robustdeq.evaluate(model, x, y, threat="Linf:1/255", attacks=[entry])
    assert verdict.status == "ok"
    assert verdict.robust_acc is not None


def test_a_recipe_with_a_trainer_of_its_own_stands_in_no_other() -> None:
    for outer in ("random_states", "federated"):
        with pytest.raises(UsageError, match="trainer of its own"):
            load("recipe", outer, {"base": "federated"})
    around: Any = load("recipe", "federated", {"base": "random_states", "rounds": 3})
    assert around.parameters["base"] == "pgd_at"
    assert around.adversarial
