"""A table of shares as a heat map, its numbers in the cells; a cell without one is hatched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from robustdeq.reporting.figures.rendering import canvas
from robustdeq.reporting.figures.style import EDGE, EMPTY, HATCH, INK

_CELL, _LABELS, _HEAD = 0.5, 2.6, 1.5


def grid(
    shares: pd.DataFrame,
    texts: pd.DataFrame,
    rows: Sequence[str],
    columns: Sequence[str],
    color: str,
    height: float = 0.24,
) -> Canvas:
    """Draw it.

    Args:
        shares: in [0, 1]; NaN where there is none.
        texts: what stands in each cell; where the share is NaN, why there is none.
        rows, columns: labels, for an axis names what an index might hold twice.
        color: of a share of 1; 0 is white.
        height: of a row, in inches.
    """
    drawing = canvas(_LABELS + _CELL * len(columns), _HEAD + height * len(rows))
    axes = drawing.subplots()
    shares = shares.reset_index(drop=True)
    # Colors end at two thirds, so that dark numbers can be read on all of them.
    sns.heatmap(
        shares.astype(float), annot=texts.to_numpy(), fmt="", mask=shares.isna(), vmin=0, vmax=1.5,
        cmap=sns.light_palette(color, as_cmap=True), cbar=False, linewidths=0.8, ax=axes,
        annot_kws={"size": 6.5, "color": INK}, xticklabels=False, yticklabels=False,
    )  # fmt: skip
    for row, column in zip(*shares.isna().to_numpy().nonzero(), strict=True):
        _empty(axes, int(row), int(column), str(texts.iloc[row, column]))
    axes.set(xlabel="", ylabel="", facecolor="white")
    axes.xaxis.tick_top()
    axes.set_xticks([k + 0.5 for k in range(len(columns))], columns, rotation=40, ha="left")
    axes.set_yticks([k + 0.5 for k in range(len(rows))], rows, rotation=0)
    axes.tick_params(length=0)
    return drawing


def _empty(axes: Any, row: int, column: int, text: str) -> None:
    cell = Rectangle((column, row), 1, 1, facecolor=EMPTY, edgecolor=EDGE, hatch=HATCH, linewidth=0)
    axes.add_patch(cell)
    where = {"boxstyle": "square,pad=0.1", "facecolor": EMPTY, "edgecolor": "none"}
    axes.text(
        column + 0.5, row + 0.5, text, ha="center", va="center", size=6, color=INK, bbox=where
    )
