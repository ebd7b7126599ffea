"""What AutoAttack standard costs against samples, state size, epsilon and stiffness.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --device cuda

Two ways on the digits row of side_by_side.py, interleaved in one run on one thread: `joint`, our
engine, and `reference`, pyautoattack through the row's own solver, which solves to 1e-6 (torchdeq's
default is looser and cheaper: see side_by_side.py). Both run the whole protocol on the same images
with the same seed. One thing at a time departs from the middle:

- samples: the first images of the test split; smaller batches are heads of larger ones.
- state size: the same function on a state of repeated units, so that only the work of an
  evaluation grows, not how many are needed.
- epsilon: of the Linf ball.
- stiffness: mean steps that the row's solver, plain iteration, needs at the clean images. The gain
  of the cell is raised without training again, so each point is another function, with other
  images standing; above a gain of 1 the cell need not be a contraction.

Costs are per sample that stands against both ways, so that neither gains by missing one; a ratio is
the reference's cost over the way's. Every point is measured several times, and the least time
counts. A measurement that is done is not run again; the same command goes on. Writes
results/scaling.csv and results/scaling.svg.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _figures import machine, save, seaborn
from robustdeq.attacks.autoattack import AutoAttack
from side_by_side import RESULTS, ROW, held, keep, measured
from torch import Tensor, nn

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.targets import Target
from robustdeq.threats import Threat

WAYS = {"joint": AutoAttack(engine="joint"), "reference": AutoAttack()}


@dataclass(frozen=True)
class Point:
    """What is attacked: images, Linf radius, copies of each unit of the state, gain of the cell."""

    images: int = 12
    epsilon: float = 1 / 8
    copies: int = 1
    gain: float = 0.8


MIDDLE = Point()
AXES = {
    "samples": [replace(MIDDLE, images=n) for n in (4, 8, 16, 32, 64)],
    "state size": [replace(MIDDLE, copies=k) for k in (1, 4, 16, 64)],
    "epsilon": [replace(MIDDLE, epsilon=e / 16) for e in (1, 2, 3)],
    "stiffness": [replace(MIDDLE, gain=g) for g in (0.4, 0.8, 1.6, 2.4)],
}
FEW = Point(images=2)
QUICK = {"samples": [FEW, replace(FEW, images=4)], "stiffness": [FEW, replace(FEW, gain=1.6)]}
"""Indicative, in seconds."""


@torch.no_grad()
def enlarged(model: Any, copies: int) -> Any:
    """The same function of the image, with each unit of a flat state `copies` times."""
    model = copy.deepcopy(model)
    for layer in (model.stem.layers[-1], model.residual.second):
        layer.weight = nn.Parameter(layer.weight.repeat(copies, 1))
        layer.bias = nn.Parameter(layer.bias.repeat(copies))
    for layer in (model.residual.first, model.head[-1]):
        layer.weight = nn.Parameter(layer.weight.repeat(1, copies) / copies)
    return model


def built(point: Point, device: torch.device) -> Any:
    """The row's model, changed as the point says."""
    model = enlarged(robustdeq.load_model(ROW, "digits"), point.copies).to(device)
    model.gain = point.gain
    return model


