"""What others have added to a run: `submissions.json`, kept apart from `run.json`.

Every run writes `run.json` anew, and what was added must not be lost with it: a row would be more
robust again than it is known to be. `added` puts the additions into a run's data.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from robustdeq.bounded import read_json
from robustdeq.errors import UsageError
from robustdeq.evidence.bundle import Bundle, read_bundle
from robustdeq.evidence.bundling import Parts, write_bundle
from robustdeq.files import write_atomically
from robustdeq.keys import canonical, canonical_json, digest
from robustdeq.reporting.formats import write_tables
from robustdeq.reporting.run import read_run
from robustdeq.verdict import Verdict

FORMAT = 1
FILE = "submissions.json"
_NAME = re.compile(r"[\w@.+-]+( [\w@.+-]+)*")

Row = dict[str, Any]


def read_submissions(folder: Path) -> dict[str, Any]:
    """`examples`: per submission, its row's title and case, who made it, and its records.

    `rows`: whole rows, in the form that they have in `run.json`.

    Raises:
        UsageError: if the file is not of this version.
    """
    path = folder / FILE
    if not path.exists():
        return {"format": FORMAT, "examples": [], "rows": []}
    try:
        data: dict[str, Any] = read_json(path)
        known = data["format"] == FORMAT and isinstance(data["examples"] + data["rows"], list)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UsageError(f"{path} is not of this version; use the RobustDEQ that wrote it.")
    return data


def write_submissions(folder: Path, data: Mapping[str, Any]) -> None:
    """Write `submissions.json`."""
    write_json(folder / FILE, data)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON in the form of `run.json`."""
    text = json.dumps(canonical(data), indent=1, sort_keys=True) + "\n"
    write_atomically(path, text.encode())


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
    path = folder / "run.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no run.json; name the folder of one suite's run.")
    verdicts = list(read_run(folder).verdicts)
    data = read_json(path)
    return Run(folder, data, verdicts, read_bundle(folder / "bundle"))


def add(folder: Path, part: str, entries: list[dict[str, Any]]) -> None:
    """Append to the part "examples" or "rows" of `submissions.json`."""
    held = read_submissions(folder)
    held[part] += entries
    write_submissions(folder, held)


def publish(run: Run) -> None:
    """Write what a run leaves, with all additions: `run.json`, the tables, the bundle."""
    folder, data = run.folder, added(run.folder, run.data)
    write_json(folder / "run.json", data)
    report = read_run(folder)
    write_tables(folder, report.name, report.verdicts)
    told = [row for row in run.bundle.rows if row.status == "ok"]
    parts = Parts(
        shapes={row.case["dataset"]: row.shape for row in told},
        weights=(),
        distributions={row.case["defense"]: row.distribution for row in told},
    )
    write_bundle(folder, data, report.verdicts, parts)


def _list(row: Row, records: Mapping[str, list[str]]) -> None:
    for chunk, keys in records.items():
        listed = row["records"].setdefault(chunk, [])
        listed += [key for key in keys if key not in listed]
