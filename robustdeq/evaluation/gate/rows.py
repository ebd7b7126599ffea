"""The rows of a checks record: what was measured, against what, and with which outcome."""

from __future__ import annotations

import math
from typing import Any

from robustdeq.evaluation.gate.rules import RULES

Row = dict[str, Any]
"""A row of `records.CHECK_SCHEMA`."""


def check(
    name: str,
    value: float,
    threshold: float,
    n: int,
    reference: str = "",
    detail: str = "",
    *,
    at_least: bool = False,
) -> Row:
    """A measurement held against a threshold; NaN fails."""
    kept = value >= threshold if at_least else value <= threshold
    return _row(name, value, threshold, n, "passed" if kept else "failed", reference, detail)


def measured(name: str, value: float, n: int, detail: str = "", limit: float | None = None) -> Row:
    """A measurement held against its rule in `RULES`; `limit` stands in for the rule's own."""
    rule = RULES[name]
    threshold = rule.limit if limit is None else limit
    return check(name, value, threshold, n, rule.reference, detail, at_least=rule.at_least)


def noted(name: str, value: float, n: int, reference: str, detail: str = "") -> Row:
    """A measurement that is shown and never a flag."""
    return _row(name, value, math.nan, n, "info", reference, detail)


def skipped(name: str, reason: str) -> Row:
    """A check that does not apply, and why."""
    return _row(name, math.nan, RULES[name].limit, 0, "skipped", RULES[name].reference, reason)


def not_measured(name: str, reason: str) -> Row:
    """A check that the model itself made impossible, which is a failure of the model."""
    return _row(name, math.nan, RULES[name].limit, 0, "failed", RULES[name].reference, reason)


def _row(
    name: str, value: float, threshold: float, n: int, status: str, reference: str, detail: str
) -> Row:
    return {
        "name": name,
        "value": value,
        "threshold": threshold,
        "n": n,
        "status": status,
        "reference": reference,
        "detail": detail,
    }
