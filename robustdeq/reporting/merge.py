"""Runs of several folders as one: what machines computed apart, in one leaderboard. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from robustdeq.errors import UsageError
from robustdeq.keys import canonical_json, digest
from robustdeq.reporting.run import Origin, RunReport, read_run
from robustdeq.verdict import Evidence, Verdict

_FIGURES = (
    ("clean_acc", "clean accuracy"),
    ("autoattack_acc", "AutoAttack accuracy"),
    ("robust_acc", "robust accuracy"),
)
_OUTCOME = ["index", "label", "clean", "robust"]
_PROVENANCE = ("robustdeq", "environment", "machine", "core", "git")


@dataclass(frozen=True, eq=False)
class _Row:
    """A row with the run that it is of."""

    origin: Origin
    told: dict[str, Any]
    evidence: Evidence
    verdict: Verdict

    @property
    def ok(self) -> bool:
        """Whether it has its figures."""
        return self.verdict.status == "ok"

    @property
    def title(self) -> str:
        """The row's name in a sentence."""
        return f"{self.verdict.id} on {self.verdict.dataset} under {self.verdict.threat}"


def read_runs(folders: Sequence[Path]) -> RunReport:
    """The run of one folder, or those of several as one.

    Raises:
        UsageError: if a folder holds no run, or two runs contradict one another.
    """
    return merge([read_run(folder) for folder in folders])


def merge(runs: Sequence[RunReport]) -> RunReport:
    """One run with the rows of all, in their order.

    A case that several runs have evaluated is one row: the one that is complete, and of those that
    agree the one with the most flags, so that no doubt is lost. Rows of one name but of another
    case (weights, samples, seed) both stand, and their notes tell them apart. `data` is made of
    what the runs have in common, with differing values side by side; `data["runs"]` keeps what
    each says of itself, and `data["rows"][k]["run"]` is a row's place there.

    Raises:
        UsageError: if two runs have other figures for the same case.
    """
    if len(runs) == 1:
        return runs[0]
    groups = _groups([row for run in runs for row in _rows(run)])
    rows = _told_apart([_chosen(group) for group in groups])
    origins = list({row.origin.folder: row.origin for run in runs for row in _rows(run)}.values())
    places = {origin.folder: place for place, origin in enumerate(origins)}
    data = _joined([run.data for run in runs])
    data["runs"] = [_described(origin) for origin in origins]
    data["rows"] = [{**row.told, "run": places[row.origin.folder]} for row in rows]
    return RunReport(
        folder=runs[0].folder,
        data=data,
        evidences=tuple(row.evidence for row in rows),
        verdicts=tuple(row.verdict for row in rows),
        origins=tuple(row.origin for row in rows),
    )


def _rows(run: RunReport) -> list[_Row]:
    parts = zip(run.data["rows"], run.evidences, run.verdicts, strict=True)
    return [_Row(run.origin(k), *part) for k, part in enumerate(parts)]


def _groups(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows of one case; a row that never came to know its case joins one that did."""
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(digest(row.evidence.case), []).append(row)
    done = [row for row in rows if row.ok]
    for key, group in list(groups.items()):
        if not any(row.ok for row in group) and any(_covers(row, group[0]) for row in done):
            del groups[key]
    return list(groups.values())


def _covers(done: _Row, failed: _Row) -> bool:
    """Whether a finished case says all that one says whose model could not even be built."""
    known = {name: value for name, value in failed.evidence.case.items() if value != ""}
    return all(done.evidence.case.get(name) == value for name, value in known.items())


def _chosen(group: Sequence[_Row]) -> _Row:
    done = [row for row in group if row.ok]
    for other in done[1:]:
        _require_agreement(done[0], other)
    for other in group:
        if done and not other.ok:
            _require_no_break(done[0], other)
    return max(done, key=lambda row: len(row.verdict.flags)) if done else group[0]


def _require_no_break(done: _Row, unfinished: _Row) -> None:
    """What an unfinished row fell to must not count as robust because another run is whole."""
    held = unfinished.verdict.samples
    if not len(held):
        return
    fallen = set(held.loc[held["clean"] & ~held["robust"], "index"])
    samples = done.verdict.samples
    stands = sorted(set(samples.loc[samples["robust"], "index"]) & fallen)
    if stands:
        what = f"robust samples in {done.origin} that {unfinished.origin} broke ({len(stands)})"
        raise _refusal(done, what)


def _require_agreement(a: _Row, b: _Row) -> None:
    for name, words in _FIGURES:
        found = [getattr(row.verdict, name) for row in (a, b)]
        if found[0] != found[1]:
            figures = [
                f"{_percent(x)} in {row.origin}" for x, row in zip(found, (a, b), strict=True)
            ]
            raise _refusal(a, f"{words} {figures[0]}, but {figures[1]}")
    held = [row.verdict.samples.sort_values("index")[_OUTCOME] for row in (a, b)]
    x, y = (part.reset_index(drop=True).astype("int64") for part in held)
    if not x.equals(y):
        raise _refusal(a, f"other outcomes on {_where(x, y)} in {a.origin} than in {b.origin}")


def _where(x: pd.DataFrame, y: pd.DataFrame) -> str:
    if x["index"].tolist() != y["index"].tolist():
        return "other samples"
    differing = x.loc[(x != y).any(axis=1), "index"].tolist()
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return f"samples {', '.join(map(str, differing[:5]))}{more}"


def _refusal(row: _Row, what: str) -> UsageError:
    return UsageError(f"{row.title} has {what}, for the same case; report these runs apart.")


def _told_apart(rows: Sequence[_Row]) -> list[_Row]:
    """Rows of one name get a note on what is different in their cases."""
    named: dict[str, list[_Row]] = {}
    for row in rows:
        named.setdefault(row.title, []).append(row)
    return [row if len(named[row.title]) < 2 else _noted(row, named[row.title]) for row in rows]


def _noted(row: _Row, namesakes: Sequence[_Row]) -> _Row:
    cases = [other.evidence.case for other in namesakes]
    names = sorted({name for case in cases for name in case})
    differing = [n for n in names if len({canonical_json(case.get(n)) for case in cases}) > 1]
    own = ", ".join(f"{name} {_short(row.evidence.case.get(name))}" for name in differing)
    told = f"one of {len(namesakes)} cases of this name: {own}, from {row.origin.folder}"
    note = "; ".join(part for part in (row.verdict.note, told) if part)
    return replace(row, verdict=replace(row.verdict, note=note))


def _short(value: Any) -> str:
    text = "n/a" if value is None else value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _described(origin: Origin) -> dict[str, Any]:
    """What a run says of itself, but for its rows."""
    return {"folder": str(origin.folder)} | {k: v for k, v in origin.data.items() if k != "rows"}


def _joined(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What holds for all runs; values that differ stand side by side, as text."""
    data = {name: _together(run.get(name) for run in runs) for name in (*_PROVENANCE, "seed")}
    suites = [run["suite"] for run in runs]
    return {"format": runs[0]["format"], **data, "suite": _together(suites)}


def _together(values: Iterable[Any]) -> Any:
    different = list({canonical_json(value): value for value in values}.values())
    if len(different) == 1:
        return different[0]
    held = [value for value in different if value is not None]
    if all(isinstance(value, dict) for value in held):
        keys = dict.fromkeys(key for value in held for key in value)
        return {key: _together(value.get(key) for value in held) for key in keys}
    if all(isinstance(value, list) for value in held):
        items = [item for value in held for item in value]
        return list({canonical_json(item): item for item in items}.values())
    return " / ".join("n/a" if value is None else str(value) for value in different)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f} %"
