"""What a look of the joint engine costs: as it is, with channels last, compiled, in less precision.

    python benchmarks/looks.py
    python benchmarks/looks.py --device cuda --rows 64,1024

A look is one evaluation of the cell and one product with its Jacobian, with stem, readout and loss;
a glance does without the gradient. For the equilibrium rows of `digits` and `mnist` and for the
latter's function at eight times the work (`wide`): microseconds per row, the least of several
repeats, all ways interleaved, one thread; process time on a CPU. `times` is what the way "plain"
takes over what this one takes, as the median over the repeats, and `compile_seconds` what has to
be paid first. Products in TF32 are a GPU's alone. Writes results/looks.csv, and
the table in docs/joint_engine_cost.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from robustdeq.attacks._losses import named_loss
from side_by_side import RESULTS, ROW, WIDTHS, placed, timed, widened
from torch import Tensor

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.equilibrium import Compiled, Dynamics, JointState, Lockstep, channels_last

PAGE = RESULTS.parent.parent / "docs" / "joint_engine_cost.md"
MARKS = "<!-- looks -->\n", "<!-- end looks -->"
CELLS = (("digits", "small"), ("mnist", "small"), ("mnist", "wide"))
CALLS = 5
"""Looks of one measurement."""


class Way(NamedTuple):
    """One way of looking."""

    name: str
    lockstep: Lockstep
    compile_seconds: float = 0.0


class Ground(NamedTuple):
    """What is looked at."""

    data: str
    cell: str
    x: Tensor
    state: JointState
    loss: Callable[[Tensor], Tensor]


def prepared(data: str, cell: str, rows: int, device: torch.device) -> tuple[Ground, list[Way]]:
    """A problem with its ways; compiled ones have been called as often as it takes."""
    part = load_slice(data, "test", min(rows, 64))
    again = -(-rows // len(part.labels))
    x = (torch.from_numpy(part.images).float() / 255).repeat(again, 1, 1, 1)[:rows].to(device)
    y = torch.from_numpy(part.labels).repeat(again)[:rows].to(device)
    model = widened(robustdeq.load_model(ROW, data), WIDTHS[cell]).to(device)
    plain = Lockstep(Dynamics(model.requires_grad_(False)))
    fun = named_loss("targeted_dlr", 10)

    def loss(logits: Tensor) -> Tensor:
        return fun(logits, y, (y + 1) % 10)

    ground = Ground(data, cell, x, plain.settled(x), loss)
    return ground, list(ways(plain, ground))


def ways(plain: Lockstep, ground: Ground) -> Iterator[Way]:
    """All that the device has."""
    last = Dynamics(channels_last(plain.dynamics.model, ground.x))
    yield Way("plain", plain)
    yield Way("channels last", Lockstep(last))
    torch.compiler.reset()  # what was compiled for other models counts towards torch's limit
    begun = time.perf_counter()
    compiled = Lockstep(Dynamics(Compiled(last.model)))
    for _ in range(3):
        compiled.look(ground.x, ground.state, ground.loss)
        compiled.glance(ground.x, ground.state)
    yield Way("compiled", compiled, time.perf_counter() - begun)
    yield Way("bfloat16", Lockstep(last, precision="bfloat16"))
    if ground.x.is_cuda:
        yield Way("tf32", Lockstep(last, precision="tf32"))


def lines(ground: Ground, contenders: list[Way], repeats: int) -> Iterator[dict[str, Any]]:
    """The table's lines for one problem."""
    for what in ("look", "glance"):
        taken: list[list[float]] = [[] for _ in contenders]
        for repeat in range(repeats + 1):
            for way, seconds in zip(contenders, taken, strict=True):
                elapsed, _ = timed(partial(called, way, ground, what), ground.x.device)
                if repeat:  # the first warms up
                    seconds.append(1e6 * elapsed / (CALLS * len(ground.x)))
        for way, seconds in zip(contenders, taken, strict=True):
            ratios = [a / b for a, b in zip(taken[0], seconds, strict=True)]
            yield {
                "device": ground.x.device.type, "data": ground.data, "cell": ground.cell,
                "rows": len(ground.x), "what": what, "way": way.name,
                "microseconds": min(seconds), "times": statistics.median(ratios),
                "compile_seconds": way.compile_seconds,
            }  # fmt: skip


def called(way: Way, ground: Ground, what: str) -> None:
    """Some looks, or glances, one after another."""
    state = ground.state
    for _ in range(CALLS):
        if what == "look":
            state = way.lockstep.look(ground.x, state, ground.loss).state
        else:
            state = way.lockstep.glance(ground.x, state).state


def noted(frame: pd.DataFrame) -> None:
    """Put a run into results/looks.csv in place of one on such a device, and into the page."""
    path = RESULTS / "looks.csv"
    if path.exists():
        held = pd.read_csv(path)
        frame = pd.concat([held[held["device"] != frame["device"].iloc[0]], frame])
    frame.to_csv(path, index=False, float_format="%.4g")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), pd.read_csv(path)), encoding="utf-8")


def filled(text: str, frame: pd.DataFrame) -> str:
    """The page with the table of the looks between its marks."""
    names = list(dict.fromkeys(frame["way"]))
    keys = ["device", "data", "cell", "rows", "what"]
    lines = []
    for (device, data, cell, rows, what), group in frame.groupby(keys, sort=False):
        by = group.set_index("way")
        ground = f"{what}, {data}, {cell}, {rows} rows{'' if device == 'cpu' else ', GPU'}"
        lines.append([ground, *(_cell(by, name) for name in names)])
    return placed(text, MARKS, ["Microseconds a row", *names], lines)


def _cell(by: pd.DataFrame, name: str) -> str:
    if name not in by.index:
        return ""
    return f"{by.loc[name, 'microseconds']:.3g} ({by.loc[name, 'times']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--rows", default="64", help="of a look, by commas")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="the small cell of digits: indicative")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for data, cell in CELLS[:1] if given.quick else CELLS:
        for rows in map(int, given.rows.split(",")):
            ground, contenders = prepared(data, cell, rows, torch.device(given.device))
            found += lines(ground, contenders, given.repeats)
    frame = pd.DataFrame(found)
    if not given.quick:
        noted(frame)
    print(frame.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
