"""The tables of a run as text, by the name of a format. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustdeq.errors import unknown
from robustdeq.files import write_atomically
from robustdeq.reporting.latex import to_latex
from robustdeq.reporting.run import RunReport
from robustdeq.reporting.whole import to_json
from robustdeq.tables import tabulate, to_csv, to_markdown
from robustdeq.verdict import Verdict

TABLES = ("md", "csv")
"""What every run leaves beside its records."""
FORMATS = (*TABLES, "latex", "json")
"""What is text; `report --format` has more, which are files (`cli/report.py`)."""
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


def render(name: str, verdicts: Sequence[Verdict], form: str) -> str:
    """The table of some verdicts as Markdown or CSV.

    Raises:
        UsageError: for a format that is not known.
    """
    if form not in TABLES:
        raise unknown("format", form, TABLES)
    table = tabulate(verdicts)
    return to_csv(table) if form == "csv" else to_markdown(table, f"RobustDEQ: {name}", NOTES)


def render_run(run: RunReport, form: str) -> str:
    """A run as text, in one of `FORMATS`.

    Raises:
        UsageError: for a format that is not known.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "latex":
        return to_latex(run.name, run.verdicts)
    return to_json(run) if form == "json" else render(run.name, run.verdicts, form)


def write_tables(folder: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Write `table.csv` and `table.md`; unchanged verdicts give the same bytes."""
    for form in TABLES:
        write_atomically(folder / f"table.{form}", render(name, verdicts, form).encode())
