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
    """A drawing with axes for each title, four in a line; tick labels on the outer axes alone.

    The axes are not tied to each other, for matplotlib takes seconds over so many that are:
    whoever draws gives all of them the same limits.
    """
    across = min(_ACROSS, len(titles))
    down = math.ceil(len(titles) / across)
    wide, high = (3.6, 2.4) if across == 1 else (2.3, 1.75)
    drawing = canvas(wide * across, high * down, layout=None)
    held = drawing.subplots(down, across, squeeze=False).flatten()
    drawing.subplots_adjust(left=0, bottom=0, right=1, top=1, wspace=0.06, hspace=0.28)
    for k, (axes, title) in enumerate(zip(held, titles, strict=False)):
        axes.set_title(title, fontsize=7, pad=3, y=1.0)
        axes.tick_params(labelleft=k % across == 0, labelbottom=k + across >= len(titles))
    for axes in held[len(titles) :]:
        axes.set_visible(False)
    # A fixed room for tick labels, in inches: what lies outside of the drawing is kept.
    drawing.text(0.5, -0.42 / (high * down), xlabel, ha="center", va="top", size=8)
    drawing.text(-0.45 / (wide * across), 0.5, ylabel, ha="right", va="center", rotation=90, size=8)
    return drawing, list(held[: len(titles)])


def legend(drawing: Canvas, held: Sequence[Any]) -> None:
    """One for all panels, above them."""
    found: dict[str, Any] = {}
    for axes in held:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    above = (1.0, 1 + 0.2 / drawing.get_figheight())
    drawing.legend(
        found.values(), found, loc="lower right", bbox_to_anchor=above, ncols=4, frameon=False
    )
