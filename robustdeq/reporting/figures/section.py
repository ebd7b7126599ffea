"""A run's rows as figures take them: sections of one question, rows with their samples."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from robustdeq.comparison import doubts
from robustdeq.reporting.figures.words import LABEL, plain, slug, told
from robustdeq.reporting.run import RunReport
from robustdeq.verdict import Evidence, Verdict, joined, records_of

DOUBT = " †"
"""What the label of a row with flags ends in."""


@dataclass(frozen=True, eq=False)
class Stage:
    """An attack through one gradient on all samples of a row.

    Attributes:
        spec: what the records say of it: attack, gradient, needs, parameters.
        rows: as `records.SAMPLE_SCHEMA`, in the order of the chunks.
    """

    label: str
    spec: dict[str, Any]
    rows: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the table with what it was computed from."""

    verdict: Verdict
    evidence: Evidence

    @property
    def in_doubt(self) -> bool:
        """Whether a check or an attack gave a reason to doubt the row."""
        return bool(doubts(self.verdict))

    def label(self, most: int = LABEL) -> str:
        """The ID as an axis can hold it."""
        return plain(self.verdict.id, most) + (DOUBT if self.in_doubt else "")

    def joined(self, kind: str, label: str | None = None) -> pd.DataFrame:
        """The rows of a kind of records, over all chunks."""
        return joined(self.evidence, kind, label)

    def stages(self) -> list[Stage]:
        """The attacks that have seen every sample, in order; those with gaps are left out."""
        held = records_of(self.evidence, "attack")
        specs = {r.meta.label: r.meta.stage for r in reversed(held)}
        labels = dict.fromkeys(r.meta.label for r in held)
        stages = [Stage(label, specs[label], self.joined("attack", label)) for label in labels]
        return [stage for stage in stages if len(stage.rows) == self.verdict.n]

    def clean(self) -> pd.DataFrame:
        """The clean records; empty unless they hold every sample."""
        rows = self.joined("clean")
        return rows if len(rows) == self.verdict.n else pd.DataFrame()


@dataclass(frozen=True, eq=False)
class Section:
    """Rows that answer one question, the most robust first, those without a figure last.

    Attributes:
        threat: as in "Linf:3/16"; a norm alone where the rows are of several radii.
        command: what measured them.
        part, parts: which of how many, where the rows are too many for one figure.
    """

    dataset: str
    threat: str
    track: str
    command: str
    rows: tuple[Row, ...]
    part: int = 1
    parts: int = 1

    @property
    def ids(self) -> list[str]:
        """The rows' IDs in order; where rows are of several radii, an ID has several rows."""
        return list(dict.fromkeys(row.verdict.id for row in self.rows))

    def keep(self, positions: Iterable[int]) -> Section:
        """The section with these of its rows alone."""
        return replace(self, rows=tuple(self.rows[k] for k in sorted(set(positions))))

    def pages(self, size: int) -> list[Section]:
        """Parts of about equal length, of at most `size` IDs; none of a section without rows."""
        count = math.ceil(len(self.ids) / size)
        ends = [round(k * len(self.ids) / count) for k in range(count + 1)] if count else []
        return [
            replace(self.page(k, count), rows=self._of(self.ids[begin:end]))
            for k, (begin, end) in enumerate(itertools.pairwise(ends), 1)
        ]

    def page(self, part: int, parts: int) -> Section:
        """The same, as one of several parts."""
        return replace(self, part=part, parts=parts)

    def _of(self, ids: list[str]) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict.id in set(ids))

    def name(self, stem: str) -> str:
        """A file's stem."""
        track = "" if self.track == "deterministic" else self.track
        part = f"part-{self.part}" if self.parts > 1 else ""
        return slug(stem, slug(self.dataset, self.threat, track), part)

    @property
    def where(self) -> str:
        """Data set, threat and, where it matters, track and part."""
        track = "" if self.track == "deterministic" else f", {self.track.replace('_', ' ')} models"
        part = f", part {self.part} of {self.parts}" if self.parts > 1 else ""
        return told(f"{told(self.dataset, 60)}, {told(self.threat, 60)}{track}{part}")

    @property
    def samples(self) -> str:
        """As in "n = 50"."""
        counts = sorted({row.verdict.n for row in self.rows})
        return f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")

    @property
    def foot(self) -> str:
        """What a drawing says of where it holds."""
        return f"{self.where}; {self.samples}"

    @property
    def source(self) -> str:
        """The end of each caption: where, on how many samples, by which command."""
        doubt = (
            " †: in doubt, by the flags of the row." if any(r.in_doubt for r in self.rows) else ""
        )
        return f"{doubt} {self.foot}. Measured by `{self.command}`."


def sections(run: RunReport) -> list[Section]:
    """One section per data set, threat and track, in the order of the table."""
    return _sections(run, lambda verdict: verdict.threat)


def ladders(run: RunReport) -> list[Section]:
    """One section per data set, norm and track: rows of all radii."""
    return _sections(run, lambda verdict: verdict.threat.partition(":")[0])


def _sections(run: RunReport, threat_of: Any) -> list[Section]:
    found: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for verdict, evidence in zip(run.verdicts, run.evidences, strict=True):
        found[verdict.dataset, threat_of(verdict), verdict.track].append(Row(verdict, evidence))
    command = f"robustdeq run {told(run.name, 80)}"
    return [Section(*key, command, _ordered(rows)) for key, rows in sorted(found.items())]


def _ordered(rows: Iterable[Row]) -> tuple[Row, ...]:
    def place(row: Row) -> tuple[float, str, str]:
        robust = row.verdict.robust_acc
        return (1.0 if robust is None else -robust), row.verdict.id, row.verdict.threat

    return tuple(sorted(rows, key=place))


def radius(threat: str) -> float:
    """The radius of a threat such as "Linf:8/255"; NaN where it is none."""
    above, slash, below = threat.partition(":")[2].partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        return math.nan
