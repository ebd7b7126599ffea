"""Robustness against what its evaluation costs: cell evaluations and seconds per sample."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.rendering import canvas, rendered
from robustdeq.reporting.figures.section import Section
from robustdeq.reporting.figures.style import mark, styled
from robustdeq.reporting.figures.words import counted, percent, plain, short

NAMED = 20
"""Most rows that the legend names one by one; beyond, it names defenses."""
_COSTS = {"nfe": "NFE per sample, forward and backward", "seconds": "seconds per sample"}


def costs(section: Section) -> pd.DataFrame:
    """Columns row (position), defense, robust, low, high, nfe, seconds; costs per sample.

    Rows without robust accuracy have no line; a cost of 0 was not measured and is NaN.
    """
    lines = []
    for position, row in enumerate(section.rows):
        found = row.verdict
        if found.robust_acc is not None:
            nfe = (found.forward_nfe + found.backward_nfe) / found.n
            interval = (found.robust_low, found.robust_high)
            paid = (nfe, found.seconds / found.n)
            lines.append((position, found.defense, found.robust_acc, *interval, *paid))
    table = pd.DataFrame(lines, columns=["row", "defense", "robust", "low", "high", *_COSTS])
    return table.assign(**{name: table[name].where(table[name] > 0) for name in _COSTS})


def cost(section: Section) -> list[Figure]:
    """One scatter plot; none where no row has a robust accuracy and a cost."""
    table = costs(section)
    if not table[list(_COSTS)].notna().to_numpy().any():
        return []
    with styled():
        drawing = canvas(9.5, 3.4)
        panels = drawing.subplots(1, 2, sharey=True)
        series = _series(section, table)
        for axes, (column, label) in zip(panels, _COSTS.items(), strict=True):
            for look, _, own in series:
                _dots(axes, own.dropna(subset=[column]), column, look)
            axes.set(xscale="log", xlabel=label, ylim=(-0.03, 1.03), xmargin=0.1)
            _spread(axes)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        panels[0].set(ylabel="robust accuracy (worst case)")
        panels[0].yaxis.set_major_formatter(PercentFormatter(1))
        _legend(drawing, series)
        return [rendered(drawing, _words(section, table), section.foot)]


def _series(
    section: Section, table: pd.DataFrame
) -> list[tuple[dict[str, Any], str, pd.DataFrame]]:
    """Look, name and rows of each entry of the legend."""
    if len(table) <= NAMED:
        return [
            (mark(k), section.rows[row].label(), table[table["row"] == row])
            for k, row in enumerate(table["row"])
        ]
    names = sorted(table["defense"].unique())
    return [(mark(k), plain(d, 30), table[table["defense"] == d]) for k, d in enumerate(names)]


def _dots(axes: Any, own: pd.DataFrame, column: str, look: dict[str, Any]) -> None:
    reach = [own["robust"] - own["low"], own["high"] - own["robust"]]
    axes.errorbar(
        own[column], own["robust"], yerr=reach, linestyle="none", markersize=6, linewidth=0.7,
        markeredgecolor="white", markeredgewidth=0.4, alpha=0.9, **look,
    )  # fmt: skip


def _spread(axes: Any) -> None:
    """At least a factor of ten, so that a few percent do not look like a lot."""
    low, high = axes.get_xlim()
    if high / low < 10:
        middle = (low * high) ** 0.5
        axes.set_xlim(middle / 10**0.5, middle * 10**0.5)


def _legend(drawing: Any, series: list[tuple[dict[str, Any], str, pd.DataFrame]]) -> None:
    handles = [Line2D([], [], linestyle="none", markersize=5, **look) for look, _, _ in series]
    # A name that begins with an underscore would be left out.
    names = [f" {name}" if name.startswith("_") else name for _, name, _ in series]
    drawing.legend(handles, names, loc="outside right upper", frameon=False, labelspacing=0.35)


def _words(section: Section, table: pd.DataFrame) -> Figure:
    lacking = len(section.rows) - len(table)
    more = f" {counted(lacking, 'row')} without robust accuracy left out." if lacking else ""
    held = [(table[name], label) for name, label in _COSTS.items() if table[name].notna().any()]
    spans = [f"{_digits(c.min())} to {_digits(c.max())} {label}" for c, label in held]
    alt = (
        f"Scatter plot of {counted(len(table), 'row')}: {' and '.join(spans)}, at robust "
        f"accuracies from {percent(table['robust'].min())} to {percent(table['robust'].max())}."
    )
    caption = (
        "Robust accuracy with Wilson's 95 % interval against what the whole evaluation of a row "
        "cost per sample, checks and attacks included. NFE: evaluations of the cell and "
        "vector-Jacobian products through it (model calls, for models that do not iterate); "
        f"seconds are of the machine that ran it.{more}"
    )
    return Figure(
        name=section.name("cost"),
        title=f"Robustness against cost: {section.where}",
        alt=alt,
        caption=caption + section.source,
        svg="",
        png=b"",
    )


def _digits(value: float) -> str:
    return short(float(f"{value:.3g}"))
