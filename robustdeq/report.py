"""From a run's folder to its tables, in any format. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustdeq.errors import UsageError, unknown
from robustdeq.files import write_atomically
from robustdeq.records import Store
from robustdeq.tables import tabulate, to_csv, to_markdown
from robustdeq.verdict import Evidence, Failure, Verdict, judge_evidence

FORMATS = ("md", "csv")
NOTES = (
    "Access: white-box, full knowledge of the defense; pixels in [0, 1], normalization inside the "
    "model. L1, corruptions and certified bounds are not covered.",
    "Robust (worst case): share of samples that are classified correctly and that no attack "
    "through any gradient broke, judged by the deployed predictor alone; Wilson interval.",
    "AutoAttack: the reference library on whole chunks, alone; (joint): the same attacks, losses "
    "and budgets with states that are carried from step to step, each example confirmed from a "
    "cold start. n/a: could not be measured, which is never zero and never ranked.",
    "NFE: evaluations of the cell and vector-Jacobian products through it, over all stages; model "
    "calls for models that do not iterate.",
)


def read_run(folder: Path) -> tuple[str, list[Verdict]]:
    """The suite's name and the verdicts of a run's folder, computed afresh from its records.

    Raises:
        UsageError: if the folder holds no run, or more than one and none is named.
    """
    index = _index(folder)
    store = Store(index.parent / "records")
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        evidences = [_evidence(row, store) for row in data["rows"]]
        name = str(data["suite"]["name"])
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise UsageError(f"{index} is not a run of this version; run the suite again.") from cause
    return name, [judge_evidence(evidence) for evidence in evidences]


def render(name: str, verdicts: Sequence[Verdict], form: str) -> str:
    """The table of a run as text.

    Raises:
        UsageError: for a format that is not known.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    table = tabulate(verdicts)
    return to_csv(table) if form == "csv" else to_markdown(table, f"RobustDEQ: {name}", NOTES)


def write_tables(folder: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Write `table.csv` and `table.md`; unchanged verdicts give the same bytes."""
    for form in FORMATS:
        write_atomically(folder / f"table.{form}", render(name, verdicts, form).encode())


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
