"""AutoAttack on an equilibrium model: the joint engine beside the reference, on the same images.

    pip install torchdeq
    python benchmarks/side_by_side.py --quick
    python benchmarks/side_by_side.py --cell small --images 200 --seeds 5
    python benchmarks/side_by_side.py --cell wide --images 200 --seeds 2
    python benchmarks/side_by_side.py --data cifar10-jpeg --weights weights --device cuda
    python benchmarks/side_by_side.py --device cuda --compile --precision tf32

Three ways, interleaved in blocks of images, one thread: `joint`, our engine; `reference`,
pyautoattack over a torchdeq model of the same weights with `ift=True` and its default solvers and
tolerances; `explicit`, pyautoattack over the explicit network of the same parts, the price of a
model that does not iterate. Process time, evaluations of the cell and vector-Jacobian products,
the most memory of a block, and the verdict on each image by the deployed predictor. The reference
under other seeds says how much of a disagreement is chance. A block that is done is not run again;
the same command goes on. Writes results/side_by_side-*.csv and, under the same name, a figure;
whole runs are summed up in results/side_by_side.csv and docs/joint_engine.md. The wide cell is the
small one's function at eight times the work: inner channels repeated, weights divided.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import pandas as pd
import torch
from _figures import machine, save, seaborn
from _memory import peak
from robustdeq.attacks.autoattack import AutoAttack
from torch import Tensor, nn

import robustdeq
from robustdeq.arithmetic import Precision
from robustdeq.datasets import load_slice
from robustdeq.equilibrium import EquilibriumClassifier, metered
from robustdeq.randomness import SampleRandom
from robustdeq.targets import Target
from robustdeq.threats import Threat, Violation

Result = TypeVar("Result")
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "joint_engine.md"
ROW = "Madry2018Towards_deq"
EPS = {"mnist": "Linf:0.31", "digits": "Linf:3/16", "cifar10-jpeg": "Linf:8/255"}
"""Where 40 to 80 % of that row's images stand; on the last, what rows are trained for."""
WIDTHS = {"small": 1, "wide": 8}
JOINT = AutoAttack(engine="joint")
_FIRST = 2
"""Images attacked before any is measured."""


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


def ways(
    data: str,
    cell: str,
    row: str = ROW,
    device: str = "cpu",
    weights: Path | None = None,
    joint: AutoAttack = JOINT,
) -> dict[str, tuple[nn.Module, AutoAttack]]:
    """The three models with what attacks them; the explicit one is the row's of the same recipe."""
    twin = f"{row.partition('_deq')[0]}_feedforward"
    model, explicit = (
        widened(robustdeq.load_model(id_, data, device=device, weights=weights), WIDTHS[cell])
        for id_ in (row, twin)
    )
    reference = AutoAttack()
    return {
        "joint": (model, joint),
        "reference": (TorchDEQ(model).to(device), reference),
        "explicit": (explicit, reference),
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
    """One block: seconds, counts, memory, which images stand, and what the attack notes."""
    rng = SampleRandom(seed, "side by side", range(len(x)))

    def run() -> tuple[float, Any]:
        return timed(lambda: attack.run(Target(model, 10), x, y, threat, rng), x.device)

    with metered() as meter:
        mib, (seconds, found) = peak(run, x.device)
    inside = [v is Violation.NONE for v in threat.violations(x, found.x)]
    with torch.no_grad():
        clean = judge(x).argmax(1) == y
        stands = (judge(found.x).argmax(1) == y) | ~torch.tensor(inside, device=x.device)
    return {
        "seconds": seconds, "forward": meter.forward, "backward": meter.backward, "peak_mib": mib,
        "robust": (clean & stands).int().tolist(), "notes": list(found.notes),
    }  # fmt: skip


def timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds, of the process alone where the process does the work, and the result."""
    if device.type != "cuda":
        begun = time.process_time()
        result = run()
        return time.process_time() - begun, result
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    result = run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begun, result


def held(ledger: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; none where there is no ledger yet."""
    texts = ledger.read_text().splitlines() if ledger.exists() else []
    return [json.loads(text) for text in texts]


def keep(line: dict[str, Any], ledger: Path) -> None:
    """Add a line to a ledger."""
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run(given: argparse.Namespace, ledger: Path) -> list[dict[str, Any]]:
    """All blocks; those in the ledger are read from it."""
    threat = Threat.parse(given.eps)
    part = load_slice(given.data, "test", given.images)
    x, y = torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)
    x, y = x.to(given.device), y.to(given.device)
    joint = replace(JOINT, precision=given.precision, compile=given.compile)
    models = ways(given.data, given.cell, given.row, given.device, given.weights, joint)
    lines = held(ledger)
    done = {(line["way"], line["seed"], line["begin"]) for line in lines}
    left = [block for block in blocks(given) if block not in done]
    if left:
        # What is imported only once an attack runs is no block's time or memory.
        model, attack = models["joint"]
        measured(model, model, attack, x[:_FIRST], y[:_FIRST], 0, threat)
    for way, seed, begin in left:
        if given.reseeds and not seed:
            continue
        model, attack = models[way]
        judge = model if way == "explicit" else models["joint"][0]
        rows = slice(begin, min(begin + given.block, given.images))
        line = {"way": way, "seed": seed, "begin": begin}
        line |= measured(model, judge, attack, x[rows], y[rows], seed, threat)
        lines.append(line)
        keep(line, ledger)
        print(f"{way}, seed {seed}, from {begin}: {line['seconds']:.0f} s", flush=True)
    return lines


