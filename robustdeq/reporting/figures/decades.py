"""Logarithmic axes for residuals: a tick a decade, and a place for what is exactly 0."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter, NullLocator
from numpy.typing import ArrayLike

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TICKS = 7


def floor_of(values: ArrayLike) -> float:
    """Where a 0 is drawn: a power of ten, a decade below the least positive value."""
    held = np.asarray(values, dtype=float)
    held = held[(held > 0) & np.isfinite(held)]
    least = float(held.min()) if len(held) else 1.0
    return float(10.0 ** max(math.floor(math.log10(least)) - 1, -300))


def power(exponent: int) -> str:
    """A power of ten without mathematical markup, which drawings do not read."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def decades(axis: Any, values: ArrayLike) -> None:
    """Ticks for values that are drawn at no less than `floor_of(values)`.

    Args:
        axis: of matplotlib, in logarithmic scale.
        values: what is drawn; where one is 0, the axis has a tick for it.
    """
    held = np.asarray(values, dtype=float)
    held = held[np.isfinite(held)]
    floor = floor_of(held)
    first = round(math.log10(floor)) + 1
    last = max(first, math.ceil(math.log10(max(float(held.max()), floor * 10))))
    exponents = list(range(last, first - 1, -max(1, math.ceil((last - first) / _TICKS))))
    ticks = [10.0**exponent for exponent in exponents]
    labels = [power(exponent) for exponent in exponents]
    if (held < floor).any():
        ticks, labels = [*ticks, floor], [*labels, "0"]
    axis.set_ticks(ticks, labels)
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
