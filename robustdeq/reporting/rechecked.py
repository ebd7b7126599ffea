"""A suite under two seeds: does a figure stay inside of its interval? Knows no torch.

The weights and the samples are the same, so that only what is drawn can move a figure: starts of
attacks, random searches, the draws of a randomized model. What was submitted is left out, for it
belongs to one run alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from robustdeq.files import write_atomically
from robustdeq.reporting.page.environment import cut
from robustdeq.reporting.rows import title
from robustdeq.reporting.run import RunReport
from robustdeq.reporting.sums import RECHECK, write_sums
from robustdeq.statistics import Interval, Paired, paired, wilson
from robustdeq.tables import escaped, sample_set, to_csv
from robustdeq.verdict import Evidence, Verdict, autoattack_correct, judge_evidence

_NAME = 60
_NOTES = (
    "First, Second: percent under the first and the second seed, on the same samples with the same "
    "weights; Interval: 95 % Wilson interval of the first.",
    "Change: second minus first in points, with the 95 % interval of the paired bootstrap and the "
    "p of the exact McNemar test; Fell, Rose: samples that only the second seed broke, or only "
    "the first.",
    "Either: percent that neither seed broke. A broken sample stays broken, so that this is the "
    "figure to quote.",
)


@dataclass(frozen=True)
class Figure:
    """One accuracy under two seeds, as fractions.

    Attributes:
        first, second: the accuracy under each seed; `interval` is Wilson's of the first.
        change: second minus first on the same samples: `only_b` samples fell, `only_a` rose.
        either: share of samples that neither seed broke.
    """

    first: float
    second: float
    interval: Interval
    change: Paired
    either: float

    @property
    def inside(self) -> bool:
        """Whether the second lies in the interval of the first."""
        return self.interval.low <= self.second <= self.interval.high


@dataclass(frozen=True)
class Row:
    """One row; a figure that one of the runs lacks is left out, with a reason if none is left."""

    id: str
    dataset: str
    threat: str
    n: int
    figures: dict[str, Figure]
    reason: str = ""

    @property
    def title(self) -> str:
        """The row's name in a sentence."""
        return f"{cut(self.id, _NAME)} on {cut(self.dataset, _NAME)} under {self.threat}"


class Rechecked(NamedTuple):
    """All rows of the first run, with the seeds of both."""

    name: str
    seeds: tuple[int, int]
    rows: tuple[Row, ...]

    def outside(self) -> list[str]:
        """A sentence per figure that does not stay inside; empty where all do."""
        return [
            f"{row.title}: {name} is {_percent(found.second)} under seed {self.seeds[1]}, outside "
            f"of {_percent(found.interval.low)} to {_percent(found.interval.high)}, its interval "
            f"under seed {self.seeds[0]}; quote {_percent(found.either)}, which neither seed broke."
            for row in self.rows
            for name, found in row.figures.items()
            if not found.inside
        ]

    def summary(self) -> str:
        """One sentence on how many figures stay inside."""
        held = [found for row in self.rows for found in row.figures.values()]
        left_out = [row.title for row in self.rows if not row.figures]
        words = f"; not rechecked: {', '.join(left_out)}" if left_out else ""
        return (
            f"{sum(f.inside for f in held)} of {len(held)} figures stay inside of their interval "
            f"under seed {self.seeds[1]}{words}"
        )


def recheck(first: RunReport, again: RunReport) -> Rechecked:
    """Hold the rows of a run against the same rows under another seed."""
    places = {title(again, k): k for k in range(len(again.verdicts))}
    own = [k for k, row in enumerate(first.data["rows"]) if "submission" not in row]
    rows = [_row(first, k, again, places.get(title(first, k))) for k in own]
    return Rechecked(first.name, (int(first.data["seed"]), int(again.data["seed"])), tuple(rows))


def _row(first: RunReport, k: int, again: RunReport, other: int | None) -> Row:
    evidences = [_own(first.evidences[k])]
    evidences += [_own(again.evidences[other])] if other is not None else []
    verdicts = [judge_evidence(evidence) for evidence in evidences]
    a = verdicts[0]
    row = Row(a.id, a.dataset, a.threat, a.n, {})
    reason = _unlike(verdicts)
    if reason:
        return replace(row, reason=reason)
    robust = [v.samples.set_index("index")["robust"].astype(bool) for v in verdicts]
    auto = [autoattack_correct(e, v.track) for e, v in zip(evidences, verdicts, strict=True)]
    pairs = {"robust accuracy": robust, "AutoAttack accuracy": auto}
    return replace(row, figures={n: _figure(*pair) for n, pair in pairs.items() if _both(pair)})


def _own(evidence: Evidence) -> Evidence:
    """The evidence without what others have submitted."""
    return replace(evidence, records=tuple(r for r in evidence.records if "by" not in r.meta.stage))


