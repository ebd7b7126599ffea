"""All figures of a run, and writing them to its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from robustdeq.files import make_folder, write_atomically
from robustdeq.reporting.figures.ablation import ablation
from robustdeq.reporting.figures.accuracy_curves import accuracy_by_epsilon, accuracy_by_steps
from robustdeq.reporting.figures.attack_success import attack_success
from robustdeq.reporting.figures.clean_and_robust import clean_and_robust
from robustdeq.reporting.figures.cost import cost
from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.residual_traces import residual_traces
from robustdeq.reporting.figures.residuals import residual_distributions
from robustdeq.reporting.figures.robust_by_attack import robust_by_attack
from robustdeq.reporting.figures.section import Section, ladders, sections
from robustdeq.reporting.run import RunReport

Draw = Callable[[Section], list[Figure]]
KINDS: tuple[Draw, ...] = (
    clean_and_robust,
    robust_by_attack,
    attack_success,
    ablation,
    cost,
    accuracy_by_steps,
    residual_distributions,
    residual_traces,
)
"""Figures of one data set, threat and track, in the order of a report."""


def figures(run: RunReport) -> list[Figure]:
    """All figures of a run, by data set, threat and track; what would be empty is left out."""
    found = [figure for section in sections(run) for draw in KINDS for figure in draw(section)]
    found += [figure for ladder in ladders(run) for figure in accuracy_by_epsilon(ladder)]
    return _told_apart(found)


def _told_apart(found: list[Figure]) -> list[Figure]:
    """Names may collide: "a_b" and "a-b" are two data sets and one stem."""
    names: set[str] = set()
    apart = []
    for figure in found:
        name, count = figure.name, 1
        while name in names:
            count += 1
            name = f"{figure.name}-{count}"
        names.add(name)
        apart.append(replace(figure, name=name))
    return apart


def write_figures(drawn: Sequence[Figure], folder: Path) -> list[Path]:
    """Write `folder/figures/NAME.svg` and `.png`; unchanged records give the same bytes.

    Raises:
        UsageError: if the folder cannot be created or written to.
    """
    make_folder(folder / "figures")
    paths = []
    for figure in drawn:
        for suffix, payload in (("svg", figure.svg.encode()), ("png", figure.png)):
            path = folder / "figures" / f"{figure.name}.{suffix}"
            write_atomically(path, payload)
            paths.append(path)
    return paths