def means(given: argparse.Namespace) -> list[str]:
    """The kind of device, and what the joint engine makes use of besides."""
    compiled = ["compiled"] if given.compile else []
    reduced = [] if given.precision == "float32" else [given.precision]
    return [torch.device(given.device).type, *compiled, *reduced]


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
            "peak_mib": highest(own),
        }  # fmt: skip
        if way != "explicit":
            row["missed"] = sum(a > b for a, b in pairs)
            row["extra"] = sum(a < b for a, b in pairs)
        rows.append(row)
    frame = pd.DataFrame(rows)
    base = frame[(frame["way"] == "reference") & (frame["seed"] == 0)].iloc[0]
    frame["time_ratio"] = base["seconds"] / frame["seconds"]
    frame["evaluations_ratio"] = base["evaluations"] / frame["evaluations"]
    frame["memory_share"] = frame["peak_mib"] / base["peak_mib"]
    per_robust = frame["seconds"] / frame["robust"].clip(lower=1)
    explicit = per_robust[frame["way"] == "explicit"].iloc[0]
    frame["explicit_multiple"] = per_robust / explicit
    return frame


def highest(lines: list[dict[str, Any]]) -> float:
    """The most memory of a block, in MiB; NaN where it was not measured."""
    known = [line["peak_mib"] for line in lines if line.get("peak_mib") is not None]
    return max(known) if len(known) == len(lines) else float("nan")


def draw(frame: pd.DataFrame, path: Path, about: str) -> None:
    """What the ways cost, and on how many images verdicts differ from the reference's."""
    sns = seaborn()
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
    for axis, column, label in zip(
        axes, ("evaluations", "seconds"), ("evaluations and products", "time (s)"),
        strict=False,
    ):  # fmt: skip
        # With several seeds of the reference: their mean, and a line from least to most.
        sns.barplot(
            frame, x=column, y="way", hue="way", errorbar=("pi", 100), legend=False, ax=axis
        )
        for bars in axis.containers:
            axis.bar_label(bars, fmt=lambda x: f"{x:,.0f}" if x >= 10 else f"{x:.1f}", padding=8)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.locator_params(axis="x", nbins=4)
        axis.set(xlabel=label, ylabel="", xmargin=0.4)
    differing = disagreements(frame)
    sns.barplot(differing, x="images", y="who", hue="verdict", ax=axes[2])
    for bars in axes[2].containers:
        axes[2].bar_label(bars, padding=3)
    top = max(4, 1.3 * differing["images"].max())
    axes[2].set(xlabel="images, of all", ylabel="", xlim=(0, top))
    axes[2].legend(title=None, loc="best")
    save(figure, path, about)
    plt.close(figure)


def disagreements(frame: pd.DataFrame) -> pd.DataFrame:
    """Images that a way leaves robust and the reference of seed 0 broke, and the other way round.

    The reference under other seeds is there to compare with; itself under seed 0 is not.
    """
    other = frame[(frame["way"] == "joint") | (frame["seed"] > 0)]
    who = other["way"] + ", seed " + other["seed"].astype(str)
    counts = other[["missed", "extra"]].assign(who=who)
    return counts.melt("who", var_name="verdict", value_name="images")


def caption(frame: pd.DataFrame, given: argparse.Namespace) -> str:
    """What a reader of the figure must know."""
    robust = frame[(frame["way"] == "reference") & (frame["seed"] == 0)].iloc[0]["robust"]
    seeds = "seed 0" if given.seeds == 1 else f"seeds 0 to {given.seeds - 1}"
    return (
        f"AutoAttack standard, {given.data} {given.eps}, {given.cell} cell, n = {given.images}, "
        f"of which {robust} stand under the reference of seed 0. The reference ran under {seeds}, "
        "the other ways under seed 0; time is that of the process, on a GPU that of the clock. "
        "Several seeds show as a mean and a line from least to most. "
        "Missed: stands, where the reference of seed 0 broke it; extra: the other way round. "
        f"Explicit is another model, whose verdicts are not compared. {machine(given.device)}."
    )


def noted(frame: pd.DataFrame, given: argparse.Namespace) -> None:
    """Put a run into results/side_by_side.csv, and that into the page."""
    path = RESULTS / "side_by_side.csv"
    own = summary(frame)
    own = {
        "data": given.data, "row": given.row, "threat": given.eps, "cell": given.cell,
        "device": " ".join(means(given)),
    } | own  # fmt: skip
    held = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(own))
    keys = list(own)[:5]
    others = held[(held[keys] != [own[key] for key in keys]).any(axis=1)]
    whole = pd.concat([others, pd.DataFrame([own])]).sort_values(keys)
    whole.to_csv(path, index=False, float_format="%.4g")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), pd.read_csv(path)), encoding="utf-8")