def images(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first images of the test split with their labels."""
    part = load_slice("digits", "test", count)
    x, y = torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)
    return x.to(device), y.to(device)


def described(model: Any, x: Tensor) -> dict[str, float]:
    """Size of the state, and mean steps of a solve at these images."""
    with torch.no_grad():
        (solve,) = Target(model, 10)(x).solves
    return {"units": solve.z[0].numel(), "steps": float(solve.steps.double().mean())}


def jobs(axes: dict[str, list[Point]], repeats: int) -> Iterator[tuple[Point, str, int]]:
    """Every point, way and repeat once: the ways take turns, and the repeats lie far apart."""
    points = list(dict.fromkeys(point for line in axes.values() for point in line))
    for repeat in range(repeats):
        for point in points:
            for way in WAYS:
                yield point, way, repeat


def run(given: argparse.Namespace, ledger: Path) -> list[dict[str, Any]]:
    """All measurements; those in the ledger are read from it."""
    device = torch.device(given.device)
    lines = held(ledger)
    done = {(Point(**line["point"]), line["way"], line["repeat"]) for line in lines}
    for point, way, repeat in jobs(given.axes, given.repeats):
        if (point, way, repeat) in done:
            continue
        model, (x, y) = built(point, device), images(point.images, device)
        threat = Threat.parse(f"Linf:{point.epsilon}")
        line = {"point": asdict(point), "way": way, "repeat": repeat, **described(model, x)}
        line |= measured(model, model, WAYS[way], x, y, 0, threat)
        lines.append(line)
        keep(line, ledger)
        print(f"{point}, {way}, repeat {repeat}: {line['seconds']:.1f} s", flush=True)
    return lines


def table(lines: list[dict[str, Any]], axes: dict[str, list[Point]]) -> pd.DataFrame:
    """A row per axis, point and way."""
    rows = []
    for axis, points in axes.items():
        for point in points:
            own = [line for line in lines if Point(**line["point"]) == point]
            rows += [{"axis": axis, **row} for row in compared(axis, point, own)]
    return pd.DataFrame(rows)


def compared(axis: str, point: Point, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ways at one point: costs per sample that stands against both, and ratios."""
    totals = {way: total([line for line in lines if line["way"] == way]) for way in WAYS}
    standing = [line["robust"] for line in lines if line["repeat"] == 0]
    both = sum(map(min, zip(*standing, strict=True)))
    base = totals["reference"]
    return [
        {
            "value": value(axis, lines[0]), "way": way, **asdict(point),
            "robust": own["robust"], "robust_to_both": both,
            "seconds": per(own["seconds"], both), "evaluations": per(own["forward"], both),
            "products": per(own["backward"], both),
            "time_ratio": base["seconds"] / own["seconds"],
            "work_ratio": work(base) / work(own), "notes": "; ".join(own["notes"]),
        }
        for way, own in totals.items()
    ]  # fmt: skip


def total(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """The first measurement of a way, with the least time of all."""
    first = min(repeats, key=lambda line: line["repeat"])
    seconds = min(line["seconds"] for line in repeats)
    return first | {"seconds": seconds, "robust": sum(first["robust"])}


def work(line: dict[str, Any]) -> int:
    """Evaluations of the cell and products with its Jacobian."""
    return int(line["forward"] + line["backward"])


def per(cost: float, samples: int) -> float | None:
    """The cost of one sample; none where there is no sample."""
    return cost / samples if samples else None


def value(axis: str, line: dict[str, Any]) -> float:
    """Where a point lies on an axis."""
    at = {
        "samples": line["point"]["images"], "state size": line["units"],
        "epsilon": line["point"]["epsilon"], "stiffness": line["steps"],
    }  # fmt: skip
    return float(at[axis])


LABELS = {
    "samples": "samples", "state size": "units of the state", "epsilon": "epsilon (Linf)",
    "stiffness": "steps of a solve",
}  # fmt: skip
COSTS = {"seconds": "seconds", "work": "evaluations and products"}


def draw(frame: pd.DataFrame, path: Path, about: str) -> None:
    """A column per axis; above what the clock says, below what depends on no machine."""
    sns = seaborn()
    from matplotlib import pyplot as plt

    costs = frame.assign(at=frame["value"], work=frame["evaluations"] + frame["products"])
    costs = costs.drop(columns="value")
    fixed = ["axis", "at", "way", "time_ratio", "work_ratio"]
    long = costs.melt(fixed, list(COSTS), var_name="cost", value_name="per sample")
    grid = sns.relplot(
        long, x="at", y="per sample", hue="way", style="way", row="cost", col="axis",
        kind="line", markers=True, height=2.3, aspect=0.98,
        facet_kws={"sharex": "col", "sharey": "row"},
    )  # fmt: skip
    for (cost, axis), axes in grid.axes_dict.items():
        own = long[(long["axis"] == axis) & (long["cost"] == cost) & (long["way"] == "joint")]
        ratio = "time_ratio" if cost == "seconds" else "work_ratio"
        trim(axes, own, ratio, axis)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(f"{COSTS[cost]}\nper robust sample")
    save(grid.figure, path, about)
    plt.close(grid.figure)


def trim(axes: Any, own: pd.DataFrame, ratio: str, axis: str) -> None:
    """Logarithmic axes with a tick at each point, and the ratio at each point of the joint way."""
    axes.set(title="", xlabel=LABELS[axis], xscale="log", yscale="log", xmargin=0.15, ymargin=0.15)
    ticks = own["at"].round(4 if axis == "epsilon" else 1)
    axes.set_xticks(own["at"], [f"{at:.4g}" for at in ticks])
    axes.minorticks_off()
    for _, row in own.dropna(subset=["per sample"]).iterrows():
        axes.annotate(
            f"{row[ratio]:.1f}x", (row["at"], row["per sample"]), (0, 5),
            textcoords="offset points", ha="center", fontsize="x-small",
        )  # fmt: skip


def header(given: argparse.Namespace) -> str:
    """What the figures were measured on."""
    return f"{machine(given.device)}, least of {given.repeats} repeats"


def caption(frame: pd.DataFrame, measured_on: str) -> str:
    """What a reader of the figure must know."""
    robust = frame["robust_to_both"]
    stiffness = frame[frame["axis"] == "stiffness"]
    gains = ", ".join(str(gain) for gain in stiffness["gain"].unique())
    return (
        f"AutoAttack standard on the digits row {ROW}, one seed; n = {stiffness['images'].iloc[0]} "
        f"images except along samples; {robust.min()} to {robust.max()} of a point's images stand "
        f"against both ways. Epsilon is {MIDDLE.epsilon:.4g} and the gain {MIDDLE.gain} except "
        "along their own axes. Numbers: the reference's cost over the joint engine's. Steps of a "
        "solve: the mean of plain iteration to 1e-6 at clean images, with the gain raised from "
        f"point to point ({gains}). {measured_on}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 to 4 images, once: indicative")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    given = parser.parse_args()
    given.axes = QUICK if given.quick else AXES
    if given.quick:
        given.repeats = 1
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device = torch.device(given.device).type
    name = "scaling" + ("" if device == "cpu" else f"-{device}") + ("-quick" if given.quick else "")
    frame = table(run(given, given.results / f"{name}.jsonl"), given.axes)
    measured_on = header(given)
    frame.assign(machine=measured_on).to_csv(
        given.results / f"{name}.csv", index=False, float_format="%.4g"
    )
    draw(frame, given.results / f"{name}.svg", caption(frame, measured_on))
    print(f"\n{name}: {measured_on}{' (indicative)' if given.quick else ''}")
    print(frame.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
