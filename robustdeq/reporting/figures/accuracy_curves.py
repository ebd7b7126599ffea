"""Accuracy against epsilon and against attack steps: does an evaluation behave as it must?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.panels import PANELS, panels
from robustdeq.reporting.figures.rendering import rendered
from robustdeq.reporting.figures.section import Section, radius
from robustdeq.reporting.figures.style import BROKEN, CLEAN, FAINT, INK, styled
from robustdeq.reporting.figures.words import counted, percent, plain, short
from robustdeq.statistics import wilson
from robustdeq.verdict import curves_table

_COLUMNS = ["row", "at", "share", "low", "high"]


def curve(section: Section, name: str) -> pd.DataFrame:
    """Points of a sanity curve ("epsilon", "steps" or "unbounded"), with Wilson's 95 % interval.

    Columns row (position), at, share, low, high.
    """
    lines = []
    for position, row in enumerate(section.rows):
        table = curves_table([row.evidence])
        for _, point in table[table["curve"] == name].sort_values("at").iterrows():
            interval = wilson(round(point["accuracy"] * point["n"]), int(point["n"]))
            lines.append((position, point["at"], point["accuracy"], *interval))
    return pd.DataFrame(lines, columns=_COLUMNS)


def worst_cases(section: Section) -> pd.DataFrame:
    """Robust accuracy at the radius of each row's threat; columns as `curve`."""
    lines = [
        (position, radius(found.threat), found.robust_acc, found.robust_low, found.robust_high)
        for position, found in enumerate(row.verdict for row in section.rows)
        if found.robust_acc is not None and math.isfinite(radius(found.threat))
    ]
    return pd.DataFrame(lines, columns=_COLUMNS)


def accuracy_by_epsilon(ladder: Section) -> list[Figure]:
    """Panels a page of IDs: the curve of PGD, and the worst case at each radius that was run.

    IDs without a curve have a panel only where they were run at two radii at least.
    """
    curves, worst = set(curve(ladder, "epsilon")["row"]), worst_cases(ladder)
    own = worst.assign(id=[ladder.rows[k].verdict.id for k in worst["row"]])
    climbed = own.groupby("id")["at"].transform("nunique") > 1
    kept = ladder.keep(curves | set(own.loc[climbed, "row"]))
    return [_by_epsilon(page) for page in kept.pages(PANELS)]


def accuracy_by_steps(section: Section) -> list[Figure]:
    """Panels a page of rows; none without curves."""
    kept = section.keep(curve(section, "steps")["row"])
    return [_by_steps(page) for page in kept.pages(PANELS)]


def _by_epsilon(page: Section) -> Figure:
    points, worst = curve(page, "epsilon"), worst_cases(page)
    with styled():
        label = f"epsilon: {plain(page.threat)} radius, pixels in [0, 1]"
        drawing, held = _panels(page, points, label)
        for axes, rows in zip(held, _of_each(page), strict=True):
            _worst(axes, worst[worst["row"].isin(rows)])
        held[0].xaxis.set_major_locator(MaxNLocator(4))
        held[0].set_xlim(left=-0.03 * max(points["at"].max(), worst["at"].max(), 1e-9))
        _legend(drawing, held)
        return rendered(drawing, _epsilon_words(page, points, worst), page.foot)


