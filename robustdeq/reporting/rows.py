"""Which rows of a run somebody means: by ID, by title, or by the handle of the plugin. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from robustdeq.errors import UsageError, unknown
from robustdeq.reporting.run import RunReport

_LISTED = 20
"""How many rows an error offers to choose from."""


@dataclass(frozen=True)
class Pair:
    """Two rows to compare, by their places; `reason`: why these, where the words left a choice."""

    a: int
    b: int
    reason: str = ""


def title(run: RunReport, row: int) -> str:
    """The row's name, unique in a run that is not merged."""
    verdict = run.verdicts[row]
    return f"{verdict.id} on {verdict.dataset} under {verdict.threat}"


def rows_named(run: RunReport, name: str, threat: str = "") -> list[int]:
    """The rows of that title or ID, else those of that defense.

    Raises:
        UsageError: if there is none, with the nearest name; or none under that threat.
    """
    known = range(len(run.verdicts))
    of_id = [k for k in known if name in (run.verdicts[k].id, title(run, k))]
    found = of_id or [k for k in known if run.verdicts[k].defense == name]
    if not found:
        names = {v.id for v in run.verdicts} | {v.defense for v in run.verdicts}
        raise unknown("row", name, names)
    under = [k for k in found if threat in ("", run.verdicts[k].threat)]
    if not under:
        threats = ", ".join(sorted({run.verdicts[k].threat for k in found}))
        raise UsageError(f"{name!r} has no row under {threat}; its threats are: {threats}.")
    return under


def row_named(run: RunReport, name: str, threat: str = "") -> int:
    """The one row of that name.

    Raises:
        UsageError: if there is none, or more than one.
    """
    found = rows_named(run, name, threat)
    if len(found) > 1:
        raise _several(run, [(name, found)])
    return found[0]


def pair_named(run: RunReport, a: str, b: str, threat: str = "") -> Pair:
    """The two rows that two names mean.

    Where a name has several rows, those that answer one question (data set and threat) are taken;
    of these the ones that were trained by the same recipe for the same threat.

    Raises:
        UsageError: if a name has no row, or a choice is left.
    """
    first, second = rows_named(run, a, threat), rows_named(run, b, threat)
    pairs = [pair for pair in product(first, second) if pair[0] != pair[1]]
    if not pairs:
        raise UsageError(f"{a!r} and {b!r} are one row; name two.")
    asked = [pair for pair in pairs if _question(run, pair[0]) == _question(run, pair[1])]
    for chosen in (pairs, asked):
        if len(chosen) == 1:
            return Pair(*chosen[0])
    alike = [
        pair for pair in asked if _training(run, pair[0]) == _training(run, pair[1]) != ("", "")
    ]
    if len(alike) != 1:
        raise _several(run, [(a, first), (b, second)])
    return Pair(*alike[0], _reason(run, alike[0], [(a, first), (b, second)]))


def _question(run: RunReport, row: int) -> tuple[str, str]:
    return run.verdicts[row].dataset, run.verdicts[row].threat


def _training(run: RunReport, row: int) -> tuple[str, str]:
    """A row's recipe and the threat it was trained for, as the suite says; empty if it does not."""
    training = run.entry(row).get("training") or {}
    recipe = str(training.get("recipe", ""))
    return (recipe, str(training.get("threat") or run.verdicts[row].threat)) if recipe else ("", "")


def _reason(run: RunReport, pair: tuple[int, int], named: Sequence[tuple[str, list[int]]]) -> str:
    recipe, threat = _training(run, pair[0])
    chosen = [
        f"of the {len(rows)} rows that {name!r} names, {run.verdicts[row].id}"
        for row, (name, rows) in zip(pair, named, strict=True)
        if len(rows) > 1
    ]
    return f"chosen {' and '.join(chosen)}: both were trained by {recipe} under {threat}"


def _several(run: RunReport, named: Sequence[tuple[str, list[int]]]) -> UsageError:
    told = [
        f"{name!r} names {len(rows)} rows ({_listed(run, rows)})"
        for name, rows in named
        if len(rows) > 1
    ]
    return UsageError(f"{' and '.join(told)}; write an ID, or add --threat or --runs.")


def _listed(run: RunReport, rows: Sequence[int]) -> str:
    ids = [run.verdicts[row].id for row in rows]
    told = ids if len(set(ids)) == len(ids) else [_placed(run, row) for row in rows]
    more = f", and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
    return ", ".join(told[:_LISTED]) + more


def _placed(run: RunReport, row: int) -> str:
    return title(run, row) + (f" in {run.origin(row).folder}" if run.origins else "")
