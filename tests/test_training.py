from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import load_slice
from robustdeq.equilibrium import EquilibriumClassifier
from robustdeq.errors import CaseError, UsageError
from robustdeq.registry import load
from robustdeq.suite import find_suite, suite_names
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training._inner import Ascent, random_start, warmed
from robustdeq.training.augmentation import SHIFT, augmented
from robustdeq.training.loop import train
from robustdeq.training.run import Job, jobs_of, run_job
from robustdeq.training.selection import held_out
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
    tmp_path.joinpath("w.checkpoint").unlink()
    long: dict[str, Any] = {"epochs": 50}
    assert not run_job(job(tmp_path, recipe_parameters=long), device=CPU, minutes=0.002).complete
    for other in ({"epochs": 51}, {"epochs": 50, "beta": 1.0}):
        name = "trades" if "beta" in other else "pgd_at"
        with pytest.raises(CaseError, match="another training"):
            run_job(job(tmp_path, recipe=name, recipe_parameters=other), device=CPU)


KILLED = """
import sys
from pathlib import Path
import torch
from robustdeq.training import checkpoint
from robustdeq.training.run import Job, run_job

checkpoint.SECONDS = 0.2
torch.set_num_threads(1)
job = Job(
    defense="joint_optimization", parameters={"width": 16, "inner": 16}, dataset="digits",
    recipe="joint", recipe_parameters={"epochs": 12, "steps": 4, "memory": 2}, threat="Linf:0.1",
    seed=0, out=Path(sys.argv[1]) / "w.safetensors", validation=50,
)
run_job(job, device=torch.device("cpu"))
"""


def test_kill_9_in_mid_training_changes_no_weight(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def start(folder: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / folder)])

    killed = start("parts")
    checkpoint = tmp_path / "parts" / "w.checkpoint"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "parts" / "w.safetensors").exists()
    for folder in ("parts", "whole"):
        assert start(folder).wait(timeout=300) == 0
    for name in ("w.safetensors", "w.log.csv"):
        parts, whole = (tmp_path / folder / name for folder in ("parts", "whole"))
        assert parts.read_bytes() == whole.read_bytes()
    assert not checkpoint.exists()


def test_a_training_leaves_a_log_and_its_curves(tmp_path: Path) -> None:
    run_job(job(tmp_path, validation=100), device=CPU)
    log = pd.read_csv(tmp_path / "w.log.csv")
    assert {"step", "loss", "learning_rate", "nfe_forward", "nfe_backward", "residual"} <= set(log)
    assert log["validation"].dropna().between(0, 1).all()
    # Two inner steps and one outer, each of at most 200 steps and one evaluation for the adjoint.
    assert log["nfe_forward"].dropna().between(3, 603).all()
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    assert read_info(tmp_path / "w.safetensors").validation == 100


def test_the_weights_that_do_best_on_held_out_images_are_kept(tmp_path: Path) -> None:
    """A learning rate that never comes down: the last weights are seldom the best."""
    data = load_slice("digits", "train")
    recipe = load("recipe", "clean", {"epochs": 8, "learning_rate": 0.3, "batch_size": 32})
    settings: dict[str, Any] = {"seed": 3, "device": CPU, "validation": 200}
    defense = load("defense", "feedforward", {"width": 8, "inner": 8})
    trained = train(defense, recipe, data, THREAT, **settings)
    scores = {row["step"]: row["validation"] for row in trained.log if "validation" in row}
    assert scores[trained.selected] == max(scores.values())
    _, look = held_out(data, 200, 3)
    x, y = torch.from_numpy(look.images).float() / 255, torch.from_numpy(look.labels)
    accuracy = float((trained.model(x).argmax(1) == y).float().mean())
    assert accuracy == pytest.approx(max(scores.values()))


@given(count=st.integers(0, 49), seed=st.integers(0, 100))
def test_held_out_images_are_a_part_of_the_split(count: int, seed: int) -> None:
    data = load_slice("digits", "train").take(slice(50))
    kept, look = held_out(data, count, seed)
    assert len(look) == count
    assert sorted([*kept.indices, *look.indices]) == sorted(data.indices)
    with pytest.raises(UsageError, match="--validation"):
        held_out(data, 50, seed)


def test_reduced_precision_trains_and_is_written_down(tmp_path: Path) -> None:
    fast = {"epochs": 4, "steps": 1, "gradient": "phantom(2,1)", "solver_steps": 3}
    reduced = run_job(job(tmp_path, recipe_parameters=fast), device=CPU, precision="bfloat16")
    assert read_info(reduced.path).environment["precision"] == "bfloat16"
    full = run_job(job(tmp_path / "full", recipe_parameters=fast), device=CPU)
    states = [load_file(t.path) for t in (reduced, full)]
    assert all(v.dtype == torch.float32 for v in states[0].values())
    gaps = [float((a - b).abs().max()) for a, b in zip(*[s.values() for s in states], strict=True)]
    assert 0 < max(gaps) < 0.2


@pytest.mark.parametrize("name", suite_names())
def test_no_shipped_suite_contradicts_itself(name: str, tmp_path: Path) -> None:
    suite = find_suite(name)
    jobs = jobs_of(suite, tmp_path)
    assert {job.out.name for job in jobs} == {e.weights for e in suite.defenses if e.training}


def test_rows_that_disagree_on_a_file_are_refused(tmp_path: Path) -> None:
    suite = find_suite("digits")
    first = suite.defenses[0]
    other = replace(first, id="Other", parameters={"width": 48, "inner": 96})
    with pytest.raises(UsageError, match="its own file"):
        jobs_of(replace(suite, defenses=(first, other)), tmp_path)


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
        return F.cross_entropy(logits, y, reduction="none")

    found = Ascent(5, 0.25)(target, x, THREAT, loss, start).x
    assert not any(THREAT.violations(x, found))
    with torch.no_grad():
        assert float(loss(model(found)).sum()) > float(loss(model(start)).sum()) > 0
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
    if entry.defense not in ("feedforward", "wide_resnet")
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
    assert len({j.out for j in jobs}) == len(jobs) == 14
    assert {"clean", "pgd_at", "trades", "joint", "random_states"} <= {j.recipe for j in jobs}


@given(seed=st.integers(0, 50), size=st.integers(5, 12))
def test_augmentation_shifts_and_mirrors_whole_images(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, size, size, generator=generator) + 0.1
    moved = augmented(x, "shift_flip", torch.Generator().manual_seed(seed))
    assert torch.equal(moved, augmented(x, "shift_flip", torch.Generator().manual_seed(seed)))
    padded = F.pad(x, (SHIFT,) * 4)
    for image, whole in zip(moved, padded, strict=True):
        views = [
            whole[:, i : i + size, j : j + size]
            for i in range(2 * SHIFT + 1)
            for j in range(2 * SHIFT + 1)
        ]
        assert any(torch.equal(image, v) or torch.equal(image, v.flip(2)) for v in views)
    assert augmented(x, "none", generator) is x
