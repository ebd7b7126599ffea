"""The rows of the page's table: what stands in each cell, and how what is missing looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from robustdeq.reporting.page.environment import cut
from robustdeq.reporting.run import RunReport
from robustdeq.tables import numbered
from robustdeq.verdict import Verdict


class Cell(NamedTuple):
    """A figure, or in its place a word with its look and its reason."""

    value: float | None
    look: str = ""
    word: str = ""
    reason: str = ""


@dataclass(frozen=True, eq=False)
class RowView:
    """One row of the table.

    Attributes:
        number: of the row in the run.
        nfe: evaluations of the cell and vector-Jacobian products, per sample.
    """

    number: int
    verdict: Verdict
    rank: int | None
    seeds: str
    note: str
    clean: Cell
    autoattack: Cell
    robust: Cell
    nfe: float | None

    @property
    def anchor(self) -> str:
        """The address of the row's evidence on the page."""
        return f"row-{self.number}"

    @property
    def tags(self) -> dict[str, list[str]]:
        """By what the row can be filtered, and its values there."""
        v = self.verdict
        held = {
            "dataset": [v.dataset], "threat": [v.threat], "family": [v.defense],
            "track": [v.track], "flag": self.flag_names or ["no flag"], "status": [v.status],
        }  # fmt: skip
        return {key: [cut(value, 120) for value in values] for key, values in held.items()}

    @property
    def flag_names(self) -> list[str]:
        """The flags without their figures, each once: what rows can be filtered by."""
        names = (flag.split("=")[0].split(":")[0].split(" (")[0] for flag in self.verdict.flags)
        return list(dict.fromkeys(names))


def row_views(run: RunReport) -> list[RowView]:
    """All rows in the order of the table."""
    table = numbered(run.verdicts)
    return [_view(int(number), run.verdicts[int(number)], row) for number, row in table.iterrows()]


def _view(number: int, verdict: Verdict, row: pd.Series) -> RowView:
    calls = verdict.forward_nfe + verdict.backward_nfe
    return RowView(
        number=number,
        verdict=verdict,
        rank=None if pd.isna(row["rank"]) else int(row["rank"]),
        seeds=row["seeds"],
        note=row["note"],
        clean=_cell(verdict, verdict.clean_acc),
        autoattack=_cell(verdict, verdict.autoattack_acc),
        robust=_cell(verdict, verdict.robust_acc),
        nfe=calls / verdict.n if calls and verdict.n else None,
    )


def _cell(verdict: Verdict, value: float | None) -> Cell:
    if value is not None:
        return Cell(value)
    if verdict.status == "failed":
        return Cell(None, "failed", "failed", verdict.note)
    if verdict.status == "missing":
        return Cell(None, "unrun", "not run", verdict.note)
    return Cell(None, "na", "n/a", "not part of this battery, or it could not be measured")
