"""A run's folder as data: what was run, on what evidence, and the verdicts. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustdeq.bounded import read_json
from robustdeq.errors import UsageError
from robustdeq.records import Store
from robustdeq.verdict import Evidence, Failure, Verdict, judge_evidence


@dataclass(frozen=True, eq=False)
class Origin:
    """Where rows come from: a run's folder, and what its own `run.json` holds."""

    folder: Path
    data: dict[str, Any]

    @property
    def store(self) -> Store:
        """The run's records."""
        return Store(self.folder / "records")

    def __str__(self) -> str:
        environment, git = self.data.get("environment", {}), self.data.get("git", {})
        commit = f"commit {str(git['commit'])[:12]}" if git.get("commit") else "no commit known"
        return (
            f"{self.folder} ({self.data.get('machine', {}).get('platform', 'unknown machine')}, "
            f"{environment.get('device', 'unknown device')}, torch "
            f"{environment.get('torch', 'unknown')}, RobustDEQ "
            f"{self.data.get('robustdeq', 'unknown')}, {commit}"
            + (" with changes)" if git.get("dirty") else ")")
        )


@dataclass(frozen=True, eq=False)
class RunReport:
    """A run as its folder tells it; or several, as `merge` makes one of them.

    Attributes:
        folder: where `run.json` and `records/` are; of merged runs, those of the first.
        data: what `run.json` holds: suite, seed, environment, machine, rows.
        evidences: per row, its case and its records, without adversarial pixels.
        verdicts: per row, computed afresh from the evidence.
        origins: per row, the run that it is of; empty where all are of `folder`.
    """

    folder: Path
    data: dict[str, Any]
    evidences: tuple[Evidence, ...]
    verdicts: tuple[Verdict, ...]
    origins: tuple[Origin, ...] = ()

    @property
    def name(self) -> str:
        """The suite's name."""
        return str(self.data["suite"]["name"])

    @property
    def store(self) -> Store:
        """The records of a run that is not merged; `store_of` knows those of any row.

        Raises:
            ValueError: if the rows are of several folders.
        """
        if len({origin.folder for origin in self.origins}) > 1:
            raise ValueError("merged runs have no one store; ask for that of a row")
        return self.origin(0).store if self.origins else Origin(self.folder, self.data).store

    def origin(self, row: int) -> Origin:
        """The run that a row is of."""
        return self.origins[row] if self.origins else Origin(self.folder, self.data)

    def store_of(self, row: int) -> Store:
        """The records of a row's run."""
        return self.origin(row).store

    def entry(self, row: int) -> dict[str, Any]:
        """What the suite says of a row: weights, training; empty for a row that was submitted."""
        case, suite = self.evidences[row].case, self.origin(row).data["suite"]
        known = [d["name"] for d in suite.get("datasets", [])]
        data = [name for name in known if case["dataset"] in (name, Path(name).stem)]
        entries = suite.get("defenses", [])
        # A row of its own data set stands before one of all.
        for wanted in (*data, ""):
            for entry in entries:
                if entry.get("id") == case["id"] and entry.get("dataset", "") == wanted:
                    return dict(entry)
        return {}

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
        data = read_json(index)
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