def _unlike(verdicts: Sequence[Verdict]) -> str:
    """Why two rows cannot be held against each other; empty where they can."""
    if len(verdicts) < 2:
        return "the second run lacks it"
    for verdict, which in zip(verdicts, ("first", "second"), strict=True):
        if verdict.robust_acc is None:
            return f"{which} run: {verdict.note or verdict.status}"
    a, b = verdicts
    if a.weights_sha256 != b.weights_sha256:
        return "its weights depend on the seed: these are two models"
    same = sample_set(a) == sample_set(b)
    return "" if same else "the two runs have different samples"


def _both(pair: Sequence[Any]) -> bool:
    return all(part is not None for part in pair)


def _figure(first: pd.Series, second: pd.Series) -> Figure:
    a, b = first.sort_index().to_numpy(dtype=bool), second.sort_index().to_numpy(dtype=bool)
    return Figure(
        first=float(a.mean()),
        second=float(b.mean()),
        interval=wilson(int(a.sum()), len(a)),
        change=_reversed(paired(a, b)),
        either=float((a & b).mean()),
    )


def _reversed(found: Paired) -> Paired:
    """Second minus first, where `paired` has first minus second."""
    return found._replace(difference=-found.difference, low=-found.high, high=-found.low)


def table(found: Rechecked) -> pd.DataFrame:
    """A line per row and figure, as fractions; missing figures are missing."""
    return pd.DataFrame(_lines(found), columns=list(_COLUMNS))


_COLUMNS = (
    "id", "dataset", "threat", "n", "figure", "first_seed", "second_seed", "first", "low", "high",
    "second", "change", "change_low", "change_high", "p_value", "fell", "rose", "either", "inside",
    "note",
)  # fmt: skip


def _lines(found: Rechecked) -> Iterator[dict[str, Any]]:
    for row in found.rows:
        head = {
            "id": row.id, "dataset": row.dataset, "threat": row.threat, "n": row.n,
            "first_seed": found.seeds[0], "second_seed": found.seeds[1], "note": row.reason,
        }  # fmt: skip
        for name, figure in row.figures.items():
            change = figure.change
            yield head | {
                "figure": name, "first": figure.first, "low": figure.interval.low,
                "high": figure.interval.high, "second": figure.second,
                "change": change.difference, "change_low": change.low, "change_high": change.high,
                "p_value": change.p_value, "fell": change.only_a, "rose": change.only_b,
                "either": figure.either, "inside": figure.inside,
            }  # fmt: skip
        if not row.figures:
            yield head


_HEADINGS = (
    "Row", "Figure", "n", "First", "Interval", "Second", "Change", "p", "Fell", "Rose", "Either",
    "Inside",
)  # fmt: skip


def shown(found: Rechecked) -> pd.DataFrame:
    """The table for readers: percent with two decimals, n/a for what is missing."""
    cells = [_cells(row, name, f) for row in found.rows for name, f in row.figures.items()]
    cells += [_blank(row) for row in found.rows if not row.figures]
    return pd.DataFrame(cells, columns=list(_HEADINGS))


def _cells(row: Row, name: str, figure: Figure) -> tuple[str, ...]:
    change = figure.change
    return (
        row.title,
        name,
        str(row.n),
        _percent(figure.first),
        f"{_percent(figure.interval.low)} to {_percent(figure.interval.high)}",
        _percent(figure.second),
        f"{_points(change.difference)} ({_points(change.low)} to {_points(change.high)})",
        f"{change.p_value:.3g}",
        str(change.only_a),
        str(change.only_b),
        _percent(figure.either),
        "yes" if figure.inside else "no",
    )


def _blank(row: Row) -> tuple[str, ...]:
    return (row.title, cut(row.reason), str(row.n), *["n/a"] * (len(_HEADINGS) - 3))


def to_markdown(found: Rechecked) -> str:
    """The table as Markdown, with what its columns mean."""
    first, second = found.seeds
    lines = [f"# {escaped(cut(found.name))}: seed {first} against seed {second}", ""]
    lines += [f"{escaped(found.summary())}.", ""]
    lines += ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    for cells in shown(found).itertuples(index=False):
        lines.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", *[f"- {note}" for note in _NOTES]]) + "\n"


def write_recheck(folder: Path, found: Rechecked) -> None:
    """Write `recheck.csv` and `recheck.md` into the folder of the first run."""
    write_atomically(folder / "recheck.csv", to_csv(table(found)).encode())
    write_atomically(folder / "recheck.md", to_markdown(found).encode())
    write_sums(folder, RECHECK)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _points(value: float) -> str:
    # Adding zero turns -0.0, which would read "-0.00", into 0.0.
    return f"{round(100 * value, 2) + 0.0:+.2f}"
