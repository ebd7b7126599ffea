"""What is to be looked at of a run: its figures and its page, written into its folder."""

from __future__ import annotations

from pathlib import Path

from robustdeq.reporting.figures import figures, write_figures
from robustdeq.reporting.page.build import write_page
from robustdeq.reporting.run import RunReport, read_run
from robustdeq.reporting.sums import PAGE, write_sums


def publish(folder: Path) -> Path:
    """Write `figures/` and `index.html` of a run's folder; returns the page.

    Raises:
        UsageError: if the folder holds no run.
    """
    return publish_report(read_run(folder))


def publish_report(run: RunReport, path: Path | None = None) -> Path:
    """As `publish`; the page at `path`, with `figures/` beside it."""
    drawn = figures(run)
    page = write_page(run, drawn, path)
    written = write_figures(drawn, page.parent)
    if page.parent == run.folder:
        _remove_others(written, run.folder / "figures")
        write_sums(run.folder, PAGE)
    return page


def _remove_others(written: list[Path], folder: Path) -> None:
    """Figures of an earlier run in the same folder, with other rows or threats."""
    for path in set(folder.glob("*.svg")) | set(folder.glob("*.png")):
        if path not in written:
            path.unlink()
