"""Publish a run in leaderboards/: its tables, provenance, page, and what README shows of it.

    robustdeq run digits --battery adaptive
    python benchmarks/publish.py out/digits

Writes leaderboards/SUITE/ with table.csv, table.md, run.json, index.html and one figure. A run
whose rows are not all there is refused, so is one of uncommitted code, and one of a suite that is
not in leaderboards/. README shows the table and the figure of the suite between its marks
<!-- leaderboard: SUITE --> ... <!-- end -->.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from robustdeq.errors import UsageError
from robustdeq.files import make_folder, write_atomically
from robustdeq.reporting.figures import Figure, figures
from robustdeq.reporting.formats import write_tables
from robustdeq.reporting.page.build import write_page
from robustdeq.reporting.page.environment import percent
from robustdeq.reporting.run import RunReport, read_run, write_index

ROOT = Path(__file__).resolve().parent.parent
BOARDS = ROOT / "leaderboards"
README = ROOT / "README.md"
PLACE = re.compile(r"(<!-- leaderboard: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = ("Rank", "Row", "Clean", "AutoAttack", "Robust (worst case)", "95 % interval", "Flags")
SHOWN = "clean-and-robust"
"""The figure that is published beside the page, by the beginning of its name."""


def published(run: RunReport, boards: Path) -> Path:
    """The folder of a run's suite, with everything in it that is published."""
    _require_whole(run, boards)
    folder = boards / run.name
    make_folder(folder)
    drawn = figures(run)
    write_tables(folder, run.name, run.verdicts)
    write_index(folder, run.data)
    write_page(run, drawn, folder / "index.html")
    for old in folder.glob("*.svg"):
        old.unlink()
    for figure in _shown(drawn):
        write_atomically(folder / f"{figure.name}.svg", figure.svg.encode())
    return folder


def _require_whole(run: RunReport, boards: Path) -> None:
    if not (boards / f"{run.name}.toml").is_file():
        raise UsageError(f"{run.name} is no suite of {boards}; publish one of ours.")
    lacking = [verdict.id for verdict in run.verdicts if verdict.status != "ok"]
    if lacking:
        raise UsageError(f"{run.folder} lacks {', '.join(lacking)}; run the suite to its end.")
    if run.data.get("git", {}).get("dirty", True):
        raise UsageError(f"{run.folder} is of code that was never committed; commit, and run it.")


def _shown(drawn: list[Figure]) -> list[Figure]:
    return [figure for figure in drawn if figure.name.startswith(SHOWN)]


def filled(text: str, tables: dict[str, pd.DataFrame]) -> str:
    """README with the tables of suites between their marks."""

    def put(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{match[1]}{_table(tables[name])}{_images(name)}{match[3]}"

    return PLACE.sub(put, text)


def _table(frame: pd.DataFrame) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *(_cells(row) for _, row in frame.iterrows())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Any) -> tuple[str, ...]:
    flags = [flag.split("=")[0].split(":")[0] for flag in str(row["flags"]).split(";")]
    return (
        "" if pd.isna(row["rank"]) else f"{row['rank']:.0f}",
        f"`{row['id']}`",
        *(percent(row[name]) for name in ("clean_acc", "autoattack_acc", "robust_acc")),
        f"{percent(row['robust_low'])} to {percent(row['robust_high'])}",
        "" if pd.isna(row["flags"]) else ", ".join(dict.fromkeys(flags)),
    )


def _images(name: str) -> str:
    paths = sorted((BOARDS / name).glob(f"{SHOWN}*.svg"))
    return "".join(
        f"\n![Clean and robust accuracy of the rows of {name}](leaderboards/{name}/{path.name})\n"
        for path in paths
    )


def held() -> dict[str, pd.DataFrame]:
    """The published tables, by suite."""
    return {path.parent.name: pd.read_csv(path) for path in BOARDS.glob("*/table.csv")}


def main() -> None:
    for argument in sys.argv[1:]:
        print(published(read_run(Path(argument)), BOARDS))
    README.write_text(filled(README.read_text(encoding="utf-8"), held()), encoding="utf-8")


if __name__ == "__main__":
    main()
