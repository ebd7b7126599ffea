"""What a solver costs beyond the evaluations of the cell it asks for.

    python benchmarks/solvers.py
    python benchmarks/solvers.py --quick
    python benchmarks/solvers.py --device cuda

For the equilibrium rows of `digits` and `mnist`, and for the same functions at eight times the
work: microseconds per sample and step of the bare cell, of whole solves with a fixed number of
steps (tolerance 0), and so the overhead in percent over as many bare evaluations. All ways are
interleaved and timed several times, on one thread; process time on a CPU. `overhead` compares the
minima, `overhead_median` is the median of the ratios within one repeat. `evaluations` is the mean
number per sample to the row's own tolerance. Where torchdeq is installed, its solvers stand beside
ours. Writes results/solvers.csv and results/solvers.svg.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _figures import machine
from side_by_side import ROW, WIDTHS, timed, widened
from torch import Tensor

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.equilibrium import (
    Anderson,
    Broyden,
    EquilibriumClassifier,
    FixedPoint,
    Problem,
    Solver,
)

RESULTS = Path(__file__).resolve().parent / "results"
DATA = ("digits", "mnist")
BATCHES = (1, 4, 16, 64, 256)
SOLVERS: dict[str, type[Solver]] = {
    "fixed_point": FixedPoint,
    "anderson": Anderson,
    "broyden": Broyden,
}
TORCHDEQ = {"fixed_point": "fixed_point_iter", "anderson": "anderson", "broyden": "broyden"}
"""What torchdeq calls its solvers."""


@dataclass(frozen=True)
class Way:
    """One way of evaluating the cell a number of times."""

    solver: str
    library: str
    run: Callable[[], object]
    evaluations: int


@dataclass(frozen=True)
class Ground:
    """A problem to solve, with the place it has in the table."""

    data: str
    cell: str
    batch: int
    model: EquilibriumClassifier
    problem: Problem


def grounds(device: torch.device) -> Iterator[Ground]:
    """Every cell with every size of batch."""
    for data in DATA:
        images = torch.from_numpy(load_slice(data, "test", max(BATCHES)).images).float() / 255
        for cell, factor in WIDTHS.items():
            model = widened(robustdeq.load_model(ROW, data), factor).to(device)
            for batch in BATCHES:
                u = model.embed(images[:batch].to(device))
                problem = Problem(model.cell, u, model.start(u))
                yield Ground(data, cell, batch, model, problem)


def ways(ground: Ground, steps: int, torchdeq: bool) -> list[Way]:
    """Bare evaluations, our solvers and torchdeq's, all without a tolerance."""
    problem = ground.problem
    found = [Way("bare", "ours", partial(bare, ground.model, problem, steps), steps)]
    for name, kind in SOLVERS.items():
        solver = kind(tolerance=0.0, max_steps=steps)
        found.append(Way(name, "ours", partial(solver, problem, problem.start), steps))
    for name, theirs in TORCHDEQ.items() if torchdeq else ():
        run = partial(reference, theirs, problem, steps)
        found.append(Way(name, "torchdeq", run, run()))
    return found


def bare(model: EquilibriumClassifier, problem: Problem, steps: int) -> Tensor:
    """The cell, again and again."""
    z = problem.start
    for step in range(steps):
        z = model.cell(z, problem.injection, step)
    return z


def reference(name: str, problem: Problem, steps: int) -> int:
    """A solve by torchdeq; the evaluations it took."""
    from torchdeq.solver import get_solver

    taken = 0

    def f(z: Tensor) -> Tensor:
        nonlocal taken
        taken += 1
        return problem.cell(z, problem.injection, 0)

    get_solver(name)(f, problem.start, max_iter=steps, tol=0.0, stop_mode="rel")
    return taken


