"""The residual along the solver's steps, at clean inputs and at the examples that broke them."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.ticker import MaxNLocator

from robustdeq.reporting.figures.decades import decades, floor_of
from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.panels import PANELS, panels
from robustdeq.reporting.figures.rendering import rendered
from robustdeq.reporting.figures.section import Section
from robustdeq.reporting.figures.style import BROKEN, CLEAN, styled
from robustdeq.reporting.figures.words import counted, plain, slug, told

# Clean is drawn broad, for where the two agree the adversarial line lies on it.
_LOOK = {
    "clean": {"color": CLEAN, "linewidth": 3.0, "alpha": 0.55},
    "adversarial": {"color": BROKEN, "linewidth": 1.1, "marker": "D", "markersize": 2.5},
}
_QUANTILES = ["low", "median", "high"]
_DASHES = ("-", "--", ":", "-.")
_SHOWN = (
    "Relative residual after each evaluation of the cell: median over samples, shaded from the "
    "10 % to the 90 % quantile. Clean and adversarial points are of the same samples where any "
    "fell; a sample whose solve has stopped keeps its last residual."
)


def traces(section: Section) -> pd.DataFrame:
    """The records of kind `traces`, as `records.TRACE_SCHEMA`, with the row's position in `row`."""
    parts = [
        rows.assign(row=position)
        for position, row in enumerate(section.rows)
        if len(rows := drawable(row.joined("traces")))
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"row": []})


def drawable(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a finite median, of the points that are known."""
    if not len(rows):
        return rows
    finite = rows["median"].abs() < float("inf")
    return rows[finite & rows["point"].isin(list(_LOOK))]


def residual_traces(section: Section) -> list[Figure]:
    """Panels a page of the rows that solve; none where no trace was kept."""
    kept = section.keep(int(k) for k in traces(section)["row"].unique())
    return [_drawn(page, traces(page)) for page in kept.pages(PANELS)]


def trace_figure(rows: pd.DataFrame, title: str) -> Figure | None:
    """One row's traces, small; None where there is nothing to draw.

    Args:
        rows: as `records.TRACE_SCHEMA`.
        title: whose they are; may be any text.
    """
    own = drawable(rows)
    if not len(own):
        return None
    with styled():
        drawing, (axes,) = panels([plain(title, 48)], "steps of the solver", "relative residual")
        _lines(axes, own, floor_of(own[_QUANTILES]))
        _axes(axes, own)
        axes.legend(frameon=False, fontsize=6.5)
        words = Figure(
            name=slug("residual-trace", title),
            title=f"Residual along the solver's steps: {told(title)}",
            alt=f"Two curves at most.{_ends(own)}",
            caption=f"{_SHOWN} {_solves(own)} n = {own['n'].max()}.",
            svg="",
            png=b"",
        )
        return rendered(drawing, words)


def _drawn(page: Section, table: pd.DataFrame) -> Figure:
    with styled():
        titles = [row.label(30) for row in page.rows]
        drawing, held = panels(titles, "steps of the solver", "relative residual")
        floor = floor_of(table[_QUANTILES])
        for position, axes in enumerate(held):
            _lines(axes, table[table["row"] == position], floor)
        _axes(held[0], table)
        found: dict[str, Any] = {}
        for axes in held:
            handles, labels = axes.get_legend_handles_labels()
            found |= dict(zip(labels, handles, strict=True))
        drawing.legend(found.values(), found, loc="outside upper right", ncols=4, frameon=False)
        return rendered(drawing, _words(page, table), page.foot)


def _lines(axes: Any, own: pd.DataFrame, floor: float) -> None:
    # The clean line first, whatever the order of the records.
    for (point, solve), line in own.sort_values("point", ascending=False, kind="stable").groupby(
        ["point", "solve"], sort=False
    ):
        look = _LOOK[point] | {"linestyle": _DASHES[int(solve) % len(_DASHES)]}
        line = line.sort_values("step")
        at, values = line["step"].astype(int), line[_QUANTILES].clip(lower=floor)
        label = point if not solve else f"{point}, solve {int(solve) + 1}"
        axes.plot(at, values["median"], label=label, markevery=max(1, len(line) // 10), **look)
        axes.fill_between(
            at, values["low"], values["high"], color=look["color"], alpha=0.15, linewidth=0
        )


def _axes(axes: Any, table: pd.DataFrame) -> None:
    axes.set_yscale("log")
    decades(axes.yaxis, table[_QUANTILES])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _words(page: Section, table: pd.DataFrame) -> Figure:
    caption = f"{_SHOWN} {_solves(table)} Traced: the first chunk, 64 samples at most. "
    return Figure(
        name=page.name("residual-traces"),
        title=f"Residual along the solver's steps: {page.where}",
        alt=f"Panels of {counted(len(page.rows), 'row')}.{_ends(table)}",
        caption=caption.strip() + page.source,
        svg="",
        png=b"",
    )


def _solves(table: pd.DataFrame) -> str:
    most = int(table["solve"].max()) + 1
    return "" if most == 1 else f"A forward pass solves up to {most} times, one line each."


def _ends(table: pd.DataFrame) -> str:
    keys = [key for key in ("row", "point", "solve") if key in table]
    last = table.loc[table.groupby(keys)["step"].idxmax().astype(int)]
    return "".join(
        f" At {point} points the median ends at {own['median'].min():.1e} to "
        f"{own['median'].max():.1e}, after {own['step'].min()} to {own['step'].max()} steps."
        for point, own in last.groupby("point", sort=False)
    )
