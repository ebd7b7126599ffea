"""`robustdeq train`: from a defense and a recipe to a weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from robustdeq.datasets import load_slice
from robustdeq.errors import CaseError, UsageError
from robustdeq.evaluation.provenance import source_digest, training_digest, versions
from robustdeq.files import make_folder
from robustdeq.interfaces import Defense, Recipe, option, trained_form
from robustdeq.keys import canonical, digest, file_sha256
from robustdeq.plugin_files import public_name
from robustdeq.registry import BUILT_IN, load, parameters_of, plugin_class, provider
from robustdeq.suite import Augmentation, DefenseEntry, Suite, expand
from robustdeq.threats import Threat
from robustdeq.training._fields import Precision
from robustdeq.training.checkpoint import Checkpoint
from robustdeq.training.history import write_curve, write_log
from robustdeq.training.loop import Progress, train
from robustdeq.weights import WeightsInfo, read_info, save_weights


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training: everything that decides its weights, and where they go.

    `defense` and `recipe` are registered names, or whole paths of files with the class.
    `validation` is the number of training images held out to choose the weights by.
    """

    defense: str
    parameters: Mapping[str, Any]
    dataset: str
    recipe: str
    recipe_parameters: Mapping[str, Any]
    threat: str
    seed: int
    out: Path
    validation: int = 0
    augmentation: Augmentation = "none"

    @property
    def title(self) -> str:
        """Recipe and defense, without their places."""
        return f"{public_name('recipe', self.recipe)} {public_name('defense', self.defense)}"


@dataclass(frozen=True)
class Trained:
    """What a job left: its file, the file's SHA-256, and whether the training was completed."""

    path: Path
    sha256: str
    complete: bool


def jobs_of(suite: Suite, folder: Path) -> list[Job]:
    """The trainings that a suite's weights come from, one per weights file.

    Raises:
        UsageError: if two rows say of one file that it was trained differently.
    """
    jobs: dict[str, Job] = {}
    for case in expand(suite):
        entry = case.entry
        if entry.training is None or not entry.weights:
            continue
        job = _job(entry, case.dataset.name, str(case.threat), folder)
        if jobs.setdefault(entry.weights, job) != job:
            raise UsageError(
                f"rows of suite {suite.name} say of weights {entry.weights} that they were trained "
                f"in different ways (row {entry.id} is one); give each training its own file, and "
                "name the training threat where rows have several."
            )
    return list(jobs.values())


def _job(entry: DefenseEntry, dataset: str, threat: str, folder: Path) -> Job:
    training = entry.training
    assert training is not None
    recipe = load("recipe", training.recipe, training.parameters)
    # Clean training knows no threat; its one file serves rows of several.
    threat = training.threat or threat if recipe.adversarial else "Linf:0"
    return Job(
        defense=entry.defense,
        parameters=parameters_of(trained_form(load("defense", entry.defense, entry.parameters))),
        dataset=dataset,
        recipe=training.recipe,
        recipe_parameters=training.parameters,
        threat=threat,
        seed=training.seed,
        out=folder / Path(entry.weights).name,
        validation=training.validation,
        augmentation=training.augmentation,
    )


def suited(defense: Defense, recipe: str) -> dict[str, Any]:
    """The parameters that a defense suggests for training, those that the recipe has."""
    known = {field.name for field in fields(plugin_class("recipe", recipe))}
    suggested: Mapping[str, Any] = option(defense, "suited", {})
    return {name: value for name, value in suggested.items() if name in known}


def run_job(
    job: Job,
    *,
    device: torch.device,
    precision: Precision = "float32",
    minutes: float | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Train and save: the weights, a log (.log.csv) and its curves (.png) beside them.

    A training that was killed or ran out of `minutes` left a checkpoint beside its file; the same
    job goes on from there. One that is complete is not done again.

    Raises:
        UsageError: for unknown names or missing data.
        CaseError: if training diverges, or the checkpoint is another job's.
    """
    if job.out.suffix != ".safetensors":
        raise UsageError(
            f"weights are written as .safetensors; --out {job.out} names another kind."
        )
    defense = trained_form(load("defense", job.defense, job.parameters))
    recipe = load("recipe", job.recipe, job.recipe_parameters)
    info = _info(job, defense, recipe, device, precision)
    if _is_done(job.out, info):
        return Trained(job.out, file_sha256(job.out), complete=True)
    data = load_slice(job.dataset, "train")
    make_folder(job.out.parent)
    sources = [source_digest(defense), source_digest(recipe), training_digest()]
    identity = digest([asdict(info), data.digest, sources])
    trained = train(
        defense,
        recipe,
        data,
        Threat.parse(job.threat),
        seed=job.seed,
        device=device,
        validation=job.validation,
        augmentation=job.augmentation,
        precision=precision,
        minutes=minutes,
        checkpoint=Checkpoint(job.out.with_suffix(".checkpoint"), identity),
        report=report,
    )
    title = f"{job.title}, {job.dataset}, {job.threat}, seed {job.seed}"
    write_log(trained.log, job.out.with_suffix(".log.csv"))
    write_curve(trained.log, job.out.with_suffix(".png"), title)
    info = replace(info, complete=trained.complete)
    return Trained(job.out, save_weights(trained.model, info, job.out), trained.complete)


def _info(
    job: Job, defense: Defense, recipe: Recipe, device: torch.device, precision: Precision
) -> WeightsInfo:
    environment = {**versions(), "device": device.type}
    if precision != "float32":
        environment["precision"] = precision
    if any(
        p.distribution != BUILT_IN
        for p in (provider("defense", job.defense), provider("recipe", job.recipe))
    ):
        # Code that is being written changes between two trainings of one name.
        environment["source"] = digest([source_digest(defense), source_digest(recipe)])
    return WeightsInfo(
        defense=public_name("defense", job.defense),
        parameters=canonical(parameters_of(defense)),
        dataset=job.dataset,
        recipe=public_name("recipe", job.recipe),
        recipe_parameters=canonical(parameters_of(recipe)),
        threat=job.threat if recipe.adversarial else "",
        seed=job.seed,
        complete=True,
        environment=environment,
        validation=job.validation,
        augmentation=job.augmentation,
    )


def _is_done(path: Path, info: WeightsInfo) -> bool:
    """Whether a file holds these very weights already, complete, from whichever environment."""
    try:
        held = read_info(path)
    except CaseError:
        return False
    same_code = held.environment.get("source") == info.environment.get("source")
    return same_code and replace(held, environment=info.environment) == info