def summary(frame: pd.DataFrame) -> dict[str, Any]:
    """One line of a run: the joint engine against the reference, and what re-seeds differ by."""
    joint, explicit = (frame[frame["way"] == way].iloc[0] for way in ("joint", "explicit"))
    reference = frame[frame["way"] == "reference"].sort_values("seed")
    reseeds = reference[reference["seed"] > 0]
    return {
        "images": int(joint["images"]),
        "reference_robust": int(reference.iloc[0]["robust"]),
        "joint_robust": int(joint["robust"]),
        "missed": int(joint["missed"]), "extra": int(joint["extra"]),
        "reseeds": len(reseeds),
        "reseeds_missed": int(reseeds["missed"].max()) if len(reseeds) else 0,
        "reseeds_extra": int(reseeds["extra"].max()) if len(reseeds) else 0,
        "time_ratio": joint["time_ratio"], "evaluations_ratio": joint["evaluations_ratio"],
        "explicit_time_ratio": explicit["time_ratio"],
        "explicit_multiple": joint["explicit_multiple"],
        "memory_share": joint["memory_share"],
    }  # fmt: skip


def filled(text: str, frame: pd.DataFrame) -> str:
    """The page with the runs' table between its marks."""
    head = [
        "Row", "Threat", "Cell", "n", "Robust: reference, joint", "Missed, extra",
        "The same of re-seeds, at most", "Time", "Evaluations + products",
        "Explicit network's time", "Joint / explicit", "Memory, joint / reference",
    ]  # fmt: skip
    lines = [_cells(run) for _, run in frame.iterrows()]
    return placed(text, ("<!-- side_by_side -->\n", "<!-- end -->"), head, lines)


def placed(text: str, marks: tuple[str, str], head: list[str], lines: list[list[str]]) -> str:
    """The page with a table between two marks, in place of what stands there."""
    before, rest = text.split(marks[0])
    after = rest.split(marks[1])[1]
    every = [head, ["---"] * len(head), *lines]
    table = "".join(f"| {' | '.join(line)} |\n" for line in every)
    return f"{before}{marks[0]}{table}{marks[1]}{after}"


def _cells(run: Any) -> list[str]:
    kind, *more = str(run["device"]).split()
    by = [name for name in ("" if kind == "cpu" else "GPU", *more) if name]
    return [
        ", ".join([f"`{run['row']}`", str(run["data"]), *by]),
        str(run["threat"]), str(run["cell"]), str(run["images"]),
        f"{run['reference_robust']}, {run['joint_robust']}", f"{run['missed']}, {run['extra']}",
        f"{run['reseeds_missed']}, {run['reseeds_extra']} ({run['reseeds']})"
        if run["reseeds"]
        else "not run",
        f"{run['time_ratio']:.1f}", f"{run['evaluations_ratio']:.1f}",
        f"{run['explicit_time_ratio']:.1f}", f"{run['explicit_multiple']:.2f}",
        "" if pd.isna(run["memory_share"]) else f"{run['memory_share']:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 images, one seed: indicative")
    parser.add_argument("--data", choices=sorted(EPS), default="mnist")
    parser.add_argument("--cell", choices=sorted(WIDTHS), default="small")
    parser.add_argument("--row", default=ROW, help="an equilibrium row with an explicit twin")
    parser.add_argument("--eps", help="as in Linf:0.31")
    parser.add_argument("--weights", type=Path, help="a folder with the row's weights")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="float32", help="of the joint screen"
    )
    parser.add_argument("--compile", action="store_true", help="the joint engine's looks")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--block", type=int, default=50, help="images of one block")
    parser.add_argument("--seeds", type=int, default=1, help="of the reference")
    parser.add_argument(
        "--reseeds", action="store_true", help="run the other seeds alone, and print no table"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    given = parser.parse_args()
    if given.quick:
        given.images, given.block, given.seeds = 16, 16, 1
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    given.eps = given.eps or EPS[given.data]
    radius = given.eps.replace(":", "").replace("/", "over")
    name = f"side_by_side-{given.data}-{given.row}-{radius}-{given.cell}-{given.images}"
    kind, *more = means(given)
    name = "-".join([name, *([] if kind == "cpu" else [kind]), *more])
    lines = run(given, given.results / f"{name}.jsonl")
    if given.reseeds:
        return
    frame = table(lines, given.seeds)
    frame.to_csv(given.results / f"{name}.csv", index=False, float_format="%.4g")
    if not given.quick and given.results == RESULTS:
        noted(frame, given)
    draw(frame, given.results / f"{name}.svg", caption(frame, given))
    print(f"\n{name}{' (indicative)' if given.quick else ''}")
    print(frame.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
