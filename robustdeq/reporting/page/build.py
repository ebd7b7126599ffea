"""From a run to its page."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from robustdeq.files import write_atomically
from robustdeq.reporting.formats import NOTES
from robustdeq.reporting.images import read_images
from robustdeq.reporting.page.environment import cut, environment, scripts
from robustdeq.reporting.page.evidence import evidence_view
from robustdeq.reporting.page.rows import RowView, row_views
from robustdeq.reporting.run import RunReport

FILE = "index.html"
PICTURES = 1_500_000
"""Characters that the examples of all rows may take together."""
CHARTS = 900_000
"""Characters that the figures may take together; the others stand in `figures/` alone."""
_FILTERS = {
    "dataset": "Data set", "threat": "Threat", "family": "Family", "track": "Track",
    "flag": "Flag", "status": "Status",
}  # fmt: skip


class Drawn(Protocol):
    """A figure, as `reporting.figures` gives it."""

    @property
    def title(self) -> str: ...
    @property
    def alt(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def svg(self) -> str: ...


class _Chart(NamedTuple):
    title: str
    alt: str
    caption: str
    source: str


def render_page(run: RunReport, drawn: Sequence[Drawn] = ()) -> str:
    """The page as HTML: one file that fetches nothing.

    Args:
        drawn: figures to show below the table.
    """
    rows, charts = row_views(run), _charts(drawn)
    filters = _filters(rows)
    places = [run.origin(row.number).folder for row in rows]
    images = {folder: read_images(folder) for folder in set(places)}
    share = PICTURES // max(len(rows), 1)
    text: str = (
        environment()
        .get_template("page.html.j2")
        .render(
            name=run.name,
            description=run.data["suite"].get("description", ""),
            facts=[*_facts(run), *_common(rows)],
            filters=filters,
            told={key for key, _, _ in filters},
            rows=rows,
            evidences={
                row.number: evidence_view(run, row.number, images[folder], share)
                for row, folder in zip(rows, places, strict=True)
            },
            charts=charts,
            more=len(drawn) - len(charts),
            notes=NOTES,
            scripts=scripts(),
        )
    )
    return text


def write_page(run: RunReport, drawn: Sequence[Drawn] = (), path: Path | None = None) -> Path:
    """Write `index.html` into the run's folder, or to a path."""
    path = path or run.folder / FILE
    write_atomically(path, render_page(run, drawn).encode())
    return path


def _charts(drawn: Sequence[Drawn]) -> list[_Chart]:
    """The first figures, as many as a page may hold."""
    charts = [_chart(figure) for figure in drawn]
    sizes = itertools.accumulate(len(chart.source) for chart in charts)
    return [chart for chart, size in zip(charts, sizes, strict=True) if size <= CHARTS]


def _chart(figure: Drawn) -> _Chart:
    # As an image a figure can neither run anything nor clash with the page's own names.
    source = base64.b64encode(figure.svg.encode()).decode()
    return _Chart(figure.title, figure.alt, figure.caption, f"data:image/svg+xml;base64,{source}")


def _facts(run: RunReport) -> list[str]:
    """What holds for all rows: seed, versions, machine."""
    data = run.data
    environment_, machine, git = (data.get(k) or {} for k in ("environment", "machine", "git"))
    commit = str(git.get("commit", ""))[:12]
    told: list[Any] = [
        f"seed {data['seed']}" if "seed" in data else "",
        f"RobustDEQ {data.get('robustdeq', '')}" + (f" ({commit})" if commit else ""),
        *(f"{key} {value}" for key, value in environment_.items()),
        machine.get("platform", ""),
    ]
    return [cut(fact, 120) for fact in told if fact]


def _common(rows: Sequence[RowView]) -> list[str]:
    """Data set, threat and track, where all rows have the same: no column tells them then."""
    held = [
        {row.verdict.dataset for row in rows},
        {row.verdict.threat for row in rows},
        {f"{row.verdict.track} models" for row in rows},
    ]
    return [cut(next(iter(values)), 60) for values in held if len(values) == 1]


def _filters(rows: Sequence[RowView]) -> list[tuple[str, str, list[str]]]:
    """Key, title and values of each filter that tells rows apart."""
    held = {key: sorted({tag for row in rows for tag in row.tags[key]}) for key in _FILTERS}
    return [(key, title, held[key]) for key, title in _FILTERS.items() if len(held[key]) > 1]
