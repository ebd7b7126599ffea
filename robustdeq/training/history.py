"""What a training leaves to look at: a CSV log, and a figure of its curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from robustdeq.files import write_atomically

Row = dict[str, float]
_PANELS = ("loss", "validation", "residual", "nfe_forward")


def write_log(rows: Sequence[Row], path: Path) -> None:
    """The rows as CSV; a column per name that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
    write_atomically(path, text.getvalue().encode())


def write_curve(rows: Sequence[Row], path: Path, title: str) -> None:
    """A PNG of loss, validation score, residual and NFE over the steps, as far as they exist."""
    import seaborn as sns
    from matplotlib.figure import Figure

    names = [name for name in _PANELS if any(name in row for row in rows)]
    if not names:
        return
    figure = Figure(figsize=(3.6 * len(names), 2.8), layout="constrained")
    with sns.axes_style("whitegrid"):
        axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        sns.lineplot(x=[p[0] for p in points], y=[p[1] for p in points], ax=axis)
        axis.set(xlabel="step", ylabel=name.replace("_", " "))
        if name == "residual" and all(value > 0 for _, value in points):
            axis.set_yscale("log")
    figure.suptitle(title, fontsize="medium")
    payload = io.BytesIO()
    figure.savefig(payload, format="png", dpi=110)
    write_atomically(path, payload.getvalue())
