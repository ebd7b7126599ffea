"""A drawing as a `Figure`: the same bytes for the same data, and nothing from outside."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any, Literal
from xml.dom import minidom

from matplotlib.figure import Figure as Canvas
from matplotlib.transforms import Bbox

from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.style import INK
from robustdeq.reporting.figures.words import plain

DPI = 150


def canvas(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Canvas:
    """An empty drawing, in inches, that no window and no state of pyplot knows of."""
    return Canvas(figsize=(width, height), dpi=DPI, layout=layout)


def rendered(drawing: Canvas, words: Figure, foot: str = "") -> Figure:
    """The figure with its bytes. To be called in the style that the drawing was made in.

    Args:
        drawing: is finished by this.
        words: the figure without bytes.
        foot: what it says below itself of where it holds, for a file may stand alone.
    """
    drawing.draw_without_rendering()
    # Once is enough, and what is added below must not move the axes.
    drawing.set_layout_engine("none")
    drawn = drawing.get_tightbbox()
    below = (min(0.0, drawn.y0) - 0.06) / drawing.get_figheight()
    last = drawing.text(1, below, plain(foot, 100), ha="right", va="top", size=6.5, color=INK)
    inches = last.get_window_extent().transformed(drawing.dpi_scale_trans.inverted())
    edge = Bbox.union([drawn, inches]).padded(0.08)
    svg = _saved(drawing, edge, format="svg", metadata={"Date": None}).decode()
    png = _saved(drawing, edge, format="png", metadata={"Software": None})
    return replace(words, svg=_alone(svg, words), png=png)


def _saved(drawing: Canvas, edge: Bbox, **how: Any) -> bytes:
    buffer = io.BytesIO()
    drawing.savefig(buffer, bbox_inches=edge, dpi=DPI, **how)
    return buffer.getvalue()


def _alone(svg: str, words: Figure) -> str:
    """The element without prolog, metadata and global rules, so that a page can hold many."""
    document = minidom.parseString(svg.encode())
    root = document.documentElement
    assert root is not None
    for tag in ("metadata", "style"):
        for element in list(root.getElementsByTagName(tag)):
            if element.parentNode is not None:
                element.parentNode.removeChild(element)
    # A rule for "*" would hold for the whole page; on the root it is inherited by this figure.
    root.setAttribute("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.setAttribute("role", "img")
    for tag, text in (("desc", words.alt), ("title", words.title)):
        element = document.createElement(tag)
        element.appendChild(document.createTextNode(text))
        root.insertBefore(element, root.firstChild)
    _own_names(root, svg, words.name)
    return str(root.toxml()) + "\n"


def _own_names(root: Any, svg: str, name: str) -> None:
    """Only what is referred to keeps a name, which no other figure of the page has."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    for element in root.getElementsByTagName("*"):
        for key, value in list(element.attributes.items()):
            if key == "id" and value not in used:
                element.removeAttribute("id")
            elif key == "id":
                element.setAttribute("id", f"{name}-{value}")
            elif key.endswith("href"):
                element.setAttribute(key, value.replace("#", f"#{name}-", 1))
            elif "url(#" in value:
                element.setAttribute(key, value.replace("url(#", f"url(#{name}-"))
