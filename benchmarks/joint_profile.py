"""Where the joint engine's time goes, beside the reference and the explicit network.

    pip install torchdeq
    python benchmarks/joint_profile.py --cell small
    python benchmarks/joint_profile.py --cell wide

The three ways of side_by_side.py on the same images, one thread, one after another: process time,
evaluations of the cell and vector-Jacobian products, the joint engine's by component. "Bare" is
what so many evaluations and products take alone, in batches that cost least, measured in the same
run: the rest is the attack's own arithmetic, stem and readout, and what small batches cost more.
Writes results/joint_profile.csv, lines per row and cell, and a table in docs/joint_engine_cost.md.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from robustdeq.attacks._screen import Screen
from side_by_side import EPS, RESULTS, ROW, WIDTHS, measured, placed, ways
from torch import Tensor

from robustdeq.datasets import load_slice
from robustdeq.equilibrium import EquilibriumClassifier, metered
from robustdeq.threats import Threat

BATCHES = (8, 32, 128)
REPEATS = 100
KEYS = ["data", "row", "cell"]
PAGE = RESULTS.parent.parent / "docs" / "joint_engine_cost.md"
MARKS = "<!-- joint_profile -->\n", "<!-- end joint_profile -->"


class Profiled(Screen):
    """A screen that keeps what each of its components took."""

    parts: dict[str, dict[str, float]]

    def run(self) -> Any:
        """See `Screen`; the parts are those of the last one that ran."""
        type(self).parts = {}
        return super().run()

    def _apgd(self, name: str, *args: Any, **options: Any) -> None:
        again = "again" in options
        with self._kept(f"{name}, second run" if again else name):
            super()._apgd(name, *args, **options)

    def _fab(self, goals: Tensor) -> None:
        with self._kept("fab-t"):
            super()._fab(goals)

    def _square(self, **options: Any) -> None:
        again = options.get("among") is not None
        with self._kept("square, second run" if again else "square"):
            super()._square(**options)

    @contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        begun = time.process_time()
        with metered() as meter:
            yield
        part = self.parts.setdefault(name, {"seconds": 0.0, "forward": 0, "backward": 0})
        part["seconds"] += time.process_time() - begun
        part["forward"] += meter.forward
        part["backward"] += meter.backward


def bare(model: EquilibriumClassifier, x: Tensor) -> tuple[float, float]:
    """Seconds of one evaluation of the cell on one row, and of one product with its Jacobian.

    Of the batches that cost least per row: too few rows share too little, too many leave the cache.
    """
    rates = [_rates(model, x.repeat(-(-n // len(x)), *[1] * (x.dim() - 1))[:n]) for n in BATCHES]
    return min(forward for forward, _ in rates), min(backward for _, backward in rates)


def _rates(model: EquilibriumClassifier, x: Tensor) -> tuple[float, float]:
    with torch.no_grad():
        u = model.embed(x)
        z = model.start(u)
    leaf, ones = z.clone().requires_grad_(), torch.ones_like(z)

    def evaluate() -> None:
        with torch.no_grad():
            model.cell(z, u, 0)

    def multiply() -> None:
        with torch.enable_grad():
            torch.autograd.grad(model.cell(leaf, u, 0), leaf, ones)

    forward = _median(evaluate) / len(x)
    return forward, max(_median(multiply) / len(x) - forward, 0.0)


def _median(run: Callable[[], None]) -> float:
    """Seconds; a mean would count what else the machine does."""
    times = []
    for _ in range(REPEATS):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    return float(torch.tensor(times).median())


def profile(given: argparse.Namespace) -> pd.DataFrame:
    """One line per component of the joint engine, and one per way."""
    part = load_slice(given.data, "test", given.images)
    x, y = torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)
    threat = Threat.parse(given.eps or EPS[given.data])
    models = ways(given.data, given.cell, given.row)
    deployed: Any = models["joint"][0]
    forward, backward = bare(deployed, x)
    lines: list[dict[str, Any]] = []
    for way, (model, attack) in models.items():
        judge = model if way == "explicit" else deployed
        with patch("robustdeq.attacks.autoattack.Screen", Profiled):
            whole = measured(model, judge, attack, x, y, 0, threat)
        parts = Profiled.parts if way == "joint" else {}
        rest = {
            k: whole[k] - sum(p[k] for p in parts.values())
            for k in ("seconds", "forward", "backward")
        }
        parts = {**parts, "settling, calibration, confirmation": rest} if parts else {}
        lines += [
            {"way": way, "part": name, **held} for name, held in {**parts, "all": whole}.items()
        ]
    frame = pd.DataFrame(lines)[["way", "part", "seconds", "forward", "backward"]]
    frame["bare"] = frame["forward"] * forward + frame["backward"] * backward
    reference = frame[frame["way"] == "reference"].iloc[-1]
    frame["share_of_reference"] = frame["seconds"] / reference["seconds"]
    frame["bare_share"] = frame["bare"] / frame["seconds"]
    for place, key in enumerate(KEYS):
        frame.insert(place, key, getattr(given, key))
    frame.insert(len(KEYS), "images", given.images)
    return frame


def noted(frame: pd.DataFrame) -> None:
    """Put a run into results/joint_profile.csv in place of the one before, and into the page."""
    path = RESULTS / "joint_profile.csv"
    if path.exists():
        held = pd.read_csv(path)
        same = (held[KEYS] == frame[KEYS].iloc[0]).all(axis=1)
        frame = pd.concat([held[~same], frame])
    frame.to_csv(path, index=False, float_format="%.4g")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), pd.read_csv(path)), encoding="utf-8")


def filled(text: str, frame: pd.DataFrame) -> str:
    """The page with the table of the shares between its marks."""
    groups = dict(list(frame.groupby(KEYS, sort=False)))
    names = [f"{row}, {data}, {cell}" for data, row, cell in groups]
    lines = [
        [
            way if part == "all" else f"{way}: {part}",
            *(_cell(g, way, part) for g in groups.values()),
        ]
        for way, part in frame[["way", "part"]].drop_duplicates().itertuples(index=False)
    ]
    return placed(text, MARKS, ["Share of the reference's time (of that, bare)", *names], lines)


def _cell(group: pd.DataFrame, way: str, part: str) -> str:
    found = group[(group["way"] == way) & (group["part"] == part)]
    if not len(found):
        return ""
    line = found.iloc[0]
    return f"{100 * line['share_of_reference']:.1f} % ({100 * line['bare_share']:.0f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=sorted(EPS), default="mnist")
    parser.add_argument("--cell", choices=sorted(WIDTHS), default="small")
    parser.add_argument("--row", default=ROW, help="an equilibrium row with an explicit twin")
    parser.add_argument("--eps", help="as in Linf:0.31")
    parser.add_argument("--images", type=int, default=50)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    frame = profile(given)
    noted(frame)
    print(frame.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
