"""Rows compared for a reader: a paragraph to quote and the flipped samples. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from robustdeq.bounded import read_json
from robustdeq.comparison import Comparison, compare, flips_table, paragraph
from robustdeq.errors import UsageError, unknown
from robustdeq.reporting.page.environment import cut, environment
from robustdeq.reporting.rows import pair_named, title
from robustdeq.reporting.run import RunReport, read_run
from robustdeq.tables import escaped
from robustdeq.verdict import Verdict

FORMATS = ("text", "md", "html")
_NAME = 80
"""Characters that a name of others may take."""


@dataclass(frozen=True, eq=False)
class Compared:
    """Two rows in words.

    Attributes:
        text: what a paper could quote.
        notes: why these rows, and what to mind.
        flips: see `comparison.flips_table`.
    """

    heading: str
    text: str
    notes: tuple[str, ...]
    flips: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Report:
    """All that was compared; `left_out`: rows that were not, with the reason."""

    heading: str
    parts: tuple[Compared, ...]
    left_out: tuple[str, ...] = ()


def compare_rows(run: RunReport, a: str, b: str, threat: str = "") -> Report:
    """Two rows of a run (merged, if it is of several folders) by their names.

    Raises:
        UsageError: if the names leave a choice, or the rows cannot be compared.
    """
    pair = pair_named(run, a, b, threat)
    part = _compared((run, pair.a), (run, pair.b), [pair.reason] if pair.reason else [])
    return Report(part.heading, (part,))


def compare_runs(a: Path, b: Path, threat: str = "") -> Report:
    """All rows that two folders both have, row by row.

    Raises:
        UsageError: if a folder holds no run, or they have no row in common.
    """
    runs = read_run(a), read_run(b)
    if runs[0].folder.resolve() == runs[1].folder.resolve():
        raise UsageError(f"{a} and {b} are one run; name two.")
    places = [{title(run, k): k for k in range(len(run.verdicts))} for run in runs]
    wanted = [name for name, k in places[0].items() if _under(runs[0], k, threat)]
    shared = [name for name in wanted if name in places[1]]
    if not shared:
        raise UsageError(f"{a} and {b} have no row in common; name runs of one suite.")
    parts, left_out = [], []
    for name in shared:
        try:
            parts.append(_compared((runs[0], places[0][name]), (runs[1], places[1][name]), []))
        except UsageError as cause:
            left_out.append(cut(f"{name}: {cause}"))
    if not parts:
        raise UsageError(f"no row of {a} and {b} can be compared, the first: {left_out[0]}")
    alone = [(a, name) for name in wanted if name not in places[1]]
    alone += [
        (b, name)
        for name, k in places[1].items()
        if name not in places[0] and _under(runs[1], k, threat)
    ]
    left_out += [cut(f"{name}: in {folder} alone") for folder, name in alone]
    return Report(f"{a} against {b}", tuple(parts), tuple(left_out))


def find_runs(names: Sequence[str], out: Path) -> list[Path]:
    """The run below a folder that has rows of all names; that of the digits first.

    Raises:
        UsageError: if none has, or several have and none is that of the digits.
    """
    found = sorted(path.parent for path in out.glob("*/run.json") if _has(path, names))
    usual = [folder for folder in found if folder.name == "digits"]
    if len(found) == 1 or usual:
        return usual or found
    wanted = " and ".join(map(repr, names))
    if found:
        told = ", ".join(map(str, found))
        raise UsageError(f"{wanted} are rows of several runs ({told}); name one with --runs.")
    raise UsageError(
        f"no run in {out} has both {wanted}; name its folder with --runs, or make one with "
        "'robustdeq run'."
    )


def _has(index: Path, names: Sequence[str]) -> bool:
    """Whether a run has a row of each ID, title or defense, without reading its records."""
    try:
        cases = [row["case"] for row in read_json(index)["rows"]]
        held = {
            name
            for case in cases
            for name in (
                case["id"],
                case["defense"],
                f"{case['id']} on {case['dataset']} under {case['threat']}",
            )
        }
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return set(names) <= held


def render(report: Report, form: str) -> str:
    """The report as text, as Markdown, or as a page of its own.

    Raises:
        UsageError: for a format that is not known.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    return {"text": _as_text, "md": _as_markdown, "html": _as_page}[form](report)


