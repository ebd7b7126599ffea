"""The whole table of a run as JSON, with all that it was computed on. Knows no torch."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from robustdeq.keys import canonical
from robustdeq.reporting.run import RunReport
from robustdeq.tables import COLUMNS, numbered

FORMAT = 1


def to_json(run: RunReport) -> str:
    """The table in its order: accuracies are fractions, what was not measured is null.

    Per row all columns of the table (`broken_by` as an object, `flags` as a list), its case in
    full, what its defense says of itself (`about`) and the run that it is of.
    """
    table = numbered(run.verdicts)
    rows = [_row(run, int(k), table.loc[k]) for k in table.index]
    told = {name: value for name, value in run.data.items() if name not in ("format", "rows")}
    data = {"format": FORMAT, "name": run.name, **told, "rows": rows}
    return json.dumps(canonical(data), indent=1, allow_nan=False) + "\n"


def _row(run: RunReport, place: int, cells: pd.Series) -> dict[str, Any]:
    verdict = run.verdicts[place]
    columns = {name: _plain(cells[name]) for name in COLUMNS}
    return {
        **columns,
        "broken_by": dict(sorted(verdict.broken_by.items())),
        "flags": list(verdict.flags),
        "case": run.evidences[place].case,
        "about": run.about(place),
        "run": run.data["rows"][place].get("run", 0),
    }


def _plain(value: Any) -> Any:
    """A cell as JSON has it: no NaN, and no type of numpy's."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if hasattr(value, "item") else value
