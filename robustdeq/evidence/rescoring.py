"""A bundle's row built again from its weights, and inputs scored by its judge."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robustdeq.datasets import Slice, Split, load_slice
from robustdeq.errors import CaseError, UsageError
from robustdeq.evaluation.chain import Subject
from robustdeq.evaluation.gate import is_randomized
from robustdeq.evaluation.judge import DRAWS, Judge, Judgment
from robustdeq.evaluation.subject import Source, build_subject, chunk_of, pick_device
from robustdeq.evidence.bundle import Bundle, BundleRow
from robustdeq.keys import canonical_json, digest
from robustdeq.plugin_files import PUBLIC
from robustdeq.registry import BUILT_IN, provider, registered
from robustdeq.shapes import Images, Labels
from robustdeq.suite import Case, DatasetEntry, DefenseEntry
from robustdeq.threats import Threat, Violation

BORDERLINE = 1e-4
"""Margin (top logit minus the label's, or the reverse) that another machine's rounding can turn."""
NOTHING_TO_BREAK = "the clean image is misclassified already: there was nothing to break"
_DECISIVE = (
    "defense", "parameters", "weights_sha256", "dataset", "classes", "split", "n", "digest",
    "threat",
)  # fmt: skip

Loader = Callable[[str, Split, int], Slice]


def installed(name: str, split: Split, samples: int) -> Slice:
    """The data set of that name on this machine; a path from a stranger's bundle is refused.

    Raises:
        UsageError: if the name is a path, or the data are not here.
    """
    if _is_path(name):
        raise UsageError(f"data set {name!r} is a path of the bundle's maker; name yours (--data).")
    return load_slice(name, split, samples)


@dataclass(frozen=True)
class DataAt:
    """As `installed`; data sets that are named by a path are taken from this one."""

    path: Path

    def __call__(self, name: str, split: Split, samples: int) -> Slice:
        """The data set of that name."""
        there = str(self.path.resolve()) if _is_path(name) else name
        return load_slice(there, split, samples)


def _is_path(name: str) -> bool:
    return bool({os.sep, "/"} & set(name)) or name.endswith(".parquet") or name.startswith(".")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How rows are scored again; none of it may change a figure.

    Attributes:
        batch_size: most rows in one forward pass; by default one that the row's chunk is no
            multiple of, so that figures which depend on the batch are found.
        weights: a folder with weights that the bundle does not hold.
        data: gives a data set by name.
        allow_plugins: whether code of other distributions, and of files, may be run.
        files: where plugins are that come from files, by the name that rows have for them.
    """

    batch_size: int | None = None
    device: str = "auto"
    weights: Path | None = None
    data: Loader = installed
    allow_plugins: bool = False
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """A row's model with its data; `places` says where a sample's index stands in `x`."""

    row: BundleRow
    subject: Subject
    judge: Judge
    x: Images
    y: Labels
    places: dict[int, int]
    notes: tuple[str, ...]

    @property
    def threat(self) -> Threat:
        """The threat of the row."""
        return self.subject.threat

    def judged(self, x: Images, places: Sequence[int]) -> Judgment:
        """The judge's word on inputs that stand for the samples at these places."""
        indices = [self.row.indices[place] for place in places]
        return self.judge(x, self.y[list(places)], indices)

    def correct(self, x: Images, places: Sequence[int]) -> list[bool]:
        """Whether each input is classified right."""
        return [bool(c) for c in self.judged(x, places).correct.tolist()] if len(places) else []

    def clean(self, places: Sequence[int]) -> Images:
        """The clean images at these places."""
        return self.x[list(places)]

    @torch.no_grad()
    def close(self, x: Images, places: Sequence[int]) -> list[bool]:
        """Whether each decision is so near to the other that rounding could have made it.

        For randomized models: whether one draw more or less would.
        """
        if not len(places):
            return []
        if self.row.randomized:
            votes = self.judged(x, places).votes
            return [bool(b) for b in ((votes - 0.5).abs() <= 1.0 / DRAWS).tolist()]
        y = self.y[list(places)][:, None]
        logits = self.judge.target(x).logits
        others = logits.scatter(1, y, -torch.inf).amax(1)
        near = (logits.gather(1, y).squeeze(1) - others).abs() < BORDERLINE
        return [bool(b) for b in near.tolist()]


@dataclass(frozen=True)
class Trial:
    """One input offered as an example: empty `why` if it breaks its sample, else what is wrong."""

    place: int
    why: str
    borderline: bool = False


def rebuild(bundle: Bundle, row: BundleRow, setting: Setting) -> Rebuilt:
    """Build a row's model from the bundle's weights, and load the data that are installed here.

    Raises:
        CaseError: if weights or data are not those that the row was computed with.
        UsageError: if the defense or the data are not here, or may not be run.
    """
    check_trust(row, setting)
    data = _data(row, setting)
    weights = bundle.weights(row, setting.weights)
    case = _case(row, weights, setting)
    size = setting.batch_size or odd_batch(min(case.chunk, len(data)))
    device = pick_device(setting.device)
    subject = build_subject(case, data.identity(), Source(()), device, size)
    _check_case(row, subject.case)
    subject.model.eval()
    whole = chunk_of(data, 0, device)
    judge = Judge(
        subject.model,
        subject.classes,
        scope=digest(row.case),
        randomized=row.randomized,
        batch_size=size,
    )
    if is_randomized(judge.target, whole.x[: case.chunk]) and not row.randomized:
        raise CaseError(f"{row.title}: its model is randomized, the bundle says that it is not.")
    places = {index: place for place, index in enumerate(row.indices)}
    return Rebuilt(row, subject, judge, whole.x, whole.y, places, _notes(row, subject.case))


def check_trust(row: BundleRow, setting: Setting) -> None:
    """Refuse what would run a stranger's code, or fetch weights from where the code says.

    Raises:
        UsageError: unless plugins are allowed.
    """
    name = row.case["defense"]
    # A bundle names files by their class alone, so that it cannot say which file is run.
    if name not in setting.files and name not in registered("defense"):
        raise UsageError(f"{row.title}: defense {name!r} {_whence(row)}")
    if setting.allow_plugins:
        return
    remedy = "allow it with --trust-plugins, or leave the row out (--rows)."
    if not is_built_in(row, setting):
        source = provider("defense", setting.files.get(name, name)).distribution
        raise UsageError(f"{row.title}: defense {name!r} is code of {source}; {remedy}")
    if row.weights is None:
        raise UsageError(f"{row.title}: defense {name!r} gets weights by itself; {remedy}")


def is_built_in(row: BundleRow, setting: Setting) -> bool:
    """Whether a row runs code of this distribution alone; nothing is imported to find out.

    Raises:
        UsageError: if its defense is not here.
    """
    name = row.case["defense"]
    return provider("defense", setting.files.get(name, name)).distribution == BUILT_IN


def _whence(row: BundleRow) -> str:
    """How to come by the code of a row."""
    if row.case["defense"].startswith(PUBLIC):
        told = f"is in a file; name your copy of {row.distribution or 'it'} (--plugin)"
    else:
        told = f"is not installed; install {row.distribution or 'its distribution'}"
    return f"{told}, or leave the row out (--rows)."


def odd_batch(chunk: int) -> int:
    """A batch size that a chunk is no multiple of, as 37 for 100."""
    return next((b for b in range(max(2, 3 * chunk // 8), chunk) if chunk % b), chunk + 1)


def trials(
    rebuilt: Rebuilt, x: Images, places: Sequence[int], right: Sequence[bool]
) -> list[Trial]:
    """Whether each input is admissible and misclassified while its clean image is right.

    Args:
        right: whether each of the clean images is classified right.
    """
    clean, threat = rebuilt.clean(places), rebuilt.threat
    violations, distance = threat.violations(clean, x), threat.distance(clean, x).tolist()
    valid = [k for k, violation in enumerate(violations) if violation is Violation.NONE]
    correct = [True] * len(places)
    for k, word in zip(valid, rebuilt.correct(x[valid], [places[k] for k in valid]), strict=True):
        correct[k] = word
    failing = [k for k in valid if right[k] and correct[k]]
    near = rebuilt.close(x[failing], [places[k] for k in failing])
    borderline = {k for k, close in zip(failing, near, strict=True) if close}
    whys = map(_why, violations, distance, right, correct, [threat.eps] * len(places))
    return [
        Trial(place, why, k in borderline)
        for k, (place, why) in enumerate(zip(places, whys, strict=True))
    ]


def _why(violation: Violation, distance: float, right: bool, correct: bool, eps: float) -> str:
    if violation is Violation.NONFINITE:
        return "the example has pixels that are not finite"
    if violation is Violation.BOX:
        return "the example has pixels outside of [0, 1]"
    if violation is Violation.BALL:
        return f"the example is outside of the ball: at {distance:.6g}, radius {eps:.6g}"
    if not right:
        return NOTHING_TO_BREAK
    if correct and distance == 0:
        return "the clean image is passed off as an adversarial one, and is classified right"
    return "the example is classified right" if correct else ""


def _data(row: BundleRow, setting: Setting) -> Slice:
    data = setting.data(row.data, row.case["split"], row.case["n"])
    if data.digest != row.case["digest"]:
        raise CaseError(
            f"{row.title}: the data set {row.data!r} that is installed here (digest "
            f"{data.digest[:12]}...) is not the one of the row ({row.case['digest'][:12]}...)."
        )
    if tuple(data.indices.tolist()) != row.indices or data.images.shape[1:] != row.shape:
        raise CaseError(f"{row.title}: the row's indices or image shape are not those of its data.")
    return data


def _case(row: BundleRow, weights: Path | None, setting: Setting) -> Case:
    claimed = row.case
    entry = DefenseEntry(
        id=claimed["id"],
        defense=setting.files.get(claimed["defense"], claimed["defense"]),
        parameters=claimed["parameters"],
        weights="" if weights is None else str(weights.resolve()),
        sha256=claimed["weights_sha256"] if weights is not None else "",
    )
    return Case(
        entry=entry,
        dataset=DatasetEntry(name=row.data, samples=claimed["n"]),
        threat=Threat.parse(claimed["threat"]),
        seed=claimed["seed"],
        chunk=claimed["chunk"],
    )


def _check_case(row: BundleRow, found: dict[str, Any]) -> None:
    # A parameter that is younger than the bundle stands at its default.
    parameters = {k: v for k, v in found["parameters"].items() if k in row.case["parameters"]}
    found = {**found, "parameters": parameters}
    for name in _DECISIVE:
        if canonical_json(found[name]) != canonical_json(row.case.get(name)):
            raise CaseError(
                f"{row.title}: built again, the row has {name} = {_short(found[name])}, but the "
                f"bundle says {_short(row.case.get(name))}."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _notes(row: BundleRow, found: dict[str, Any]) -> tuple[str, ...]:
    if row.case.get("source") == found["source"]:
        return ()
    return ("the defense's source is not the one that the row was computed with",)
