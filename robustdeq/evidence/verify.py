"""Scores a bundle's claims again, on this machine and on another batch size.

What it certifies is an upper bound: for each sample that counts as broken there is an admissible
input that these weights get wrong. That the other samples are robust no example can show; see
`robustdeq.evidence.reattack`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from robustdeq.errors import CaseError, UsageError, sentence
from robustdeq.evaluation.subject import pick_device
from robustdeq.evidence.bundle import Bundle, BundleRow, read_bundle
from robustdeq.evidence.confined import Limits, confined
from robustdeq.evidence.rescoring import (
    NOTHING_TO_BREAK,
    Rebuilt,
    Setting,
    check_trust,
    is_built_in,
    rebuild,
    trials,
)
from robustdeq.shapes import Images

_EXACT = 1e-9
CERTIFIES = (
    "Certified for rows that hold: an upper bound on the robust accuracy of these weights, since "
    "the examples exist. No lower bound: stronger attacks may find more."
)


@dataclass(frozen=True)
class Finding:
    """A claim that does not hold, or holds by a hair: of a sample, or of the row (`index` None)."""

    row: str
    index: int | None
    why: str

    def __str__(self) -> str:
        where = self.row if self.index is None else f"{self.row}, sample {self.index}"
        return f"{where}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """What scoring a row again gave; accuracies are None where that was not possible.

    Attributes:
        failures: claims that do not hold.
        borderline: decisions whose margin is below 1e-4 (one draw, for randomized models), which
            another machine's rounding can turn; they are no failures.
        notes: what else there is to know.
    """

    title: str
    clean_claimed: float | None
    robust_claimed: float | None
    clean_found: float | None = None
    robust_found: float | None = None
    batch_size: int | None = None
    failures: tuple[Finding, ...] = ()
    borderline: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome for a bundle; `skipped` are rows that claim nothing, with their status."""

    sha256: str
    rows: tuple[RowReport, ...]
    skipped: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Finding, ...]:
        """All claims that do not hold."""
        return tuple(finding for row in self.rows for finding in row.failures)

    @property
    def ok(self) -> bool:
        """Whether there was a claim, and every claim holds."""
        return bool(self.rows) and not self.failures


def verify_bundle(
    path: Path,
    *,
    rows: str | None = None,
    setting: Setting | None = None,
    limits: Limits | None = None,
) -> Report:
    """Check a bundle's files against their digests, and its claims by scoring them again.

    Args:
        path: the bundle's folder.
        rows: a regular expression; only rows in whose title it is found.
        limits: rows of code that is not built in are scored in a process of their own within
            these; by default in this one.

    Raises:
        UsageError: if the bundle cannot be read, or would run code that is not built in.
    """
    setting = setting or Setting()
    bundle = read_bundle(path)
    chosen = claims(bundle, rows, setting)
    skipped = [f"{r.title}: {r.status}, {r.note}" for r in selected(bundle, rows) if not _told(r)]
    reports = tuple(_verified(bundle, row, setting, limits) for row in chosen)
    return Report(sha256=bundle.sha256, rows=reports, skipped=tuple(skipped))


def _verified(bundle: Bundle, row: BundleRow, setting: Setting, limits: Limits | None) -> RowReport:
    if limits is None or is_built_in(row, setting):
        return verify_row(bundle, row, setting)
    try:
        job = {"bundle": str(bundle.folder.resolve()), "row": row.title, "setting": setting}
        return confined("verify", job, RowReport, limits)
    except CaseError as cause:
        return _unscored(row, cause)


def claims(bundle: Bundle, rows: str | None, setting: Setting) -> list[BundleRow]:
    """The chosen rows that claim something, after a look at what they would run, and where.

    Raises:
        UsageError: see `verify_bundle`.
    """
    if setting.batch_size is not None and setting.batch_size < 1:
        raise UsageError(f"--batch-size is {setting.batch_size}; give at least 1.")
    pick_device(setting.device)
    chosen = [row for row in selected(bundle, rows) if _told(row)]
    for row in chosen:
        check_trust(row, setting)
    return chosen


def selected(bundle: Bundle, rows: str | None) -> list[BundleRow]:
    """The rows in whose title a regular expression is found; all without one.

    Raises:
        UsageError: if it is none, or is found in no row.
    """
    try:
        found = [row for row in bundle.rows if re.search(rows or "", row.title)]
    except re.error as cause:
        raise UsageError(f"--rows {rows!r} is no regular expression ({cause}).") from cause
    if not found and rows is not None:
        titles = "; ".join(row.title for row in bundle.rows[:5])
        raise UsageError(f"--rows {rows!r} is found in no row of the bundle ({titles}...).")
    return found


