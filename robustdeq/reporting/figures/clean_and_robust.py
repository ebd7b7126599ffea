"""Clean against robust accuracy of each row, with 95 % intervals."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.ticker import PercentFormatter

from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.rendering import canvas, rendered
from robustdeq.reporting.figures.section import Section
from robustdeq.reporting.figures.style import BROKEN, CLEAN, FAINT, INK, styled
from robustdeq.reporting.figures.words import counted, percent
from robustdeq.statistics import wilson

ROWS = 40
"""Most rows of one figure."""
_LOOK = {
    "clean": {"color": CLEAN, "marker": "o"},
    "AutoAttack": {"color": INK, "marker": "|"},
    "robust (worst case)": {"color": BROKEN, "marker": "D"},
}


def intervals(section: Section) -> pd.DataFrame:
    """Columns row (position), measure, share, low, high; Wilson's 95 % interval.

    A measure that a row lacks has no line.
    """
    lines = []
    for position, row in enumerate(section.rows):
        found = row.verdict
        shares = (found.clean_acc, found.autoattack_acc, found.robust_acc)
        for measure, share in zip(_LOOK, shares, strict=True):
            if share is not None:
                low, high = wilson(round(share * found.n), found.n)
                lines.append((position, measure, share, low, high))
    return pd.DataFrame(lines, columns=["row", "measure", "share", "low", "high"])


def clean_and_robust(section: Section) -> list[Figure]:
    """A dot plot a page of rows; none where nothing was measured."""
    pages = [(page, intervals(page)) for page in section.pages(ROWS)]
    return [_drawn(page, table) for page, table in pages if len(table)]


def _drawn(page: Section, table: pd.DataFrame) -> Figure:
    with styled():
        drawing = canvas(7.0, 0.9 + 0.25 * max(2, len(page.rows)))
        axes = drawing.subplots()
        # Clean and worst case stand a little apart, for where they agree one would hide the other.
        for shift, (measure, look) in zip((-0.15, 0.0, 0.15), _LOOK.items(), strict=True):
            own = table[table["measure"] == measure]
            if len(own):
                _dots(axes, own, shift, measure, look)
        _lacking(axes, page, table)
        axes.set_yticks(range(len(page.rows)), [row.label() for row in page.rows])
        axes.set(xlim=(-0.02, 1.02), ylim=(len(page.rows) - 0.5, -0.5), xlabel="accuracy")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        handles, names = axes.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda k: list(_LOOK).index(names[k]))
        drawing.legend(
            [handles[k] for k in order], [names[k] for k in order], loc="outside upper right",
            ncols=3, frameon=False,
        )  # fmt: skip
        return rendered(drawing, _words(page, table), page.foot)


def _dots(axes: Any, own: pd.DataFrame, shift: float, measure: str, look: dict[str, Any]) -> None:
    at, share = own["row"] + shift, own["share"]
    if measure == "AutoAttack":
        # Behind the worst case, and seen beyond it where the two agree.
        axes.plot(
            share, at + 0.15, linestyle="none", markersize=11, zorder=1.5, label=measure, **look
        )
        return
    reach = [share - own["low"], own["high"] - share]
    axes.errorbar(
        share, at, xerr=reach, linestyle="none", markersize=4, linewidth=1, label=measure, **look
    )


def _lacking(axes: Any, page: Section, table: pd.DataFrame) -> None:
    robust = set(table.loc[table["measure"] == "robust (worst case)", "row"])
    for position, row in enumerate(page.rows):
        if position not in robust:
            axes.axhspan(position - 0.5, position + 0.5, color=FAINT, alpha=0.25, linewidth=0)
            axes.text(0.0, position, f"robust: n/a ({row.verdict.status})", va="center", size=7)


def _words(page: Section, table: pd.DataFrame) -> Figure:
    robust = table[table["measure"] == "robust (worst case)"]
    alt = f"Dot plot of {counted(len(page.rows), 'row')}, the most robust first."
    if len(robust):
        best, worst = (robust.loc[robust["share"].agg(which)] for which in ("idxmax", "idxmin"))
        alt += " Robust accuracy" + " to".join(
            f" {percent(line['share'])} ({percent(line['low'])} to {percent(line['high'])}, "
            f"{page.rows[line['row']].label(60)})"
            for line in ([best] if len(robust) == 1 else [best, worst])
        )
        alt += "."
    caption = (
        "Clean accuracy and robust accuracy (worst case over all attacks) with Wilson's 95 % "
        "intervals, which speak of other samples, not of other trainings; the bar is AutoAttack "
        "alone. A shaded row has no robust accuracy: a stage failed or is missing."
    )
    return Figure(
        name=page.name("clean-and-robust"),
        title=f"Clean and robust accuracy: {page.where}",
        alt=alt,
        caption=caption + page.source,
        svg="",
        png=b"",
    )
