"""Text of others, made fit for one line of a terminal, a table or a page's data."""

from __future__ import annotations

from typing import Any

LONGEST = 2000
"""Characters that are kept of a text that someone else wrote."""


def one_line(value: Any, longest: int = LONGEST) -> str:
    """`value` as one line of printable text, cut at `longest` characters; never raises.

    Control characters could forge a terminal's lines; they become spaces, as do line breaks and
    what turns the direction of writing. Markup is left as it is: escaping is the writer's work.
    """
    try:
        text = str(value)
    except Exception:
        text = f"({type(value).__name__} without a text)"
    kept = text[: 2 * longest]  # runs of spaces shrink
    plain = " ".join("".join(c if c.isprintable() else " " for c in kept).split())
    whole = len(plain) <= longest and len(kept) == len(text)
    return plain if whole else plain[: longest - 3] + "..."
