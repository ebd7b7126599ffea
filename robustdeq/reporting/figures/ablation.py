"""Robust accuracy as bars, by defense: seeds of one training as their mean, other rows alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.rendering import canvas, rendered
from robustdeq.reporting.figures.section import Row, Section
from robustdeq.reporting.figures.style import CLEAN, COLORS, EDGE, EMPTY, HATCH, INK, styled
from robustdeq.reporting.figures.words import counted, percent, plain
from robustdeq.statistics import spread
from robustdeq.tables import rankable

BARS = 40
"""Most bars of one figure."""


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        share: robust accuracy, the mean over seeds; None where there is none.
        low, high: ends of the error bar: Wilson's 95 % interval of one row, or the mean -+ the
            sample standard deviation over seeds.
        seeds: the accuracies of the seeds; empty for one row.
    """

    defense: str
    label: str
    share: float | None
    low: float = math.nan
    high: float = math.nan
    seeds: tuple[float, ...] = ()


def bars(section: Section) -> list[Bar]:
    """Bars by defense; the defense with the best first, and in each the best first.

    Rows of one family that differ in the seed of their training alone are one bar, if two or more
    have an accuracy that can be held against another's.
    """
    families: dict[str, list[Row]] = defaultdict(list)
    for row in section.rows:
        if row.verdict.family and row.verdict.training_seed is not None and rankable(row.verdict):
            families[row.verdict.family].append(row)
    many = {name: rows for name, rows in families.items() if len(rows) > 1}
    held = {id(row) for rows in many.values() for row in rows}
    found = [_of_seeds(rows) for rows in many.values()]
    found += [_of_row(row) for row in section.rows if id(row) not in held]
    return _ordered(found)


def _of_seeds(rows: Sequence[Row]) -> Bar:
    rows = sorted(rows, key=lambda row: (row.verdict.training_seed or 0, row.verdict.id))
    values = [row.verdict.robust_acc for row in rows if row.verdict.robust_acc is not None]
    found = spread(values)
    ends = max(0.0, found.mean - found.std), min(1.0, found.mean + found.std)
    label = f"{rows[0].label(30)} ({found.n} seeds)"
    return Bar(rows[0].verdict.defense, label, found.mean, *ends, tuple(values))


def _of_row(row: Row) -> Bar:
    found = row.verdict
    if found.robust_acc is None or found.robust_low is None or found.robust_high is None:
        return Bar(found.defense, row.label(), None)
    return Bar(found.defense, row.label(), found.robust_acc, found.robust_low, found.robust_high)


def _ordered(found: list[Bar]) -> list[Bar]:
    def height(bar: Bar) -> float:
        return -1.0 if bar.share is None else bar.share

    best = {b.defense: max(height(o) for o in found if o.defense == b.defense) for b in found}
    return sorted(found, key=lambda b: (-best[b.defense], b.defense, -height(b), b.label))


def ablation(section: Section) -> list[Figure]:
    """Bar charts of at most `BARS` bars; none where fewer than two bars have an accuracy."""
    found = bars(section)
    if sum(bar.share is not None for bar in found) < 2:
        return []
    count = math.ceil(len(found) / BARS)
    ends = [round(k * len(found) / count) for k in range(count + 1)]
    pages = [section.page(k + 1, count) for k in range(count)]
    return [_drawn(p, found[ends[k] : ends[k + 1]]) for k, p in enumerate(pages)]


def _drawn(page: Section, found: Sequence[Bar]) -> Figure:
    at, heads = _places(found)
    with styled():
        drawing = canvas(7.0, 0.9 + 0.21 * (at[-1] + 1))
        axes = drawing.subplots()
        for place, bar in zip(at, found, strict=True):
            _bar(axes, place, bar)
        for place, defense in heads:
            axes.annotate(
                plain(defense), (0, place), (-6, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", va="center", weight="bold", fontsize=8,
            )  # fmt: skip
        axes.set_yticks(at, [bar.label for bar in found])
        axes.set(xlim=(0, 1), ylim=(at[-1] + 0.7, -0.7), xlabel="robust accuracy (worst case)")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(visible=False, axis="y")
        _legend(drawing, found)
        return rendered(drawing, _words(page, found), page.foot)


def _places(found: Sequence[Bar]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where the bars stand, and the name of each defense above its first."""
    at: list[float] = []
    heads: list[tuple[float, str]] = []
    place = 0.0
    for k, bar in enumerate(found):
        if not k or bar.defense != found[k - 1].defense:
            heads.append((place, bar.defense))
            place += 1
        at.append(place)
        place += 1
    return at, heads


def _bar(axes: Any, place: float, bar: Bar) -> None:
    if bar.share is None:
        axes.barh(place, 1, 0.75, color=EMPTY, edgecolor=EDGE, hatch=HATCH, linewidth=0)
        axes.text(0.01, place, "n/a", va="center", size=7, bbox={"color": EMPTY, "pad": 1})
        return
    axes.barh(place, bar.share, 0.75, color=COLORS[2] if bar.seeds else CLEAN)
    axes.hlines(place, bar.low, bar.high, color=INK, linewidth=1.2)
    if bar.seeds:
        axes.plot(bar.seeds, [place] * len(bar.seeds), ".", color=INK, markersize=4)
    axes.annotate(
        f"{100 * bar.share:.1f}", (max(bar.high, *bar.seeds, bar.share), place), (4, 0),
        textcoords="offset points", va="center", fontsize=6.5, annotation_clip=False,
    )  # fmt: skip


def _legend(drawing: Any, found: Sequence[Bar]) -> None:
    handles: list[tuple[Any, str]] = []
    if any(bar.share is not None and not bar.seeds for bar in found):
        handles.append((Patch(color=CLEAN), "one row, 95 % interval"))
    if any(bar.seeds for bar in found):
        handles.append((Patch(color=COLORS[2]), "mean of seeds, ± standard deviation"))
        handles.append((Line2D([], [], color=INK, marker=".", linestyle="none"), "one seed"))
    keys, names = [key for key, _ in handles], [name for _, name in handles]
    drawing.legend(keys, names, loc="outside upper right", ncols=3, frameon=False)


def _words(page: Section, found: Sequence[Bar]) -> Figure:
    held = [bar for bar in found if bar.share is not None]
    ends = (
        [max(held, key=lambda b: b.share or 0), min(held, key=lambda b: b.share or 0)]
        if held
        else []
    )
    alt = f"Bar chart of {counted(len(found), 'bar')} by defense."
    alt += "".join(
        f" {word}: {bar.label} with {percent(bar.share)}."
        for word, bar in zip(("Highest", "Lowest"), ends, strict=False)
    )
    caption = (
        "Robust accuracy (worst case over all attacks), by defense. Rows that differ in the seed "
        "of their training alone are one bar: the mean, the sample standard deviation and each "
        "seed as a dot. Any other row has Wilson's 95 % interval over samples, which says nothing "
        "of other trainings. Hatched, n/a: no robust accuracy, for a stage failed or is missing."
    )
    return Figure(
        name=page.name("ablation"),
        title=f"Robust accuracy by defense: {page.where}",
        alt=alt,
        caption=caption + page.source,
        svg="",
        png=b"",
    )
