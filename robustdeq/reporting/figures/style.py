"""The one style of all figures; its colors are told apart by color-blind readers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import seaborn as sns

THEME = {"context": "paper", "style": "whitegrid", "palette": "colorblind"}
"""What seaborn is asked for."""
SVG = {"svg.fonttype": "none", "svg.hashsalt": "robustdeq"}
"""Text stays text, which keeps a file small, and the same data gives the same file."""
_SETTINGS: Any = {
    **SVG,
    "font.family": "sans-serif",
    # The font that comes with matplotlib first: labels take the same room on every machine.
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    # Text is as wide as it was measured, at any resolution.
    "text.hinting": "none",
    # A stranger's dollar sign is a dollar sign.
    "text.parse_math": False,
    "axes.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "grid.linewidth": 0.5,
    "grid.color": "#dddddd",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
}
COLORS = tuple(sns.color_palette(THEME["palette"]).as_hex()[k] for k in (0, 3, 9, 5, 7))
"""Blue, vermilion, sky, tan, gray: five that stay apart in all three kinds of color blindness."""
CLEAN, BROKEN = COLORS[0], COLORS[1]
INK, FAINT, EMPTY, EDGE = "#222222", "#c4c4c4", "#f0f0f0", "#cfcfcf"
MARKERS = "osD^vPX*"
HATCH = "/////"
"""What a cell without a figure is filled with."""


def mark(k: int) -> dict[str, Any]:
    """Color and marker of series `k`; the pair is another one for each of the first 40."""
    return {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)]}


@contextmanager
def styled() -> Iterator[None]:
    """The style within the block, whatever the caller's own settings; they stand again after it."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(sns.plotting_context(THEME["context"]))
        mpl.rcParams.update(sns.axes_style(THEME["style"]))
        mpl.rcParams.update(_SETTINGS)
        yield