def lines(ground: Ground, given: argparse.Namespace, torchdeq: bool) -> list[dict[str, Any]]:
    """The table's lines for one problem."""
    device = torch.device(given.device)
    contenders = ways(ground, given.steps, torchdeq)
    seconds: list[list[float]] = [[] for _ in contenders]
    for repeat in range(given.repeats + 1):
        for way, taken in zip(contenders, seconds, strict=True):
            elapsed, _ = timed(way.run, device)
            if repeat:  # the first warms up
                taken.append(elapsed / (way.evaluations * ground.batch))
    return [line(ground, way, taken, seconds[0]) for way, taken in zip(
        contenders[1:], seconds[1:], strict=True
    )]  # fmt: skip


def line(ground: Ground, way: Way, taken: list[float], base: list[float]) -> dict[str, Any]:
    """One line: times in microseconds per sample and evaluation, overheads in percent."""
    ratios = [a / b for a, b in zip(taken, base, strict=True)]
    return {
        "data": ground.data, "cell": ground.cell, "batch": ground.batch,
        "solver": way.solver, "library": way.library, "steps": way.evaluations,
        "cell_us": 1e6 * min(base), "cell_us_median": 1e6 * statistics.median(base),
        "solve_us": 1e6 * min(taken), "solve_us_median": 1e6 * statistics.median(taken),
        "overhead": 100 * (min(taken) / min(base) - 1),
        "overhead_median": 100 * (statistics.median(ratios) - 1),
        "evaluations": needed(ground, way),
    }  # fmt: skip


def needed(ground: Ground, way: Way) -> float | None:
    """Mean evaluations of our solver to the tolerance that the row is deployed with."""
    if way.library != "ours":
        return None
    deployed = ground.model.solver
    solver = SOLVERS[way.solver](tolerance=deployed.tolerance, max_steps=deployed.max_steps)
    return float(solver(ground.problem, ground.problem.start).steps.double().mean())


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Overhead against the size of the batch, a panel a cell."""
    import matplotlib as mpl

    mpl.use("Agg")
    import seaborn as sns

    named = frame.assign(row=frame["data"] + ", " + frame["cell"] + " cell")
    grid = sns.relplot(
        named, x="batch", y="overhead_median", hue="solver", style="library", col="row", col_wrap=2,
        kind="line", markers=True, dashes=True, height=2.6, aspect=1.4,
    )  # fmt: skip
    grid.set(xscale="log")
    for axes in grid.axes.flat:
        axes.set_yscale("symlog", linthresh=10)
        axes.set_ylim(bottom=0)
    grid.set(xticks=BATCHES, xticklabels=BATCHES, yticks=(0, 10, 100, 1000))
    grid.set(yticklabels=("0", "10 %", "100 %", "1000 %"))
    grid.set_titles("{col_name}")
    grid.set_axis_labels("batch", "median overhead")
    for axes in grid.axes.flat:
        axes.minorticks_off()
        axes.axhline(10, color="gray", linewidth=0.8, linestyle=":")
    grid.savefig(path, metadata={"Date": None})


def header(given: argparse.Namespace) -> str:
    """What the figures were measured on."""
    return f"{machine(given.device)}, {given.steps} steps, {given.repeats} repeats"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 repeats: indicative, not written")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--steps", type=int, default=12, help="of each timed solve")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    if given.quick:
        given.repeats = 2
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(header(given))
    torchdeq = importlib.util.find_spec("torchdeq") is not None
    if not torchdeq:
        print("torchdeq is not installed: its lines are left out")
    with torch.no_grad():
        found = [
            made for ground in grounds(torch.device(given.device))
            for made in lines(ground, given, torchdeq)
        ]  # fmt: skip
    frame = pd.DataFrame(found)
    print(frame.to_string(index=False, float_format="%.3g"))
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        frame.assign(machine=header(given)).to_csv(
            RESULTS / "solvers.csv", index=False, float_format="%.4g"
        )
        draw(frame, RESULTS / "solvers.svg")


if __name__ == "__main__":
    main()
