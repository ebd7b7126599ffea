"""Which gradient breaks which row: success of the attacks through each estimator."""

from __future__ import annotations

import pandas as pd

from robustdeq.records import Status, broken
from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.grid import grid
from robustdeq.reporting.figures.rendering import rendered
from robustdeq.reporting.figures.section import Row, Section, Stage
from robustdeq.reporting.figures.style import BROKEN, styled
from robustdeq.reporting.figures.words import counted, percent, plain

ROWS, GRADIENTS = 30, 24
"""Most rows and gradients of one figure."""
NO_GRADIENT, SUBMITTED = "no gradient (scores, labels)", "submitted examples"


def estimator(stage: Stage) -> str:
    """The gradient that a stage attacks through, or that it has none."""
    if "by" in stage.spec:
        return SUBMITTED
    if stage.spec.get("needs") in ("logits", "labels"):
        return NO_GRADIENT
    return str(stage.spec.get("gradient", "honest"))


def success(section: Section) -> pd.DataFrame:
    """Counts of samples: row (position), estimator, attacked, broken; a line per pair that ran.

    A sample is attacked where it was right clean and any stage of the estimator gave an admissible
    example for it, and broken where any of these examples broke it.
    """
    lines = [
        {"row": position, "estimator": name, "attacked": len(attacked), "broken": len(fallen)}
        for position, row in enumerate(section.rows)
        for name, (attacked, fallen) in _by_estimator(row).items()
    ]
    return pd.DataFrame(lines, columns=["row", "estimator", "attacked", "broken"])


def _by_estimator(row: Row) -> dict[str, tuple[set[int], set[int]]]:
    found: dict[str, tuple[set[int], set[int]]] = {}
    for stage in row.stages():
        attacked, fallen = found.setdefault(estimator(stage), (set(), set()))
        right = stage.rows["clean_correct"].astype(bool) & (stage.rows["status"] == Status.OK)
        attacked.update(stage.rows.loc[right, "index"])
        fallen.update(stage.rows.loc[broken(stage.rows), "index"])
    return found


def attack_success(section: Section) -> list[Figure]:
    """A heat map a page of rows; none where no attack has run."""
    pages = [(page, success(page)) for page in section.pages(ROWS)]
    return [_drawn(page, counts) for page, counts in pages if counts["attacked"].sum()]


def _drawn(page: Section, counts: pd.DataFrame) -> Figure:
    counts = counts.assign(
        share=counts["broken"] / counts["attacked"].where(counts["attacked"] > 0)
    )
    common = counts.groupby("estimator")["row"].count().sort_values(ascending=False, kind="stable")
    names = [name for name in dict.fromkeys(counts["estimator"]) if name in common[:GRADIENTS]]
    cells = counts.set_index(["row", "estimator"]).unstack().reindex(range(len(page.rows)))
    shares = cells["share"][names].astype(float)
    texts = pd.DataFrame(
        [[_text(cells, row, name) for name in names] for row in range(len(page.rows))]
    )
    with styled():
        labels = [row.label() for row in page.rows]
        drawing = grid(shares, texts, labels, [plain(n, 30) for n in names], BROKEN, height=0.34)
        return rendered(drawing, _words(page, counts, len(common) - len(names)), page.foot)


def _text(cells: pd.DataFrame, row: int, name: str) -> str:
    attacked, fallen = cells["attacked"].loc[row, name], cells["broken"].loc[row, name]
    if pd.isna(attacked):
        return "n/a"
    counts = f"{fallen:.0f}/{attacked:.0f}"
    return f"{100 * fallen / attacked:.0f} %\n{counts}" if attacked else counts


def _words(page: Section, counts: pd.DataFrame, left_out: int) -> Figure:
    best = counts.loc[counts["share"].idxmax()]
    more = f" {counted(left_out, 'gradient')} that fewer rows have left out." if left_out else ""
    caption = (
        "Share of samples that the attacks through each gradient broke, of those that were right "
        "clean and that they attacked; counts below. Most attacks are given only what earlier ones "
        "left, so that a later gradient faces harder samples: a row's cells are no contest between "
        "gradients, and a share beyond 0 says that earlier attacks were not enough. Hatched, n/a: "
        f"no attack through that gradient; 0/0: none was left to attack.{more}"
    )
    alt = (
        f"Heat map of {counted(len(page.rows), 'row')} and "
        f"{counted(counts['estimator'].nunique(), 'gradient')}. "
        f"The highest success is {percent(best['share'])} of {best['attacked']} attacked samples, "
        f"through {plain(best['estimator'], 60)} on {page.rows[best['row']].label(60)}."
    )
    return Figure(
        name=page.name("attack-success"),
        title=f"Attack success by gradient: {page.where}",
        alt=alt,
        caption=caption + page.source,
        svg="",
        png=b"",
    )
