"""A run's folder as data: what was run, on what evidence, and the verdicts. Knows no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustdeq.errors import UsageError
from robustdeq.records import Store
from robustdeq.verdict import Evidence, Failure, Verdict, judge_evidence


@dataclass(frozen=True, eq=False)
class RunReport:
    """A run as its folder tells it.

    Attributes:
        folder: where `run.json` and `records/` are.
        data: what `run.json` holds: suite, seed, environment, machine, rows.
        evidences: per row, its case and its records, without adversarial pixels.
        verdicts: per row, computed afresh from the evidence.
    """

    folder: Path
    data: dict[str, Any]
    evidences: tuple[Evidence, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def name(self) -> str:
        """The suite's name."""
        return str(self.data["suite"]["name"])

    @property
    def store(self) -> Store:
        """The run's records."""
        return Store(self.folder / "records")

    def about(self, row: int) -> dict[str, str]:
        """Title, authors, venue, link, claim and reproduction of a row's defense; may be empty."""
        told = self.data["rows"][row].get("about", {})
        return {str(key): str(value) for key, value in told.items()}


def read_run(folder: Path) -> RunReport:
    """A run's folder, its verdicts computed afresh from its records.

    Raises:
        UsageError: if the folder holds no run, or more than one and none is named.
    """
    index = _index(folder)
    store = Store(index.parent / "records")
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        evidences = tuple(_evidence(row, store) for row in data["rows"])
        str(data["suite"]["name"])
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise UsageError(f"{index} is not a run of this version; run the suite again.") from cause
    verdicts = tuple(judge_evidence(evidence) for evidence in evidences)
    return RunReport(index.parent, data, evidences, verdicts)


def _index(folder: Path) -> Path:
    if (folder / "run.json").is_file():
        return folder / "run.json"
    found = sorted(folder.glob("*/run.json"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.parent.name for path in found)
        raise UsageError(f"{folder} holds several runs ({names}); name the folder of one.")
    raise UsageError(f"{folder} holds no run; name a folder that 'robustdeq run --out' has made.")


def _evidence(row: dict[str, Any], store: Store) -> Evidence:
    held = [store.summary(key) for keys in row["records"].values() for key in keys]
    return Evidence(
        case=row["case"],
        chunks=row["chunks"],
        expected={int(k): tuple(v) for k, v in row["expected"].items()},
        records=tuple(record for record in held if record is not None),
        failures=tuple(Failure(**failure) for failure in row["failures"]),
    )
