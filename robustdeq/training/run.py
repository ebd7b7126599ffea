"""`robustdeq train`: from a defense and a recipe to a weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robustdeq.datasets import load_slice
from robustdeq.errors import CaseError, UsageError
from robustdeq.evaluation.provenance import versions
from robustdeq.keys import canonical, file_sha256
from robustdeq.registry import load, parameters_of
from robustdeq.suite import DefenseEntry, Suite, expand
from robustdeq.threats import Threat
from robustdeq.training.loop import Progress, train
from robustdeq.weights import WeightsInfo, read_info, save_weights


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training: everything that decides its weights."""

    defense: str
    parameters: Mapping[str, Any]
    dataset: str
    recipe: str
    recipe_parameters: Mapping[str, Any]
    threat: str
    seed: int
    out: Path


@dataclass(frozen=True)
class Trained:
    """What a job left: its file, the file's SHA-256, and whether the training was completed."""

    path: Path
    sha256: str
    complete: bool


def jobs_of(suite: Suite, folder: Path) -> list[Job]:
    """The trainings that a suite's weights come from, one per weights file."""
    jobs: dict[str, Job] = {}
    for case in expand(suite):
        entry = case.entry
        if entry.training is not None and entry.weights:
            jobs[entry.weights] = _job(entry, case.dataset.name, str(case.threat), folder)
    return list(jobs.values())


def _job(entry: DefenseEntry, dataset: str, threat: str, folder: Path) -> Job:
    training = entry.training
    assert training is not None
    return Job(
        defense=entry.defense,
        parameters=entry.parameters,
        dataset=dataset,
        recipe=training.recipe,
        recipe_parameters=training.parameters,
        threat=training.threat or threat,
        seed=training.seed,
        out=folder / Path(entry.weights).name,
    )


def run_job(
    job: Job,
    *,
    device: torch.device,
    minutes: float | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Train and save; with `minutes`, resumable from a checkpoint beside the weights.

    Raises:
        UsageError: for unknown names or missing data.
        CaseError: if training diverges.
    """
    if job.out.suffix != ".safetensors":
        raise UsageError(
            f"weights are written as .safetensors; --out {job.out} names another kind."
        )
    defense = load("defense", job.defense, job.parameters)
    recipe = load("recipe", job.recipe, job.recipe_parameters)
    info = WeightsInfo(
        defense=job.defense,
        parameters=canonical(parameters_of(defense)),
        dataset=job.dataset,
        recipe=job.recipe,
        recipe_parameters=canonical(parameters_of(recipe)),
        threat=job.threat if recipe.adversarial else "",
        seed=job.seed,
        complete=True,
        environment={**versions(), "device": device.type},
    )
    if minutes is not None and _is_done(job.out, info):
        return Trained(job.out, file_sha256(job.out), complete=True)
    data = load_slice(job.dataset, "train")
    job.out.parent.mkdir(parents=True, exist_ok=True)
    model, complete = train(
        defense,
        recipe,
        data,
        Threat.parse(job.threat),
        seed=job.seed,
        device=device,
        minutes=minutes,
        checkpoint=job.out.with_suffix(".checkpoint") if minutes is not None else None,
        report=report,
    )
    info = replace(info, complete=complete)
    return Trained(job.out, save_weights(model, info, job.out), complete)


def _is_done(path: Path, info: WeightsInfo) -> bool:
    """Whether a file holds these very weights already, complete, from whichever environment."""
    try:
        return replace(read_info(path), environment=info.environment) == info
    except CaseError:
        return False
