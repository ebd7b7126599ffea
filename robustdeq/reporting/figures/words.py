"""Words for figures: hostile labels made inert, names of files, numbers."""

from __future__ import annotations

import functools
import hashlib
import re

import pandas as pd
from matplotlib.font_manager import findfont, get_font

LABEL = 38
"""Most characters of a label."""
_NAME = 80


@functools.cache
def _drawable() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def plain(text: object, most: int = LABEL) -> str:
    """One printable line of at most `most` characters; the middle of a longer one is left out.

    What the font cannot draw stands as a question mark: control characters would make the file
    ill-formed, and missing glyphs would draw as boxes.
    """
    line = _cut(" ".join(str(text).split()), most)
    return "".join(c if c.isprintable() and ord(c) in _drawable() else "?" for c in line)


def _cut(line: str, most: int) -> str:
    tail = most // 3
    return line if len(line) <= most else f"{line[: most - tail - 1]}…{line[-tail:]}"


def told(text: object, most: int = 200) -> str:
    """One line for a title, a caption or alternative text, which are no drawing: any script."""
    line = " ".join(str(text).split())
    return _cut("".join(c if c.isprintable() else "?" for c in line), most)


def slug(*parts: object) -> str:
    """A file's stem in [a-z0-9-]; a long one ends in a digest instead."""
    text = "-".join(str(part) for part in parts if str(part))
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "figure"
    if len(stem) <= _NAME:
        return stem
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    return f"{stem[: _NAME - 9].strip('-')}-{digest[:8]}"


def percent(share: float | None) -> str:
    """A share of 1 as in "46.0 %"."""
    return "n/a" if share is None or pd.isna(share) else f"{100 * share:.1f} %"


def counted(n: int, noun: str) -> str:
    """As in "1 row" and "2 rows"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def short(value: float) -> str:
    """A tick of a logarithmic axis without mathematical markup: 1e-6, 0.01, 30, 2k, 5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}".replace("e-0", "e-")
