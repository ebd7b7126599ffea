"""Tables: verdicts in order, with ranks, and how they are written. Knows no torch."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import pandas as pd

from robustdeq.statistics import ranks, spread
from robustdeq.verdict import Verdict

COLUMNS = (
    "rank", "id", "defense", "dataset", "threat", "n", "clean_acc", "autoattack_acc",
    "autoattack_engine", "robust_acc", "robust_low", "robust_high", "seeds", "broken_by",
    "credit", "flags", "forward_nfe", "backward_nfe", "seconds", "peak_memory_mib",
    "weights_sha256", "track", "status", "note",
)  # fmt: skip
COST_COLUMNS = ("seconds", "peak_memory_mib")
"""Columns that differ between two computations of the same table."""
NOTES = (
    "Rank: 1 plus the number of rows of the section that are better beyond chance on the same "
    "samples (exact McNemar test at 5 %, Holm's correction over the section's pairs). Rows of one "
    "rank are tied, whatever their figures; rows on other samples are ranked apart and say so.",
    "Seeds: trainings that differ in their seed alone: robust accuracy, mean +- sample standard "
    "deviation, lowest to highest; '2 of 3' where one has no figure to rank.",
    "Credit: who submitted the examples that lowered the row.",
)
"""How `to_markdown` explains its columns."""
_UNRANKED = ("outside_ball:", "outside_box:", "nonfinite:", "incomplete_training", "unattacked")
TRACKS = {
    "deterministic": "deterministic models",
    "randomized": "randomized models",
    "no_gradient": "models without a gradient to attack",
}
"""How headings name the tracks; rows are ranked within one."""
APART = "ranked apart: on other samples than most rows of its section"
_Pool: TypeAlias = tuple[str, str, str, bytes]


def tabulate(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per verdict, most robust first within data set, threat and track.

    Ranks are those of `statistics.ranks`: rows that differ by chance alone are tied. Rows are
    compared where they were attacked on the same samples; a row on other samples than most of its
    section is ranked among its like, and its note says so. A row is not ranked where it failed,
    where an attack broke the rules of the threat and so tested nothing on some samples, or where
    its weights come from a training that was not completed; such rows stand last.
    """
    return numbered(verdicts).reset_index(drop=True)