def _by_steps(page: Section) -> Figure:
    points = curve(page, "steps")
    with styled():
        drawing, held = _panels(page, points, "steps of PGD")
        held[0].set_xscale("log")
        held[0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        _legend(drawing, held)
        return rendered(drawing, _steps_words(page, points), page.foot)


def _panels(page: Section, points: pd.DataFrame, xlabel: str) -> tuple[Any, list[Any]]:
    rows = _of_each(page)
    titles = [page.rows[own[0]].label(30) for own in rows]
    drawing, held = panels(titles, xlabel, "accuracy")
    for axes, own in zip(held, rows, strict=True):
        for position, line in points.groupby("row"):
            if position not in own:
                axes.plot(line["at"], line["share"], color=FAINT, linewidth=0.5, zorder=1)
        for _, line in points[points["row"].isin(own)].groupby("row"):
            _line(axes, line)
        classes = page.rows[own[0]].evidence.case.get("classes")
        if isinstance(classes, int) and classes > 1:
            axes.axhline(1 / classes, color=INK, linewidth=0.6, linestyle=":", label="chance")
    held[0].set_ylim(-0.03, 1.03)
    held[0].yaxis.set_major_formatter(PercentFormatter(1))
    return drawing, held


def _line(axes: Any, line: pd.DataFrame) -> None:
    look = {"color": CLEAN, "marker": "o", "markersize": 2.5, "linewidth": 1.2}
    axes.plot(line["at"], line["share"], label="PGD", **look)
    axes.fill_between(line["at"], line["low"], line["high"], color=CLEAN, alpha=0.15, linewidth=0)


def _worst(axes: Any, worst: pd.DataFrame) -> None:
    if len(worst):
        reach = [worst["share"] - worst["low"], worst["high"] - worst["share"]]
        axes.errorbar(
            worst["at"], worst["share"], yerr=reach, color=BROKEN, marker="D", markersize=4,
            linestyle="none", linewidth=1, label="worst case over all attacks",
        )  # fmt: skip


def _of_each(page: Section) -> list[list[int]]:
    """Per ID, the positions of its rows."""
    return [[k for k, row in enumerate(page.rows) if row.verdict.id == name] for name in page.ids]


def _legend(drawing: Any, held: list[Any]) -> None:
    found = {}
    for axes in held:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    drawing.legend(found.values(), found, loc="outside upper right", ncols=3, frameon=False)


def _epsilon_words(page: Section, points: pd.DataFrame, worst: pd.DataFrame) -> Figure:
    alt = f"Accuracy against epsilon of {counted(len(page.ids), 'model')}."
    alt += "".join(_ends(points, "epsilon")) + "".join(_span(worst))
    caption = (
        "Accuracy under PGD (40 steps, 2 restarts, margin loss) against the radius, shaded: "
        "Wilson's 95 % interval; gray: the other models of this figure. Diamonds: the worst case "
        "over all attacks at the radii that were run, with its interval. A sound evaluation falls "
        f"with epsilon.{_unbounded(page)}"
    )
    return Figure(
        name=page.name("accuracy-by-epsilon"),
        title=f"Accuracy against epsilon: {page.where}",
        alt=alt,
        caption=caption + page.source,
        svg="",
        png=b"",
    )


def _steps_words(page: Section, points: pd.DataFrame) -> Figure:
    caption = (
        "Accuracy under PGD (margin loss) against its number of steps, each number run on its own; "
        "shaded: Wilson's 95 % interval; gray: the other models of this figure. A sound evaluation "
        "settles with steps."
    )
    alt = f"Accuracy against steps of {counted(len(page.rows), 'model')}."
    return Figure(
        name=page.name("accuracy-by-steps"),
        title=f"Accuracy against attack steps: {page.where}",
        alt=alt + "".join(_ends(points, "steps")),
        caption=caption + page.source,
        svg="",
        png=b"",
    )


def _ends(points: pd.DataFrame, name: str) -> Iterator[str]:
    """What the curves have at their least and at their largest value."""
    for at in sorted({points["at"].min(), points["at"].max()}) if len(points) else ():
        own = points.loc[points["at"] == at, "share"]
        yield f" At {name} {at:.3g}: {percent(own.min())} to {percent(own.max())} under PGD."


def _span(worst: pd.DataFrame) -> Iterator[str]:
    for at, own in worst.groupby("at")["share"]:
        yield f" Worst case at {at:.3g}: {percent(own.min())} to {percent(own.max())}."


def _unbounded(page: Section) -> str:
    points = curve(page, "unbounded")["share"]
    if not len(points):
        return ""
    return f" Without a bound PGD leaves {percent(points.min())} to {percent(points.max())}."
