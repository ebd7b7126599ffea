"""AutoAttack on an equilibrium model: the joint engine beside the reference, on the same images.

    pip install torchdeq
    python benchmarks/side_by_side.py --quick
    python benchmarks/side_by_side.py --cell small --images 200 --seeds 5
    python benchmarks/side_by_side.py --cell wide --images 200 --seeds 2

Three ways, interleaved in blocks of images, one thread: `joint`, our engine; `reference`,
pyautoattack over a torchdeq model of the same weights with `ift=True` and its default solvers and
tolerances; `explicit`, pyautoattack over the explicit network of the same parts, the price of a
model that does not iterate. Process time, evaluations of the cell and vector-Jacobian products,
and the verdict on each image by the deployed predictor. The reference under other seeds says how
much of a disagreement is chance. A block that is done is not run again; the same command goes on.
The wide cell is the small one's function at eight times the work: inner channels repeated, weights
divided.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from robustdeq.attacks.autoattack import AutoAttack
from torch import Tensor, nn

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.equilibrium import EquilibriumClassifier, metered
from robustdeq.randomness import SampleRandom
from robustdeq.targets import Target
from robustdeq.threats import Threat, Violation

RESULTS = Path(__file__).resolve().parent / "results"
ROW, TWIN = "Madry2018Towards_deq", "Madry2018Towards_feedforward"
EPS = {"mnist": "Linf:0.31", "digits": "Linf:3/16"}
"""Where 40 to 80 % of the row's images stand."""
WIDTHS = {"small": 1, "wide": 8}


class TorchDEQ(nn.Module):
    """The row's stem, cell and readout around torchdeq's solvers and implicit gradient."""

    def __init__(self, base: EquilibriumClassifier) -> None:
        super().__init__()
        from torchdeq import get_deq

        self.base = base
        self.deq = get_deq(ift=True)
        # In eval mode torchdeq returns a state without a gradient.
        self.deq.train()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        u = self.base.embed(x)
        states, _ = self.deq(lambda z: self.base.cell(z, u, 0), self.base.start(u))
        return self.base.readout(states[-1])


def widened(model: Any, factor: int) -> Any:
    """The same function with `factor` times the inner channels."""
    model = copy.deepcopy(model)
    first, second = model.residual.first, model.residual.second
    with torch.no_grad():
        first.weight = nn.Parameter(first.weight.repeat(factor, *[1] * (first.weight.dim() - 1)))
        first.bias = None if first.bias is None else nn.Parameter(first.bias.repeat(factor))
        shape = (1, factor, *[1] * (second.weight.dim() - 2))
        second.weight = nn.Parameter(second.weight.repeat(shape) / factor)
    return model


def ways(data: str, cell: str) -> dict[str, tuple[nn.Module, AutoAttack]]:
    """The three models with what attacks them."""
    model = widened(robustdeq.load_model(ROW, data), WIDTHS[cell])
    twin = widened(robustdeq.load_model(TWIN, data), WIDTHS[cell])
    reference = AutoAttack()
    return {
        "joint": (model, AutoAttack(engine="joint")),
        "reference": (TorchDEQ(model), reference),
        "explicit": (twin, reference),
    }