def numbered(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """As `tabulate`; the index says which verdict a row is of."""
    pools = _pools(verdicts)
    rank = _ranks(verdicts, pools)
    apart = _apart(pools)
    frame = pd.DataFrame([verdict.as_row() for verdict in verdicts], columns=list(COLUMNS))
    frame["rank"] = pd.array([rank.get(k) for k in range(len(verdicts))], dtype="Int64")
    frame["seeds"] = [_seeds(verdict, verdicts) for verdict in verdicts]
    frame["broken_by"] = [_counts(verdict) for verdict in verdicts]
    frame["flags"] = [";".join(verdict.flags) for verdict in verdicts]
    frame["note"] = [_note(v, k in apart) for k, v in enumerate(verdicts)]
    order = sorted(range(len(verdicts)), key=lambda k: _place(verdicts[k], ranked=k in rank))
    return frame.iloc[order]


def rankable(verdict: Verdict) -> bool:
    """Whether a verdict's robust accuracy can be held against another's."""
    if verdict.status != "ok" or verdict.robust_acc is None or verdict.samples.empty:
        return False
    return not any(flag.startswith(_UNRANKED) for flag in verdict.flags)


def sample_set(verdict: Verdict) -> bytes:
    """What tells the samples of two verdicts apart: their indices and labels, in order."""
    held = verdict.samples.sort_values("index")[["index", "label"]]
    return bytes(held.to_numpy(dtype="int64").tobytes())


def _pool(verdict: Verdict) -> _Pool:
    """Verdicts of one pool can be compared."""
    return verdict.dataset, verdict.threat, verdict.track, sample_set(verdict)


def _pools(verdicts: Sequence[Verdict]) -> dict[_Pool, list[int]]:
    pools = defaultdict(list)
    for k, verdict in enumerate(verdicts):
        if rankable(verdict):
            pools[_pool(verdict)].append(k)
    return dict(pools)


def _ranks(verdicts: Sequence[Verdict], pools: dict[_Pool, list[int]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for members in pools.values():
        held = [verdicts[k].samples.sort_values("index")["robust"] for k in members]
        robust = [column.to_numpy(dtype=bool) for column in held]
        found |= dict(zip(members, ranks(robust), strict=True))
    return found


def _apart(pools: dict[_Pool, list[int]]) -> set[int]:
    """The members of all pools but the largest of their section."""
    largest: dict[tuple[str, ...], _Pool] = {}
    # Of pools of one size the one of more samples, then any that does not depend on the order.
    for pool in sorted(pools, key=lambda p: (len(pools[p]), len(p[3]), p[3])):
        largest[pool[:3]] = pool
    return {k for pool, held in pools.items() if largest[pool[:3]] != pool for k in held}


def _place(verdict: Verdict, ranked: bool) -> tuple[object, ...]:
    tracks = list(TRACKS)
    track = tracks.index(verdict.track) if verdict.track in tracks else len(tracks)
    robust = -1.0 if verdict.robust_acc is None else verdict.robust_acc
    where = (verdict.dataset, verdict.threat, track, verdict.track)
    return *where, not ranked, -robust, verdict.id


def _note(verdict: Verdict, apart: bool) -> str:
    return "; ".join(part for part in (verdict.note, APART if apart else "") if part)


def _seeds(verdict: Verdict, verdicts: Sequence[Verdict]) -> str:
    """The spread of a row's family, as in "3: 50.00 +- 2.00, 48.00 to 52.00"."""
    kin = [other for other in verdicts if _trained_alike(verdict, other)]
    if len(kin) < 2 or not rankable(verdict):
        return ""
    like = [other for other in kin if rankable(other) and _pool(other) == _pool(verdict)]
    accuracies = [100 * other.robust_acc for other in like if other.robust_acc is not None]
    count = f"{len(like)} of {len(kin)}" if len(like) < len(kin) else str(len(kin))
    if len(like) < 2:
        return count
    found = spread(accuracies)
    return f"{count}: {found.mean:.2f} +- {found.std:.2f}, {found.low:.2f} to {found.high:.2f}"


def _trained_alike(verdict: Verdict, other: Verdict) -> bool:
    if not verdict.family or verdict.training_seed is None or other.training_seed is None:
        return False
    asked = (verdict.family, verdict.dataset, verdict.threat)
    return asked == (other.family, other.dataset, other.threat)


def to_csv(table: pd.DataFrame) -> str:
    """The table as CSV; accuracies are fractions, missing figures are empty.

    A spreadsheet runs a cell that begins with one of `=+-@` as a formula. Text of others that does
    gets an apostrophe in front, which spreadsheets read as "this is text".
    """
    text = io.StringIO()
    table.map(_inert).to_csv(text, index=False, lineterminator="\n", float_format="%.6g")
    return text.getvalue()


def _inert(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    plain = "".join(c if c.isprintable() else " " for c in cell)
    return f"'{plain}" if plain.lstrip()[:1] in ("=", "+", "-", "@") and plain.strip() else plain


def to_markdown(table: pd.DataFrame, title: str, notes: Sequence[str] = ()) -> str:
    """The table as Markdown: percent with two decimals, a section per data set, threat and track.

    Args:
        table: what `tabulate` gave.
        title: the heading.
        notes: lines below the table, before those on ranks, seeds and credit.
    """
    lines = [f"# {escaped(title)}", ""]
    for (dataset, threat, track), rows in table.groupby(["dataset", "threat", "track"], sort=False):
        told = f"{dataset}, {threat}, {TRACKS.get(track, f'{track} models')}"
        lines += [f"## {escaped(told)}", ""]
        lines += ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
        lines += ["| " + " | ".join(_markdown_cells(row)) + " |" for _, row in rows.iterrows()]
        lines.append("")
    lines += [f"- {note}" for note in (*notes, *NOTES)]
    return "\n".join(lines) + "\n"


_HEADINGS = (
    "Rank", "ID", "Defense", "n", "Clean", "AutoAttack", "Robust (worst case)", "95 % interval",
    "Seeds", "First broken by", "Credit", "Flags", "NFE forward / backward", "Seconds",
)  # fmt: skip


def _markdown_cells(row: pd.Series) -> list[str]:
    interval = "n/a"
    if not pd.isna(row["robust_low"]):
        interval = f"{_percent(row['robust_low'])} to {_percent(row['robust_high'])}"
    cells = (
        "" if pd.isna(row["rank"]) else str(row["rank"]),
        row["id"],
        row["defense"],
        str(row["n"]),
        _percent(row["clean_acc"]),
        _percent(row["autoattack_acc"]) + _engine(row["autoattack_engine"]),
        _percent(row["robust_acc"]),
        interval,
        row["seeds"],
        row["broken_by"].replace(";", "; "),
        row["credit"],
        remarks(row),
        f"{short(row['forward_nfe'])} / {short(row['backward_nfe'])}",
        f"{row['seconds']:.1f}",
    )
    return [escaped(cell) for cell in cells]


def _engine(name: str) -> str:
    return "" if name in ("", "reference") else f" ({name})"


def remarks(row: pd.Series) -> str:
    """What is to be said of a row of a table: its flags, its status where it failed, its note."""
    note = row["note"] if row["status"] == "ok" else f"{row['status']}: {row['note']}"
    return "; ".join(part for part in (row["flags"].replace(";", "; "), note) if part)


def _counts(verdict: Verdict) -> str:
    ordered = sorted(verdict.broken_by.items(), key=lambda item: (-item[1], item[0]))
    return ";".join(f"{name}={count}" for name, count in ordered)


def _percent(value: float | None) -> str:
    return "n/a" if value is None or pd.isna(value) else f"{100 * value:.2f}"


def short(count: int) -> str:
    """12.3M, 4.5k and the like."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def escaped(text: str) -> str:
    """Text on one line that cannot end a Markdown cell or start markup of its own."""
    for mark in ("\\", "|", "<", ">", "`", "*", "[", "]", "_"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
