from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import load_slice
from robustdeq.equilibrium import EquilibriumClassifier
from robustdeq.errors import CaseError, UsageError
from robustdeq.registry import load
from robustdeq.suite import find_suite
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training._inner import maximized, random_start, warmed
from robustdeq.training.loop import train
from robustdeq.training.run import Job, jobs_of, run_job
from robustdeq.weights import read_info

CPU = torch.device("cpu")
THREAT = Threat.parse("Linf:3/16")


def job(folder: Path, **changes: Any) -> Job:
    settings: dict[str, Any] = {
        "defense": "deq",
        "parameters": {"width": 16, "inner": 16},
        "dataset": "digits",
        "recipe": "pgd_at",
        "recipe_parameters": {"epochs": 2, "steps": 2},
        "threat": "Linf:3/16",
        "seed": 0,
        "out": folder / "w.safetensors",
    }
    return Job(**(settings | changes))


@pytest.mark.parametrize("recipe", ["clean", "pgd_at", "trades"])
@pytest.mark.parametrize("defense", ["deq", "feedforward", "weight_tied"])
def test_every_recipe_trains_every_defense(defense: str, recipe: str) -> None:
    data = load_slice("digits", "train").take(slice(512))
    plugin = load("defense", defense, {"width": 32, "inner": 32})
    fast: dict[str, Any] = {"epochs": 12, "learning_rate": 1e-2} | (
        {} if recipe == "clean" else {"steps": 2}
    )
    if defense == "deq":
        fast |= {"gradient": "phantom(2,1)", "solver_steps": 3}
    threat = Threat.parse("Linf:0.05")
    model, complete, *_ = train(
        plugin, load("recipe", recipe, fast), data, threat, seed=0, device=CPU
    )
    assert complete
    assert not model.training
    test = load_slice("digits", "test")
    x, y = torch.from_numpy(test.images).float() / 255, torch.from_numpy(test.labels)
    assert float((model(x).argmax(1) == y).float().mean()) > 0.7


def test_one_seed_gives_one_file(tmp_path: Path) -> None:
    first = run_job(job(tmp_path / "a"), device=CPU)
    assert first.sha256 == run_job(job(tmp_path / "b"), device=CPU).sha256
    assert first.sha256 != run_job(job(tmp_path / "c", seed=1), device=CPU).sha256
    info = read_info(first.path)
    assert (info.defense, info.threat, info.complete) == ("deq", "Linf:3/16", True)
    assert info.parameters["solver"] == "fixed_point"


def test_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    long = {"epochs": 8, "steps": 2}
    whole = run_job(job(tmp_path / "a", recipe_parameters=long), device=CPU)
    parts = job(tmp_path / "b", recipe_parameters=long)
    stops = 0
    while not (part := run_job(parts, device=CPU, minutes=0.005)).complete:
        assert not read_info(part.path).complete
        stops += 1
    assert stops > 1
    assert part.sha256 == whole.sha256
    assert not parts.out.with_suffix(".checkpoint").exists()
    written = parts.out.stat().st_mtime_ns
    assert run_job(parts, device=CPU, minutes=1).sha256 == whole.sha256
    assert parts.out.stat().st_mtime_ns == written  # complete: not trained again


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("w.checkpoint").write_bytes(b"junk")
    with pytest.raises(CaseError, match="delete it"):
        run_job(job(tmp_path), device=CPU, minutes=1)


def test_divergence_is_one_sentence(tmp_path: Path) -> None:
    wild = {"epochs": 4, "steps": 1, "learning_rate": 1e30}
    with pytest.raises(CaseError, match="lower the learning rate"):
        run_job(job(tmp_path, recipe_parameters=wild), device=CPU)
    with pytest.raises(UsageError, match="another kind"):
        run_job(job(tmp_path, out=tmp_path / "w.pt"), device=CPU)


def test_the_inner_attack_stays_in_the_ball_and_raises_the_loss() -> None:
    data = load_slice("digits", "test", 50)
    x, y = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    model = load("defense", "feedforward", {}).build(data.spec, CPU)
    start = random_start(x, THREAT, torch.Generator().manual_seed(0))
    target = Target(model, 10)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y, reduction="sum")

    found = maximized(target, x, THREAT, loss, start, 5, 0.25)
    assert not any(THREAT.violations(x, found))
    with torch.no_grad():
        assert float(loss(model(found))) > float(loss(model(start))) > 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_radius_warms_up_to_its_full_value() -> None:
    radii = [warmed(THREAT, p, 0.3).eps for p in (0.0, 0.15, 0.3, 1.0)]
    assert radii == sorted(radii)
    assert radii[0] > 0
    assert radii[1] == pytest.approx(THREAT.eps / 2, rel=0.01)
    assert radii[2:] == [THREAT.eps] * 2
    assert warmed(THREAT, 0.0, 0.0) == THREAT


def test_trained_cells_are_contractions() -> None:
    """For every shipped model with the shared cell: operator norms of at most 1."""
    import robustdeq

    for entry in find_suite("digits").defenses:
        if entry.defense in ("deq", "weight_tied"):
            model: Any = robustdeq.load_model(entry.id, dataset="digits")
            assert max(model.residual.norms()) <= 1 + 1e-4


SHIPPED = [
    (entry.id, suite)
    for suite in ("digits", "mnist")
    for entry in find_suite(suite).defenses
    if entry.defense in ("deq", "weight_tied")
]


@pytest.mark.parametrize(("model_id", "dataset"), SHIPPED)
def test_shipped_equilibrium_models_predict_alone_as_in_a_batch(
    model_id: str, dataset: str
) -> None:
    """DESIGN's rule 2: batch of 1 against 128, permuted companions, in float64 and float32."""
    import robustdeq

    model = robustdeq.load_model(model_id, dataset=dataset)
    assert isinstance(model, EquilibriumClassifier)
    side = 8 if dataset == "digits" else 28
    generator = torch.Generator().manual_seed(0)
    if dataset == "digits":
        data = load_slice("digits", "test", 128)
        x = torch.from_numpy(data.images).float() / 255
    else:
        x = torch.rand(128, 1, side, side, generator=generator)
    order = torch.randperm(128, generator=generator)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = model.to(dtype)
        with torch.no_grad():
            together = model(x.to(dtype))
            alone = torch.cat([model(x[k : k + 1].to(dtype)) for k in range(0, 128, 4)])
            permuted = model(x[order].to(dtype))
        scale = together.abs().amax(1) if dtype == torch.float32 else torch.ones(128)
        for moved, rows in ((alone, slice(None, None, 4)), (permuted, order)):
            gap = (moved - together[rows]).abs().amax(1)
            assert bool((gap <= tolerance * scale[rows]).all())
            top = together[rows].topk(2, dim=1).values
            clear = top[:, 0] - top[:, 1] > tolerance * scale[rows]
            same = moved.argmax(1) == together[rows].argmax(1)
            assert bool(same[clear].all())


def test_a_suites_trainings_are_one_per_file(tmp_path: Path) -> None:
    jobs = jobs_of(find_suite("digits"), tmp_path)
    assert len({j.out for j in jobs}) == len(jobs) == 9
    assert {j.recipe for j in jobs} == {"clean", "pgd_at", "trades"}