def blocks(given: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Way, seed and first image of each block, interleaved."""
    for begin in range(0, given.images, given.block):
        for way in ("joint", "reference", "explicit"):
            yield way, 0, begin
    for seed in range(1, given.seeds):
        for begin in range(0, given.images, given.block):
            yield "reference", seed, begin


def measured(
    model: nn.Module, judge: nn.Module, attack: AutoAttack, x: Tensor, y: Tensor, seed: int,
    threat: Threat,
) -> dict[str, Any]:  # fmt: skip
    """One block: process time, counts, and which images stand."""
    rng = SampleRandom(seed, "side by side", range(len(x)))
    begun = time.process_time()
    with metered() as meter:
        found = attack.run(Target(model, 10), x, y, threat, rng).x
    seconds = time.process_time() - begun
    inside = [v is Violation.NONE for v in threat.violations(x, found)]
    with torch.no_grad():
        clean = judge(x).argmax(1) == y
        stands = (judge(found).argmax(1) == y) | ~torch.tensor(inside)
    return {
        "seconds": seconds, "forward": meter.forward, "backward": meter.backward,
        "robust": (clean & stands).int().tolist(),
    }  # fmt: skip


def run(given: argparse.Namespace, ledger: Path) -> list[dict[str, Any]]:
    """All blocks; those in the ledger are read from it."""
    threat = Threat.parse(given.eps)
    part = load_slice(given.data, "test", given.images)
    x, y = torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)
    models = ways(given.data, given.cell)
    held = ledger.read_text().splitlines() if ledger.exists() else []
    lines = [json.loads(text) for text in held]
    done = {(line["way"], line["seed"], line["begin"]) for line in lines}
    for way, seed, begin in blocks(given):
        if (way, seed, begin) in done or (given.reseeds and not seed):
            continue
        model, attack = models[way]
        judge = model if way == "explicit" else models["joint"][0]
        rows = slice(begin, min(begin + given.block, given.images))
        line = {"way": way, "seed": seed, "begin": begin}
        line |= measured(model, judge, attack, x[rows], y[rows], seed, threat)
        lines.append(line)
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with ledger.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{way}, seed {seed}, from {begin}: {line['seconds']:.0f} s", flush=True)
    return lines


def verdicts(lines: list[dict[str, Any]], way: str, seed: int) -> list[int]:
    """Whether each image stands, in order."""
    own = [line for line in lines if line["way"] == way and line["seed"] == seed]
    return [flag for line in sorted(own, key=lambda line: line["begin"]) for flag in line["robust"]]


def table(lines: list[dict[str, Any]], seeds: int) -> pd.DataFrame:
    """One row per way; misses and extras are against the reference under seed 0."""
    reference = verdicts(lines, "reference", 0)
    rows = []
    for way, seed in [("joint", 0), ("explicit", 0), *[("reference", s) for s in range(seeds)]]:
        own = [line for line in lines if line["way"] == way and line["seed"] == seed]
        stands = verdicts(lines, way, seed)
        pairs = list(zip(stands, reference, strict=True))
        row = {
            "way": way, "seed": seed, "images": len(stands), "robust": sum(stands),
            "seconds": sum(line["seconds"] for line in own),
            "evaluations": sum(line["forward"] + line["backward"] for line in own),
        }  # fmt: skip
        if way != "explicit":
            row["missed"] = sum(a > b for a, b in pairs)
            row["extra"] = sum(a < b for a, b in pairs)
        rows.append(row)
    frame = pd.DataFrame(rows)
    base = frame[(frame["way"] == "reference") & (frame["seed"] == 0)].iloc[0]
    frame["time_ratio"] = base["seconds"] / frame["seconds"]
    frame["evaluations_ratio"] = base["evaluations"] / frame["evaluations"]
    per_robust = frame["seconds"] / frame["robust"].clip(lower=1)
    explicit = per_robust[frame["way"] == "explicit"].iloc[0]
    frame["explicit_multiple"] = per_robust / explicit
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 images, one seed: indicative")
    parser.add_argument("--data", choices=sorted(EPS), default="mnist")
    parser.add_argument("--cell", choices=sorted(WIDTHS), default="small")
    parser.add_argument("--eps", help="as in Linf:0.31")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--block", type=int, default=50, help="images of one block")
    parser.add_argument("--seeds", type=int, default=1, help="of the reference")
    parser.add_argument(
        "--reseeds", action="store_true", help="run the other seeds alone, and print no table"
    )
    given = parser.parse_args()
    if given.quick:
        given.images, given.block, given.seeds = 16, 16, 1
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    given.eps = given.eps or EPS[given.data]
    radius = given.eps.replace(":", "").replace("/", "over")
    name = f"side_by_side-{given.data}-{radius}-{given.cell}-{given.images}"
    lines = run(given, RESULTS / f"{name}.jsonl")
    if given.reseeds:
        return
    frame = table(lines, given.seeds)
    frame.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.4g")
    print(f"\n{name}{' (indicative)' if given.quick else ''}")
    print(frame.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
