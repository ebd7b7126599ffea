"""What others have added to a run: `submissions.json`, kept apart from `run.json`.

Every run writes `run.json` anew, and what was added must not be lost with it: a row would be more
robust again than it is known to be. `added` puts the additions into a run's data.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from robustdeq.errors import DamagedError, UsageError
from robustdeq.evidence.bundle import Bundle, read_bundle
from robustdeq.evidence.bundling import Parts, write_bundle
from robustdeq.keys import canonical_json, digest
from robustdeq.locks import alone_in
from robustdeq.records import Store
from robustdeq.reporting.formats import write_tables
from robustdeq.reporting.run import read_index, read_run, write_index
from robustdeq.reporting.sums import ADDED, write_sums
from robustdeq.sealed import Form
from robustdeq.verdict import Verdict

FILE = "submissions.json"
FORM = Form(
    newest=2,
    sealed=2,
    remedy="restore it from a copy; or delete it, and submit again what others had sent.",
)
_NAME = re.compile(r"[\w@.+-]+( [\w@.+-]+)*")

Row = dict[str, Any]


def read_submissions(folder: Path) -> dict[str, Any]:
    """`examples`: per submission, its row's title and case, who made it, and its records.

    `rows`: whole rows, in the form that they have in `run.json`.

    Raises:
        DamagedError: if any byte of the file is not as it was written.
        UsageError: if the file is of a newer version.
    """
    path = folder / FILE
    try:
        data = FORM.read(path)
    except FileNotFoundError:
        return {"examples": [], "rows": []}
    if not all(isinstance(data.get(part), list) for part in ("examples", "rows")):
        raise DamagedError(path, "it lists no examples and rows", FORM.remedy)
    return data


def write_submissions(folder: Path, data: Mapping[str, Any]) -> None:
    """Write `submissions.json`, sealed."""
    FORM.write(folder / FILE, data)
    write_sums(folder, ADDED)


def title_of(case: Mapping[str, Any]) -> str:
    """A row's name, as in a bundle."""
    return f"{case['id']} on {case['dataset']} under {case['threat']}"


def added(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The data of `run.json` with the additions that fit it; adding twice is adding once.

    Examples count for the very case that they were scored on; see `stale`.
    """
    held, data = read_submissions(folder), copy.deepcopy(dict(run))
    own = {title_of(row["case"]) for row in data["rows"]}
    data["rows"] += [row for row in held["rows"] if title_of(row["case"]) not in own]
    for entry in held["examples"]:
        for row in data["rows"]:
            if digest(row["case"]) == entry["case_key"]:
                _list(row, entry["records"])
    return data


def stale(folder: Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Submitted examples of rows that are another case by now, as after an edit of their source."""
    cases = {title_of(row["case"]): digest(row["case"]) for row in run["rows"]}
    entries = read_submissions(folder)["examples"]
    return [e for e in entries if cases.get(e["title"], e["case_key"]) != e["case_key"]]


def settle(folder: Path) -> list[str]:
    """Forget additions whose records were deleted, and say so; for the beginning of a run.

    Raises:
        DamagedError: if a record of them is damaged, for nothing can compute it again.
    """
    held, store, told = read_submissions(folder), Store(folder / "records"), []
    for part, entries in (("examples", held["examples"]), ("rows", held["rows"])):
        for entry in list(entries):
            by = entry.get("by") or entry["submission"]["by"]
            if not _whole(store, entry["records"], by):
                entries.remove(entry)
                title = entry.get("title") or title_of(entry["case"])
                told.append(f"{part} by {by} no longer count, for records are gone: {title}")
    if told:
        write_submissions(folder, held)
    return told


def _whole(store: Store, records: Mapping[str, list[str]], by: str) -> bool:
    try:
        held = [store.read(key) for keys in records.values() for key in keys]
    except DamagedError as damage:
        remedy = (
            f"{by} has submitted it, so that no run can compute it: restore it from a copy; or "
            "delete it, run again, and submit it again."
        )
        raise DamagedError(damage.path, damage.cause, remedy) from None
    return None not in held


class Run(NamedTuple):
    """A finished run's folder: the data of its `run.json`, a verdict per row, its bundle."""

    folder: Path
    data: dict[str, Any]
    verdicts: list[Verdict]
    bundle: Bundle

    def find(self, case: dict[str, Any]) -> tuple[dict[str, Any], Verdict]:
        """The row of a case, and its verdict."""
        wanted = canonical_json(case)
        for row, verdict in zip(self.data["rows"], self.verdicts, strict=True):
            if canonical_json(row["case"]) == wanted:
                return row, verdict
        raise UsageError(
            f"{self.folder} holds no row {title_of(case)} as its bundle has it; run the suite "
            "again, which writes both."
        )


def check_name(by: str) -> None:
    """Refuse a name that would not do in a label.

    Raises:
        UsageError: saying which would.
    """
    if not _NAME.fullmatch(by) or len(by) > 60:
        raise UsageError(f"--by is {by!r}; give a name of at most 60 letters, digits and '@.+-_'.")


def open_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        UsageError: if the folder is none, or its bundle cannot be read.
    """
    data = read_index(folder)
    verdicts = list(read_run(folder).verdicts)
    return Run(folder, data, verdicts, read_bundle(folder / "bundle"))


@contextmanager
def alone_in_run(folder: Path) -> Iterator[Run]:
    """A finished run that nobody else changes as long as the block lasts.

    Raises:
        UsageError: see `open_run`; or a run is at work in the folder.
    """
    read_index(folder)  # what is no run has a better sentence than what cannot be locked
    with alone_in(folder):
        yield open_run(folder)


def add(folder: Path, part: str, entries: list[dict[str, Any]]) -> None:
    """Append to the part "examples" or "rows" of `submissions.json`."""
    held = read_submissions(folder)
    held[part] += entries
    write_submissions(folder, held)


def publish(run: Run) -> None:
    """Write what a run leaves, with all additions: `run.json`, the tables, the bundle."""
    folder, data = run.folder, added(run.folder, run.data)
    write_index(folder, data)
    report = read_run(folder)
    write_tables(folder, report.name, report.verdicts)
    told = [row for row in run.bundle.rows if row.status == "ok"]
    parts = Parts(
        shapes={row.case["dataset"]: row.shape for row in told},
        weights=(),
        distributions={row.case["defense"]: row.distribution for row in told},
    )
    write_bundle(folder, data, report.verdicts, parts)
    write_sums(folder, ("run.json", "table.csv", "table.md", "bundle"))


def _list(row: Row, records: Mapping[str, list[str]]) -> None:
    for chunk, keys in records.items():
        listed = row["records"].setdefault(chunk, [])
        listed += [key for key in keys if key not in listed]