def _under(run: RunReport, row: int, threat: str) -> bool:
    return threat in ("", run.verdicts[row].threat)


def _compared(a: tuple[RunReport, int], b: tuple[RunReport, int], notes: Sequence[str]) -> Compared:
    _require_one_data_set(a, b)
    origins = [run.origin(row) for run, row in (a, b)]
    shown = [_shown(run.verdicts[row]) for run, row in (a, b)]
    if shown[0].id == shown[1].id:
        pairs = zip(shown, origins, strict=True)
        shown = [replace(v, id=f"{v.id} of {cut(o.folder, _NAME)}") for v, o in pairs]
    found = compare(*shown)
    if len({str(origin) for origin in origins}) > 1:
        told = " and ".join(str(origin) for origin in origins)
        notes = [*notes, f"the rows are of two runs: {told}"]
    heading = f"{found.a.id} against {found.b.id} on {found.a.dataset}, {found.a.threat}"
    return Compared(heading, paragraph(found), tuple(map(cut, notes)), _flips(found))


def _require_one_data_set(a: tuple[RunReport, int], b: tuple[RunReport, int]) -> None:
    (dataset, of_a), (_, of_b) = (
        (run.verdicts[row].dataset, run.evidences[row].case.get("digest")) for run, row in (a, b)
    )
    samples = [run.verdicts[row].n for run, row in (a, b)]
    if of_a != of_b and samples[0] == samples[1] and None not in (of_a, of_b):
        names = [title(run, row) for run, row in (a, b)]
        raise UsageError(
            f"{names[0]} and {names[1]} were evaluated on different images under the name "
            f"{dataset}; run both on one data set."
        )


def _shown(verdict: Verdict) -> Verdict:
    """The verdict with all words of others on one line and no longer than they may be."""
    samples = verdict.samples.copy()
    if len(samples):
        named = samples["broken_by"].map(lambda by: None if pd.isna(by) else cut(by, _NAME))
        samples["broken_by"] = named.astype(object)
    return replace(
        verdict,
        id=cut(verdict.id, _NAME),
        defense=cut(verdict.defense, _NAME),
        flags=tuple(cut(flag) for flag in verdict.flags),
        note=cut(verdict.note),
        samples=samples,
    )


def _flips(found: Comparison) -> pd.DataFrame:
    return flips_table(found).sort_values("Sample").reset_index(drop=True)


def _as_text(report: Report) -> str:
    parts = [_lines(part, part.flips.to_string(index=False)) for part in report.parts]
    return "\n".join([*parts, *_left_out(report, "")])


def _lines(part: Compared, table: str) -> str:
    notes = [f"({note})" for note in part.notes]
    flips = f"\n{table}\n" if len(part.flips) else ""
    return "\n".join([part.text, *notes]) + "\n" + flips


def _as_markdown(report: Report) -> str:
    lines = [f"# {escaped(report.heading)}", ""]
    for part in report.parts:
        lines += [f"## {escaped(part.heading)}", ""] if len(report.parts) > 1 else []
        lines += [escaped(part.text), ""]
        lines += [f"- {escaped(note)}" for note in part.notes] + [""] * bool(part.notes)
        lines += [*_markdown_table(part.flips), ""] if len(part.flips) else []
    return "\n".join([*lines, *_left_out(report, "- ", escaped)]).rstrip() + "\n"


def _markdown_table(flips: pd.DataFrame) -> Iterable[str]:
    yield "| " + " | ".join(flips.columns) + " |"
    yield "|" + "---|" * len(flips.columns)
    for row in flips.itertuples(index=False):
        yield "| " + " | ".join(escaped(str(cell)) for cell in row) + " |"


def _left_out(report: Report, mark: str, form: Any = str) -> list[str]:
    return [f"{mark}not compared: {form(line)}" for line in report.left_out]


def _as_page(report: Report) -> str:
    return environment().get_template("compare.html.j2").render(report=report) + "\n"
