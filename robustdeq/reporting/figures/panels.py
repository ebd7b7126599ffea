"""Small multiples: a panel a row, all on the same axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas

from robustdeq.reporting.figures.rendering import canvas

PANELS = 24
"""Most panels of one figure."""
_ACROSS = 4


def panels(titles: Sequence[str], xlabel: str, ylabel: str) -> tuple[Canvas, list[Any]]:
    """A drawing with axes for each title, four in a line; labels on the outer axes alone."""
    across = min(_ACROSS, len(titles))
    down = math.ceil(len(titles) / across)
    wide, high = (3.6, 2.4) if across == 1 else (2.1, 1.6)
    drawing = canvas(wide * across + 0.5, high * down + 0.6)
    held = drawing.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, title in zip(held, titles, strict=False):
        axes.set_title(title, fontsize=7, pad=3)
    for axes in held[len(titles) :]:
        axes.set_visible(False)
    # Where the last line is not full, the panels above its gap have the lowest axis of theirs.
    for axes in held[max(0, len(titles) - across) : len(titles)]:
        axes.tick_params(labelbottom=True)
    drawing.supxlabel(xlabel, fontsize=8)
    drawing.supylabel(ylabel, fontsize=8)
    return drawing, list(held[: len(titles)])
