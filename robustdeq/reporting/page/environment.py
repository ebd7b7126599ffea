"""How templates are filled: everything is escaped, and no script but ours may run.

What is not measured is written "n/a", never zero.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from functools import cache
from importlib import resources
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustdeq.texts import one_line

SCRIPTS = ("vendor/dataTables.min.js", "page.js")
LONGEST = 600
"""Characters that a text of others may take before it is cut."""


def environment() -> Environment:
    """Templates of this folder, with autoescape on for all of them."""
    made = Environment(
        loader=PackageLoader("robustdeq.reporting", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent, "count": count, "number": number, "cut": cut, "link": link,
        "breakable": breakable,
    }  # fmt: skip
    made.globals |= {"style": Markup(asset("style.css")), "policy": policy()}
    return made


@cache
def asset(name: str) -> str:
    """The text of a file of this folder."""
    return resources.files("robustdeq.reporting.page").joinpath(name).read_text(encoding="utf-8")


def scripts() -> list[Markup]:
    """Our scripts in order, to stand between tags."""
    return [Markup(asset(name)) for name in SCRIPTS]


def policy() -> str:
    """A content security policy: nothing is fetched, and only scripts with our digests run."""
    digests = (hashlib.sha256(asset(name).encode()).digest() for name in SCRIPTS)
    allowed = " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"


def percent(value: float | None) -> str:
    """Percent with two decimals."""
    return "n/a" if missing(value) else f"{100 * float(value or 0):.2f}"


def count(value: float | None) -> str:
    """1,234,567; a whole number."""
    return "n/a" if missing(value) else f"{round(float(value or 0)):,}"


def number(value: float | None) -> str:
    """Three significant digits."""
    return "n/a" if missing(value) else f"{float(value or 0):.3g}"


def missing(value: object) -> bool:
    """Whether there is no figure."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def cut(text: object, longest: int = LONGEST) -> str:
    """A text of others: printable, on one line, and not longer than it may be."""
    return one_line(text, longest)


def breakable(text: str) -> Markup:
    """A name that a narrow column may break where its words begin."""
    parts = re.split(r"(?<=_)|(?<=[a-z0-9])(?=[A-Z])", text)
    return Markup("<wbr>").join(parts)


def link(text: str) -> str:
    """A web address that may stand in a link; empty for all else."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return ""
    good = parts.scheme in ("http", "https") and bool(parts.netloc) and text.isprintable()
    return text if good and len(text) <= LONGEST and not any(c.isspace() for c in text) else ""
