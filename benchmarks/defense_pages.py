"""Write the ablation tables into docs/*.md, from the table of the suite digits-ablations.

robustdeq run digits-ablations
cp out/digits-ablations/table.csv leaderboards/digits-ablations.csv
python benchmarks/defense_pages.py

A page says where its table goes and which rows are in it, by the beginnings of their IDs:
<!-- rows: PREFIX PREFIX --> ... <!-- end -->
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "leaderboards" / "digits-ablations.csv"
PLACE = re.compile(r"(<!-- rows: (?P<prefixes>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = (
    "| Row | Seeds | Clean | AutoAttack | Robust (worst case) | Lowest to highest | Flags |\n"
    "|---|---|---|---|---|---|---|\n"
)


def variants(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per variant: means over seeds."""
    frame = frame.assign(variant=frame["id"].str.replace(r"_seed\d+$", "", regex=True))
    groups = frame.groupby("variant", sort=False)
    out = groups[["clean_acc", "autoattack_acc", "robust_acc"]].mean()
    out["low"], out["high"] = groups["robust_acc"].min(), groups["robust_acc"].max()
    out["seeds"] = groups.size()
    out["flags"] = groups["flags"].agg(lambda flags: "; ".join(sorted(set(names(flags)))))
    return out.sort_values("robust_acc", ascending=False, kind="stable")


def names(flags: pd.Series) -> list[str]:
    """The names of the flags of some rows, without their figures."""
    return [flag.split("=")[0] for text in flags.fillna("") for flag in text.split(";") if flag]


def table(frame: pd.DataFrame, prefixes: list[str]) -> str:
    """The Markdown table of the variants whose IDs begin so."""
    rows = variants(frame)
    lines = []
    for name, row in rows[[str(i).startswith(tuple(prefixes)) for i in rows.index]].iterrows():
        figures = [f"{100 * row[c]:.1f}" for c in ("clean_acc", "autoattack_acc", "robust_acc")]
        spread = f"{100 * row['low']:.0f} to {100 * row['high']:.0f}" if row["seeds"] > 1 else ""
        cells = [f"`{name}`", str(row["seeds"]), *figures, spread, row["flags"]]
        lines.append("| " + " | ".join(cells) + " |\n")
    return HEAD + "".join(lines)


def filled(page: str, frame: pd.DataFrame) -> str:
    """A page with its tables."""

    def place(match: re.Match[str]) -> str:
        return match[1] + table(frame, match["prefixes"].split()) + match[3]

    return PLACE.sub(place, page)


def main() -> None:
    frame = pd.read_csv(TABLE)
    for path in sorted((ROOT / "docs").glob("*.md")):
        path.write_text(filled(path.read_text(encoding="utf-8"), frame), encoding="utf-8")


if __name__ == "__main__":
    main()
