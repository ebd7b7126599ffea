"""What each attack leaves: accuracy after every stage of the chain, from clean to worst case."""

from __future__ import annotations

import pandas as pd

from robustdeq.records import broken
from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.grid import grid
from robustdeq.reporting.figures.rendering import rendered
from robustdeq.reporting.figures.section import Row, Section
from robustdeq.reporting.figures.style import CLEAN, styled
from robustdeq.reporting.figures.words import counted, percent, plain

ROWS, STAGES = 40, 24
"""Most rows and attacks of one figure."""
_FIRST, _LAST = ("", "clean"), ("", "worst case")


def accuracy_left(section: Section) -> pd.DataFrame:
    """Shares of all samples: a row per row, a column (kind, stage) in the order of the chain.

    The kind is "" for clean and worst case, else "attack". Each stage's share is that of samples
    which it and all before it left right; NaN where it did not run on all samples.
    """
    held = [_left(row) for row in section.rows]
    # The rows with the most stages first: where they agree on the order, all columns follow it.
    order = dict.fromkeys(key for one in sorted(held, key=len, reverse=True) for key in one)
    stages = [key for key in order if key[0]]
    columns = pd.MultiIndex.from_tuples([_FIRST, *stages, _LAST], names=["kind", "stage"])
    rows = [[one.get(key) for key in columns] for one in held]
    return pd.DataFrame(rows, columns=columns, dtype=float)


def _left(row: Row) -> dict[tuple[str, str], float]:
    clean = row.clean()
    if clean.empty:
        return {}
    standing = pd.Series(clean["clean_correct"].to_numpy(dtype=bool), index=clean["index"])
    left = {_FIRST: float(standing.mean())}
    for stage in row.stages():
        standing &= ~standing.index.isin(stage.rows.loc[broken(stage.rows), "index"])
        left["attack", stage.label] = float(standing.mean())
    if row.verdict.robust_acc is not None:
        left[_LAST] = row.verdict.robust_acc
    return left


def robust_by_attack(section: Section) -> list[Figure]:
    """A heat table a page of rows; none where no attack has run."""
    pages = [(page, accuracy_left(page)) for page in section.pages(ROWS)]
    return [_drawn(page, table) for page, table in pages if table.shape[1] > 2]


def _drawn(page: Section, whole: pd.DataFrame) -> Figure:
    table = _strongest(whole)
    texts = table.map(lambda share: "n/a" if pd.isna(share) else f"{100 * share:.1f}")
    heads = [plain(stage, 30) for _, stage in table.columns]
    with styled():
        drawing = grid(table, texts, [row.label() for row in page.rows], heads, CLEAN)
        axes = drawing.axes[0]
        for edge in (1, len(heads) - 1):
            axes.axvline(edge, color="white", linewidth=5)
        return rendered(drawing, _words(page, table, whole.shape[1] - table.shape[1]), page.foot)


def _strongest(table: pd.DataFrame) -> pd.DataFrame:
    """Without the attacks that broke least, where there are too many."""
    broke = -table.ffill(axis=1).diff(axis=1).sum().iloc[1:-1]
    kept = set(broke.sort_values(ascending=False, kind="stable").index[:STAGES])
    return table[[key for key in table.columns if key in kept or not key[0]]]


def _words(page: Section, table: pd.DataFrame, left_out: int) -> Figure:
    worst = table[_LAST]
    more = f" {counted(left_out, 'attack')} that broke the least left out." if left_out else ""
    alt = f"Heat table of {counted(len(table), 'row')} and {counted(table.shape[1] - 2, 'attack')}."
    if worst.notna().any():
        alt += (
            f" Worst-case robust accuracy from {percent(worst.min())} to {percent(worst.max())};"
            f" clean accuracy from {percent(table[_FIRST].min())} to"
            f" {percent(table[_FIRST].max())}."
        )
    caption = (
        "Accuracy in percent that is left after each attack and all before it, from left to right; "
        "the worst case is what no attack broke. Later attacks were given what earlier ones left, "
        f"if they did not ask for all samples. n/a: did not run on the row, or failed.{more}"
    )
    return Figure(
        name=page.name("robust-by-attack"),
        title=f"Robust accuracy by attack: {page.where}",
        alt=alt,
        caption=caption + page.source,
        svg="",
        png=b"",
    )
