"""A small drawing: the residual along the solver's steps, for the page's rows.

Drawn by hand, for a page may have hundreds of them; `figures/` draws the large ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

WIDTH, HEIGHT = 320, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 28
_LOWEST, _HIGHEST = 1e-12, 1e2


@dataclass(frozen=True)
class Curve:
    """One point's curve: `line` is the median, `band` the 10 % to 90 % quantiles."""

    name: str
    line: str
    band: str
    n: int
    last: float


@dataclass(frozen=True)
class Sparkline:
    """Curves in the coordinates of a box of `WIDTH` x `HEIGHT`, and what is written beside them.

    Attributes:
        ticks: place and text of the decades on the vertical axis.
        limit: the height of the solver's tolerance; None where it is not known.
    """

    curves: list[Curve]
    ticks: list[tuple[float, str]]
    steps: int
    limit: float | None
    alt: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def sparkline(rows: pd.DataFrame, tolerance: float | None) -> Sparkline | None:
    """The drawing of a row's traces (`records.TRACE_SCHEMA`); None where there are none.

    Several solves of one forward pass follow one another.
    """
    if not len(rows):
        return None
    rows = _in_line(rows)
    steps = int(rows["at"].max())
    held = [tolerance] if tolerance else []
    low, high = _decades([*rows["low"], *rows["high"], *held])
    scale = _Scale(steps, low, high)
    curves = [_curve(str(name), part, scale) for name, part in rows.groupby("point", sort=False)]
    every = max(1, math.ceil((high - low) / 4))
    ticks = [(scale.y(10.0**k), f"1e{k}") for k in range(low, high + 1, every)]
    limit = scale.y(tolerance) if tolerance else None
    return Sparkline(curves, ticks, steps, limit, _alt(curves, steps))


def _in_line(rows: pd.DataFrame) -> pd.DataFrame:
    """A column `at`: the step, counted on from solve to solve."""
    longest = rows.groupby("solve")["step"].max().sort_index()
    before = longest.cumsum().shift(fill_value=0)
    return rows.assign(at=rows["step"] + rows["solve"].map(before))


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Whole powers of ten around all values."""
    logs = [math.log10(_clipped(value)) for value in values]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    return low, max(high, low + 1)


def _clipped(value: float) -> float:
    return min(max(float(value), _LOWEST), _HIGHEST) if value == value else _HIGHEST


class _Scale:
    def __init__(self, steps: int, low: int, high: int) -> None:
        self.steps, self.low, self.high = steps, low, high

    def x(self, step: float) -> float:
        share = (step - 1) / max(self.steps - 1, 1)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (math.log10(_clipped(value)) - self.low) / (self.high - self.low)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)


def _curve(name: str, rows: pd.DataFrame, scale: _Scale) -> Curve:
    at = [scale.x(step) for step in rows["at"]]
    line, low, high = ([scale.y(v) for v in rows[c]] for c in ("median", "low", "high"))
    band = [*zip(at, low, strict=True), *reversed(list(zip(at, high, strict=True)))]
    last = float(rows["median"].iloc[-1])
    return Curve(
        name, _points(zip(at, line, strict=True)), _points(band), int(rows["n"].max()), last
    )


def _points(pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in pairs)


def _alt(curves: Sequence[Curve], steps: int) -> str:
    ends = "; ".join(f"{c.name} (n = {c.n}) ends at a median of {c.last:.2g}" for c in curves)
    return f"Relative residual along {steps} solver steps: {ends}."