def verify_row(bundle: Bundle, row: BundleRow, setting: Setting) -> RowReport:
    """Check one row; whatever keeps it from being scored is a failure of the row."""
    try:
        return RowCheck(bundle, row, setting).report
    except (Exception, SystemExit) as cause:  # a bundle from anywhere, and perhaps a plugin
        return _unscored(row, cause)


def _unscored(row: BundleRow, cause: BaseException) -> RowReport:
    return RowReport(
        title=row.title,
        clean_claimed=row.clean_acc,
        robust_claimed=row.robust_acc,
        failures=(Finding(row.title, None, f"cannot be scored again: {sentence(cause)}"),),
    )


def _told(row: BundleRow) -> bool:
    return row.status == "ok"


class RowCheck:
    """One row, scored again: first its clean images, then its examples.

    Attributes:
        right: whether each clean image is classified right.
        fallen: the example that breaks each sample, by the sample's place in the row.
        report: the outcome.

    Raises:
        CaseError: if files, weights or data are not those of the row.
        UsageError: see `rebuild`.
    """

    def __init__(self, bundle: Bundle, row: BundleRow, setting: Setting) -> None:
        self.row = row
        x, index = bundle.examples(row)
        self.rebuilt: Rebuilt = rebuild(bundle, row, setting)
        self.failures: list[Finding] = []
        self.borderline: list[Finding] = []
        self.right = self._clean()
        self.fallen = self._examples(torch.from_numpy(x), index.tolist())
        self.report = self._reported()

    def _reported(self) -> RowReport:
        n = len(self.right)
        robust = [r and place not in self.fallen for place, r in enumerate(self.right)]
        clean_found, robust_found = sum(self.right) / n, sum(robust) / n
        self._compare("clean accuracy", clean_found, self.row.clean_acc, self.row.clean_correct)
        self._compare("robust accuracy", robust_found, self.row.robust_acc, self.row.robust)
        return RowReport(
            title=self.row.title,
            clean_claimed=self.row.clean_acc,
            robust_claimed=self.row.robust_acc,
            clean_found=clean_found,
            robust_found=robust_found,
            batch_size=self.rebuilt.judge.target.batch_size,
            failures=tuple(self.failures),
            borderline=tuple(self.borderline),
            notes=self.rebuilt.notes,
        )

    def _clean(self) -> list[bool]:
        """Whether each clean image is classified right; claims to the contrary are noted."""
        right = self.rebuilt.correct(self.rebuilt.x, range(len(self.row.indices)))
        pairs = zip(right, self.row.clean_correct, strict=True)
        wrong = [place for place, (found, claimed) in enumerate(pairs) if found != claimed]
        near = self.rebuilt.close(self.rebuilt.clean(wrong), wrong)
        broken = set(self.row.broken)
        for place, close in zip(wrong, near, strict=True):
            why = NOTHING_TO_BREAK if place in broken else _clean_why(right[place])
            self._note(self.row.indices[place], why, close)
        return right

    def _examples(self, x: Images, index: list[int]) -> dict[int, Images]:
        """The examples that break their sample, by its place; the others are noted."""
        claimed = {self.row.indices[place] for place in self.row.broken}
        for extra in sorted(set(index) - claimed):
            self._note(extra, "has an example, but is not claimed broken")
        for lacking in sorted(claimed - set(index)):
            self._note(lacking, "is claimed broken, but has no example")
        rows = [k for k, i in enumerate(index) if i in claimed]
        places = [self.rebuilt.places[index[k]] for k in rows]
        right = [self.right[place] for place in places]
        inputs, held = x[rows].to(self.rebuilt.x), {}
        for k, trial in enumerate(trials(self.rebuilt, inputs, places, right)):
            if not trial.why:
                held[trial.place] = inputs[k]
            elif self.right[trial.place]:  # else it has been noted with the clean images
                self._note(self.row.indices[trial.place], trial.why, trial.borderline)
        return held

    def _note(self, index: int | None, why: str, borderline: bool = False) -> None:
        listed = self.borderline if borderline else self.failures
        listed.append(Finding(self.row.title, index, why))

    def _compare(
        self, what: str, found: float, claimed: float | None, samples: Sequence[bool]
    ) -> None:
        """The figure against what was found, borderline samples aside, and against its samples."""
        assert claimed is not None
        told = sum(samples) / len(samples)
        if abs(told - claimed) > _EXACT:
            self._note(None, f"{what} is claimed as {claimed:.4%}, its samples say {told:.4%}")
        if abs(found - claimed) > len(self.borderline) / len(samples) + _EXACT:
            self._note(None, f"{what} is {found:.4%} when scored again, claimed as {claimed:.4%}")


def _clean_why(right: bool) -> str:
    claimed = "misclassified" if right else "right"
    return f"is claimed {claimed} without an attack, and is {'right' if right else 'misclassified'}"
