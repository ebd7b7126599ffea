"""What `robustdeq list` shows."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from robustdeq.errors import UsageError, sentence
from robustdeq.interfaces import Kind, about_of
from robustdeq.keys import canonical
from robustdeq.registry import plugin_class, registered
from robustdeq.texts import one_line


def listed(kind: str) -> list[dict[str, Any]]:
    """One row per name; a plugin that cannot be loaded has its cause under "error"."""
    if kind == "datasets":
        return _datasets()
    if kind == "suites":
        return _suites()
    return [
        _plugin(cast("Kind", kind.removesuffix("s")), name)
        for name in registered(cast("Kind", kind.removesuffix("s")))
    ]


def _plugin(kind: Kind, name: str) -> dict[str, Any]:
    entry = registered(kind)[name]
    row: dict[str, Any] = {"name": name, "from": f"{entry.distribution} {entry.version}"}
    try:
        cls = plugin_class(kind, name)
    except UsageError as cause:
        return {**row, "error": sentence(cause)}
    told = about_of(cls)
    first = (cls.__doc__ or "").strip().split("\n")[0]
    row["about"] = told.pop("title", "") or one_line(first)
    row |= told
    row["parameters"] = {
        f.name: _plain(f.default)
        for f in dataclasses.fields(cls)
        if f.default is not dataclasses.MISSING
    }
    return row


def _plain(value: Any) -> Any:
    """A parameter's default as JSON data; what has no such form as its text."""
    try:
        return canonical(value)
    except TypeError:
        return one_line(value)


def _suites() -> list[dict[str, Any]]:
    from robustdeq.suite import find_suite, suite_names

    rows = []
    for name in suite_names():
        suite = find_suite(name)
        rows.append(
            {
                "name": name,
                "about": suite.description,
                "datasets": ", ".join(d.name for d in suite.datasets),
                "threats": ", ".join(suite.threats),
                "rows": len(suite.defenses),
            }
        )
    return rows


def _datasets() -> list[dict[str, Any]]:
    from robustdeq.datasets import dataset_names, where_to_get

    return [
        {"name": name, "get": "comes with scikit-learn" if name == "digits" else where_to_get(name)}
        for name in dataset_names()
    ]
