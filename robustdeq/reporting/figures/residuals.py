"""Did the solver converge? Residuals at clean inputs and at the examples that broke them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from robustdeq.records import broken
from robustdeq.reporting.figures.decades import decades, floor_of
from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.rendering import canvas, rendered
from robustdeq.reporting.figures.section import Row, Section
from robustdeq.reporting.figures.style import BROKEN, CLEAN, INK, styled
from robustdeq.reporting.figures.words import counted

ROWS = 40
"""Most rows of one figure."""
_LOOK = {
    "clean": {"color": CLEAN, "marker": "o"},
    "adversarial": {"color": BROKEN, "marker": "D"},
}
_QUANTILES = {"least": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "most": 1.0}


def residuals(section: Section) -> pd.DataFrame:
    """Quantiles of the deployed solve's relative residual: a line per row and point.

    Columns row (position), point ("clean" or "adversarial"), least, lower, median, upper, most, n
    and lost: how many are not finite, and in no quantile. Adversarial: the example that first broke
    each sample. A model without solves has no line.
    """
    lines = []
    for position, row in enumerate(section.rows):
        for point, values in (("clean", _clean(row)), ("adversarial", _adversarial(row))):
            held = values[np.isfinite(values)]
            if len(held):
                quantiles = np.quantile(held, list(_QUANTILES.values()))
                lines.append((position, point, *quantiles, len(held), len(values) - len(held)))
    return pd.DataFrame(lines, columns=["row", "point", *_QUANTILES, "n", "lost"])


def _clean(row: Row) -> Any:
    clean = row.joined("clean")
    return clean["clean_residual"].dropna().to_numpy(dtype=float) if len(clean) else np.empty(0)


def _adversarial(row: Row) -> Any:
    attacks = row.joined("attack")
    if not len(attacks):
        return np.empty(0)
    first = attacks[broken(attacks)].drop_duplicates("index")
    return first["adversarial_residual"].dropna().to_numpy(dtype=float)


def residual_distributions(section: Section) -> list[Figure]:
    """Quantile plots a page of the rows that solve; none where no model does."""
    kept = section.keep(residuals(section)["row"])
    return [_drawn(page, residuals(page)) for page in kept.pages(ROWS)]


def _drawn(page: Section, table: pd.DataFrame) -> Figure:
    with styled():
        drawing = canvas(7.0, 0.9 + 0.3 * max(2, len(page.rows)))
        axes = drawing.subplots()
        drawn = table.assign(
            **table[list(_QUANTILES)].clip(lower=floor_of(table[list(_QUANTILES)]))
        )
        for shift, (point, look) in zip((-0.17, 0.17), _LOOK.items(), strict=True):
            _quantiles(axes, drawn[drawn["point"] == point], shift, point, look)
        _tolerances(axes, page)
        axes.set_yticks(range(len(page.rows)), [row.label() for row in page.rows])
        axes.set(xscale="log", ylim=(len(page.rows) - 0.5, -0.5))
        axes.set_xlabel("relative residual of the deployed solve")
        decades(axes.xaxis, table[list(_QUANTILES)])
        drawing.legend(loc="outside upper right", ncols=3, frameon=False)
        return rendered(drawing, _words(page, table), page.foot)


def _quantiles(
    axes: Any, own: pd.DataFrame, shift: float, point: str, look: dict[str, Any]
) -> None:
    if not len(own):
        return
    at = own["row"] + shift
    axes.hlines(at, own["least"], own["most"], color=look["color"], linewidth=0.8)
    axes.hlines(at, own["lower"], own["upper"], color=look["color"], linewidth=3.5, alpha=0.6)
    axes.plot(own["median"], at, linestyle="none", markersize=4, label=point, **look)


def _tolerances(axes: Any, page: Section) -> None:
    held = [
        (position, value) for position, row in enumerate(page.rows) for value in _tolerance(row)
    ]
    if held:
        at = np.array([position for position, _ in held])
        axes.vlines(
            [value for _, value in held], at - 0.4, at + 0.4, color=INK, linestyle=":",
            linewidth=1, label="tolerance of the solver",
        )  # fmt: skip


def _tolerance(row: Row) -> Iterator[float]:
    value = dict(row.evidence.case.get("parameters", {})).get("tolerance")
    if isinstance(value, float) and 0 < value < np.inf:
        yield value


def _words(page: Section, table: pd.DataFrame) -> Figure:
    lost = int(table["lost"].sum())
    more = f" {counted(lost, 'residual')} not finite, and left out." if lost else ""
    more += " The tick 0 is a residual of exactly 0." if (table["least"] == 0).any() else ""
    alt = f"Quantile plot of {counted(len(page.rows), 'row')}."
    for point, own in table.groupby("point", sort=False):
        alt += (
            f" Median residuals at {point} points: {own['median'].min():.1e} to "
            f"{own['median'].max():.1e}, largest {own['most'].max():.1e}."
        )
    caption = (
        "Relative residual at which the deployed solver stopped, per sample: at all clean inputs, "
        "and at the examples that first broke a sample. Marker: median; thick: quartiles; thin: "
        "least to most. An attack that drives the model where its solver does not converge breaks "
        f"the solver rather than the classifier. Rows without solves are left out.{more}"
    )
    return Figure(
        name=page.name("residuals"),
        title=f"Residuals at clean and adversarial points: {page.where}",
        alt=alt,
        caption=caption + page.source,
        svg="",
        png=b"",
    )
