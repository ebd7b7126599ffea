"""A figure as it is handed on: bytes, and the words that go with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Figure:
    """One figure. Its texts are plain; whoever puts them into a page escapes them.

    Attributes:
        name: stem of its files, unique within a run: lower-case letters, digits and hyphens.
        title: what it shows and where, in a line.
        alt: alternative text with the main figures in it.
        caption: what is drawn, on how many samples, and the command that measured it.
        svg: a whole `<svg>` element; its text is text, and it refers to nothing outside itself.
        png: the same at 150 dots per inch.
    """

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    png: bytes
