"""Tables: verdicts in order, with ranks, and how they are written. Knows no torch."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pandas as pd

from robustdeq.verdict import Verdict

COLUMNS = (
    "rank", "id", "defense", "dataset", "threat", "n", "clean_acc", "autoattack_acc",
    "robust_acc", "robust_low", "robust_high", "broken_by", "flags", "forward_nfe",
    "backward_nfe", "seconds", "peak_memory_mib", "weights_sha256", "track", "status", "note",
)  # fmt: skip
COST_COLUMNS = ("seconds", "peak_memory_mib")
"""Columns that differ between two computations of the same table."""
_PERCENT = ("clean_acc", "autoattack_acc", "robust_acc", "robust_low", "robust_high")
_UNRANKED = ("outside_ball:", "outside_box:", "nonfinite:", "incomplete_training")


def tabulate(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per verdict, best first within data set, threat and track.

    Rows of equal robust accuracy share a rank. A row is not ranked where it failed, where an
    attack broke the rules of the threat and so tested nothing on some samples, or where its weights
    come from a training that was not completed.
    """
    frame = pd.DataFrame([verdict.as_row() for verdict in verdicts], columns=list(COLUMNS))
    ranked = pd.Series([_rankable(verdict) for verdict in verdicts], index=frame.index, dtype=bool)
    groups = frame[ranked].groupby(["dataset", "threat", "track"])["robust_acc"]
    ranks = groups.rank(method="min", ascending=False)
    frame["rank"] = ranks.reindex(frame.index).astype("Int64")
    frame["broken_by"] = [_counts(verdict) for verdict in verdicts]
    frame["flags"] = [";".join(verdict.flags) for verdict in verdicts]
    order = frame.assign(_unranked=frame["rank"].isna())
    order = order.sort_values(
        ["dataset", "threat", "track", "_unranked", "rank", "id"], kind="stable"
    )
    return order[list(COLUMNS)].reset_index(drop=True)


def to_csv(table: pd.DataFrame) -> str:
    """The table as CSV; accuracies are fractions, missing figures are empty."""
    text = io.StringIO()
    table.to_csv(text, index=False, lineterminator="\n", float_format="%.6g")
    return text.getvalue()


def to_markdown(table: pd.DataFrame, title: str, notes: Sequence[str] = ()) -> str:
    """The table as Markdown, percent with two decimals, one section per data set and threat."""
    lines = [f"# {title}", ""]
    for (dataset, threat, track), rows in table.groupby(["dataset", "threat", "track"], sort=True):
        lines += [f"## {dataset}, {threat}, {track} models", ""]
        lines += ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
        lines += ["| " + " | ".join(_markdown_cells(row)) + " |" for _, row in rows.iterrows()]
        lines.append("")
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines).rstrip() + "\n"


_HEADINGS = (
    "Rank", "ID", "Defense", "n", "Clean", "AutoAttack", "Robust (worst case)", "95 % interval",
    "First broken by", "Flags", "NFE forward / backward", "Seconds",
)  # fmt: skip


def _markdown_cells(row: pd.Series) -> list[str]:
    interval = "n/a"
    if not pd.isna(row["robust_low"]):
        interval = f"{_percent(row['robust_low'])} to {_percent(row['robust_high'])}"
    flags = row["flags"].replace(";", "; ")
    if row["status"] != "ok":
        flags = "; ".join(part for part in (flags, f"{row['status']}: {row['note']}") if part)
    cells = (
        "" if pd.isna(row["rank"]) else str(row["rank"]),
        row["id"],
        row["defense"],
        str(row["n"]),
        _percent(row["clean_acc"]),
        _percent(row["autoattack_acc"]),
        _percent(row["robust_acc"]),
        interval,
        row["broken_by"].replace(";", "; "),
        flags,
        f"{_short(row['forward_nfe'])} / {_short(row['backward_nfe'])}",
        f"{row['seconds']:.1f}",
    )
    return [_escaped(cell) for cell in cells]


def _rankable(verdict: Verdict) -> bool:
    if verdict.status != "ok" or verdict.robust_acc is None:
        return False
    return not any(flag.startswith(_UNRANKED) for flag in verdict.flags)


def _counts(verdict: Verdict) -> str:
    ordered = sorted(verdict.broken_by.items(), key=lambda item: (-item[1], item[0]))
    return ";".join(f"{name}={count}" for name, count in ordered)


def _percent(value: float | None) -> str:
    return "n/a" if value is None or pd.isna(value) else f"{100 * value:.2f}"


def _short(count: int) -> str:
    """12.3M, 4.5k and the like."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _escaped(text: str) -> str:
    """Text that cannot end a Markdown cell or start markup of its own."""
    for mark in ("\\", "|", "<", ">", "`", "*", "[", "]", "_"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
