"""From a case to the model that is attacked, with its identity and its data."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustdeq.datasets import Slice, SliceIdentity
from robustdeq.errors import CaseError, RobustDEQError, UsageError, sentence
from robustdeq.evaluation.chain import INCOMPLETE, Chunk, Subject
from robustdeq.evaluation.integrity import intact
from robustdeq.evaluation.judge import seeded
from robustdeq.evaluation.provenance import source_digest
from robustdeq.interfaces import trained_form
from robustdeq.keys import canonical, digest, file_sha256
from robustdeq.plugin_files import public_name, reference
from robustdeq.randomness import derived_seed
from robustdeq.records import FORMAT
from robustdeq.registry import load, parameters_of
from robustdeq.suite import Case, DefenseEntry, Suite
from robustdeq.weights import (
    WeightsInfo,
    check_matches,
    load_weights,
    read_info,
    state_sha256,
    verify_sha256,
)

WEIGHTS_VARIABLE = "ROBUSTDEQ_WEIGHTS"


@dataclass(frozen=True)
class Source:
    """Where the weights of a suite may be, in the order of looking."""

    folders: tuple[Path, ...]

    def find(self, name: str) -> Path:
        """The file of that name.

        Raises:
            CaseError: if no folder holds it.
        """
        given = Path(name)
        if given.is_absolute():
            return given
        for folder in self.folders:
            if (folder / given).is_file():
                return folder / given
        looked = ", ".join(str(folder) for folder in self.folders)
        raise CaseError(
            f"weights {name} were not found in {looked}; train them with "
            "'robustdeq train --suite SUITE --out DIR' and name DIR with --weights."
        )


def weights_source(suite: Suite, folder: Path | None) -> Source:
    """--weights, the suite's own folder, $ROBUSTDEQ_WEIGHTS, and what ships with the package.

    Last, the folders of weights that rows name by their whole path: their names alone are kept.
    """
    named = os.environ.get(WEIGHTS_VARIABLE)
    packaged = Path(str(resources.files("robustdeq.zoo")))
    places = (folder, suite.folder, Path(named) if named else None, packaged)
    whole = [Path(entry.weights) for entry in suite.defenses]
    own = dict.fromkeys(path.parent for path in whole if path.is_absolute())
    return Source((*(place for place in places if place is not None), *own))


def build_subject(
    case: Case, data: SliceIdentity, source: Source, device: torch.device, batch_size: int | None
) -> Subject:
    """Build a case's model with its weights.

    Raises:
        CaseError: if weights are missing, corrupt or belong to something else, or the plugin fails.
        UsageError: if the plugin or its parameters are not known.
    """
    entry = case.entry
    defense = load("defense", entry.defense, entry.parameters)
    name = public_name("defense", entry.defense)
    path = source.find(entry.weights) if entry.weights else None
    complete = True
    if path is not None:
        verify_sha256(path, entry.sha256)
        info = _resolved(read_info(path), entry)
        check_matches(info, _expected(case), path)
        complete = info.complete
    try:
        with seeded(derived_seed(case.seed, "build"), device), intact(f"defense {name!r}"):
            model = defense.build(data.spec, device)
    except RobustDEQError:
        raise
    except Exception as cause:
        raise CaseError(f"defense {name!r} cannot be built: {sentence(cause)}") from cause
    if path is not None:
        load_weights(model, path)
        # The file's weights are final; without this, FAB's backward passes fill their gradients.
        model.requires_grad_(False)
    described = {
        "format": FORMAT,
        "id": entry.id,
        "defense": name,
        "parameters": canonical(parameters_of(defense)),
        "source": source_digest(defense),
        "weights_sha256": state_sha256(model) if path is None else file_sha256(path),
        "dataset": data.spec.name,
        "classes": data.spec.classes,
        "split": data.split,
        "n": data.n,
        "digest": data.digest,
        "threat": str(case.threat),
        "seed": case.seed,
        "chunk": case.chunk,
        **_siblings(case),
    }
    if not complete:
        described["training"] = INCOMPLETE
    return Subject(
        model,
        data.spec.classes,
        case.threat,
        described,
        digest(described),
        case.seed,
        device,
        batch_size,
    )


def _expected(case: Case) -> dict[str, Any]:
    """What the suite says of a row's weights, as far as their metadata say it too."""
    entry = case.entry
    defense = trained_form(load("defense", entry.defense, entry.parameters))
    expected: dict[str, Any] = {
        "defense": public_name("defense", entry.defense),
        "parameters": parameters_of(defense),
        "dataset": case.dataset.name,
    }
    if entry.training is not None:
        recipe = load("recipe", entry.training.recipe, entry.training.parameters)
        threat = entry.training.threat or str(case.threat)
        expected |= {
            "recipe": public_name("recipe", entry.training.recipe),
            "recipe_parameters": parameters_of(recipe),
            "threat": threat if recipe.adversarial else "",
            "seed": entry.training.seed,
            "validation": entry.training.validation,
            "augmentation": entry.training.augmentation,
        }
    return canonical(expected)  # type: ignore[no-any-return]


def _siblings(case: Case) -> dict[str, Any]:
    """What rows have in common that differ in the seed of their training alone, and that seed."""
    entry = case.entry
    if entry.training is None:
        return {}
    told = _expected(case)
    told.pop("seed")
    own = canonical(parameters_of(load("defense", entry.defense, entry.parameters)))
    return {
        "family": digest([told, own, case.dataset.name])[:12],
        "training_seed": entry.training.seed,
    }


def _resolved(info: WeightsInfo, entry: DefenseEntry) -> WeightsInfo:
    """Metadata with the defaults of parameters that are younger than the file."""
    # The metadata may be a stranger's: code is taken from where the row says, never from there.
    own = entry.defense if public_name("defense", entry.defense) == info.defense else info.defense
    if reference(info.defense) is not None or reference(info.recipe) is not None:
        return info
    try:
        defense = parameters_of(load("defense", own, info.parameters))
        # Converted weights know no recipe.
        recipe = {}
        if info.recipe:
            recipe = parameters_of(load("recipe", info.recipe, info.recipe_parameters))
    except UsageError:
        return info  # of a plugin that is not there: the comparison names what differs
    return replace(info, parameters=defense, recipe_parameters=recipe)


def chunk_count(n: int, size: int) -> int:
    """How many chunks `n` samples make."""
    return -(-n // size)


def chunk_slice(data: Slice, number: int, size: int) -> Slice:
    """The samples of one chunk; membership depends on the suite's chunk size alone."""
    return data.take(slice(number * size, (number + 1) * size))


def chunk_of(part: Slice, number: int, device: torch.device) -> Chunk:
    """One chunk's samples as tensors in [0, 1] on a device."""
    x = torch.from_numpy(np.ascontiguousarray(part.images)).to(device).float() / 255.0
    y = torch.from_numpy(part.labels.copy()).to(device)
    return Chunk(number, x, y, tuple(int(i) for i in part.indices))


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" is the GPU where there is one.

    Raises:
        UsageError: if the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as cause:
        raise UsageError(f"device {name!r} is not available here; use cpu or auto.") from cause
    return device


def described_case(case: Case, n: int) -> dict[str, Any]:
    """What a row says where its model could not even be built."""
    return {
        "id": case.entry.id,
        "defense": public_name("defense", case.entry.defense),
        "dataset": case.dataset.name,
        "threat": str(case.threat),
        "n": n,
        "weights_sha256": case.entry.sha256,
    }
