"""Adversarial training with and without carried states: time to a given AutoAttack accuracy.

    python benchmarks/training.py --quick
    python benchmarks/training.py --seeds 3
    python benchmarks/training.py --data mnist --device cuda --ways solve,joint,joint_bfloat16

The recipe of the row Madry2018Towards_deq, whose inner attack takes its gradients from a cold solve
per step (`solve`, plain PGD-AT), from a warm one (`warm`), or from carried states (`joint`, and
`joint_bfloat16` under autocast). `solve_tight` and `warm_tight` solve to the deployed tolerance,
where the recipe takes a few steps. Same seeds, images and schedule; interleaved in blocks of
epochs, one thread, process time of the training alone (on a GPU wall-clock time, synchronized).
After each block the model as it would be deployed is attacked by AutoAttack's joint engine (a
screen whose examples are confirmed from a cold start), after the last also by the reference. A
block that is done is not run again; the same command goes on. Time to an accuracy is that of the
first screen that reaches it; ratios are against `solve` under the same seed.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from robustdeq.attacks.autoattack import AutoAttack

from robustdeq.datasets import load_slice
from robustdeq.equilibrium import metered
from robustdeq.randomness import SampleRandom, derived_seed
from robustdeq.registry import load
from robustdeq.suite import find_suite
from robustdeq.targets import Target
from robustdeq.threats import Threat, Violation
from robustdeq.training.descent import Descent
from robustdeq.training.run import Job, jobs_of
from robustdeq.training.task import Task, constrain, model_state, restore_model

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
PLACE = re.compile(r"(<!-- training -->\n).*?(<!-- end -->)", re.DOTALL)
TIGHT = {"gradient": "honest", "solver_steps": 0}
"""The deployed solver and the implicit gradient, in place of the recipe's few steps."""
WAYS: dict[str, dict[str, Any]] = {
    "solve": {},
    "warm": {"inner": "warm"},
    "joint": {"inner": "joint"},
    "joint_bfloat16": {"inner": "joint", "inner_precision": "bfloat16"},
    "solve_tight": TIGHT,
    "warm_tight": {"inner": "warm", **TIGHT},
}
GIVEN = {"digits": (40, 45, 50), "mnist": (80, 85, 90)}
"""Robust accuracies, in percent, below what the shipped row reaches (53 and 92)."""


def job_of(data: str) -> Job:
    """The training of the row."""
    jobs = jobs_of(find_suite(data), Path())
    return next(job for job in jobs if (job.defense, job.recipe) == ("deq", "pgd_at"))


def trainer(given: argparse.Namespace, way: str, seed: int) -> Descent:
    """A training at its beginning."""
    job = job_of(given.data)
    parameters = {**job.recipe_parameters, **WAYS[way]}
    if given.epochs:
        parameters["epochs"] = given.epochs
    data = load_slice(given.data, "train")
    torch.manual_seed(derived_seed(seed, "initialization"))
    device = torch.device(given.device)
    model = load("defense", job.defense, job.parameters).build(data.spec, device)
    recipe, threat = load("recipe", job.recipe, parameters), Threat.parse(job.threat)
    task = Task(model, recipe, data, threat, seed, device, augmentation=job.augmentation)
    return Descent(task)


def clock(device: str) -> float:
    """Process time; on a GPU wall-clock time, since the process only waits for it."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def trained_on(descent: Descent, until: int, device: str) -> dict[str, float]:
    """Train up to a step; what that cost."""
    descent.model.train()
    begun = clock(device)
    with metered() as meter:
        while descent.step < until:
            descent.advance()
    seconds = clock(device) - begun
    return {"seconds": seconds, "forward": meter.forward, "backward": meter.backward}


def attacked(descent: Descent, given: argparse.Namespace, engine: str) -> dict[str, float]:
    """Clean accuracy and that under AutoAttack, of the model as it would be deployed."""
    task, model = descent.task, descent.model
    before = model_state(model)
    constrain(model, iterations=200)
    part = load_slice(given.data, "test", given.images)
    x = torch.from_numpy(part.images).to(task.device).float() / 255
    y = torch.from_numpy(part.labels).to(task.device)
    attack = AutoAttack(engine="joint" if engine == "joint" else "reference")
    rng = SampleRandom(0, "training", range(len(x)))
    found = attack.run(Target(model.eval(), part.spec.classes), x, y, task.threat, rng)
    inside = torch.tensor([v is Violation.NONE for v in task.threat.violations(x, found.x)])
    with torch.no_grad():
        clean = model(x).argmax(1) == y
        stands = clean & ((model(found.x).argmax(1) == y) | ~inside.to(task.device))
    restore_model(model, before)
    return {"clean": float(clean.float().mean()), "robust": float(stands.float().mean())}


class Ledger:
    """One JSON line per block or final attack; what is in it is not computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        held = path.read_text().splitlines() if path.exists() else []
        self.lines: list[dict[str, Any]] = [json.loads(text) for text in held]

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        """The lines that say so, in order."""
        return [line for line in self.lines if all(line[k] == v for k, v in wanted.items())]

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def blocks(given: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    """Seed, block and way, interleaved: what disturbs the machine disturbs all ways."""
    for seed in range(given.seeds):
        for block in range(given.blocks):
            for way in given.ways:
                yield seed, block, way


def run(given: argparse.Namespace, ledger: Ledger) -> None:
    """All blocks that are not in the ledger."""
    for seed, block, way in blocks(given):
        if ledger.of(kind="block", way=way, seed=seed, block=block):
            continue
        descent = trainer(given, way, seed)
        before = ledger.path.with_suffix(f".{way}.{seed}.{block - 1}.checkpoint")
        if block:
            descent.restore(torch.load(before, map_location=given.device, weights_only=True))
        until = round((block + 1) * descent.steps / given.blocks)
        line: dict[str, Any] = {"kind": "block", "way": way, "seed": seed, "block": block}
        line |= {"epoch": until / descent.per_epoch, **trained_on(descent, until, given.device)}
        line |= attacked(descent, given, "joint")
        if block + 1 == given.blocks:
            line["reference"] = attacked(descent, given, "reference")["robust"]
        else:
            ledger.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(
                descent.state(), ledger.path.with_suffix(f".{way}.{seed}.{block}.checkpoint")
            )
        ledger.add(line)
        before.unlink(missing_ok=True)
        print(
            f"{way}, seed {seed}, epoch {line['epoch']:g}: {line['seconds']:.1f} s, "
            f"robust {line['robust']:.3f}",
            flush=True,
        )


def curves(given: argparse.Namespace, ledger: Ledger) -> pd.DataFrame:
    """One row per screen: seconds of training so far, and the accuracies."""
    frame = pd.DataFrame([line for line in ledger.lines if line["way"] in given.ways])
    frame = frame[frame["seed"] < given.seeds].sort_values(["seed", "way", "block"])
    costs = frame.groupby(["seed", "way"])[["seconds", "forward", "backward"]].cumsum()
    return frame.assign(**{name: costs[name] for name in costs})


def table(given: argparse.Namespace, frame: pd.DataFrame) -> pd.DataFrame:
    """One row per way and seed."""
    plain = trainer(given, "solve", 0)
    seen = plain.steps * plain.task.recipe.batch_size
    rows = []
    for seed in range(given.seeds):
        for way in given.ways:
            own = frame[(frame["seed"] == seed) & (frame["way"] == way)]
            last = own.iloc[-1]
            row = {
                "way": way, "seed": seed, "epochs": last["epoch"], "images": given.images,
                "seconds": last["seconds"],
                "seconds_per_epoch": last["seconds"] / last["epoch"],
                "evaluations": last["forward"] / seen, "products": last["backward"] / seen,
                "clean": last["clean"], "robust": last["reference"], "screen": last["robust"],
            }  # fmt: skip
            for percent in GIVEN[given.data]:
                reached = own[own["robust"] >= percent / 100]
                row[f"seconds_to_{percent}"] = (
                    reached["seconds"].iloc[0] if len(reached) else float("nan")
                )
            rows.append(row)
    return with_ratios(pd.DataFrame(rows), GIVEN[given.data])


def with_ratios(frame: pd.DataFrame, percents: tuple[int, ...]) -> pd.DataFrame:
    """How many times sooner than `solve` under the same seed; missing where one never arrives."""
    plain = frame[frame["way"] == "solve"].set_index("seed")
    if plain.empty:
        return frame
    frame["seconds_ratio"] = frame["seed"].map(plain["seconds"]) / frame["seconds"]
    for percent in percents:
        name = f"seconds_to_{percent}"
        frame[f"ratio_to_{percent}"] = frame["seed"].map(plain[name]) / frame[name]
    return frame


def page_table(frame: pd.DataFrame) -> str:
    """One line per way: medians over the seeds, and accuracies in percent seed by seed."""
    percents = [name.removeprefix("ratio_to_") for name in frame if name.startswith("ratio_to_")]
    head = ["`inner`", "Evaluations + products", "Seconds", "Times faster"]
    head += [f"... to {percent} %" for percent in percents]
    head += ["Clean", "AutoAttack"]
    lines = [head, ["---"] * len(head)]
    for way, own in frame.groupby("way", sort=False):
        middle = own.median(numeric_only=True)
        cells = [f"`{way}`", f"{middle['evaluations']:.0f} + {middle['products']:.0f}"]
        cells += [f"{middle['seconds']:.1f}", _span(own["seconds_ratio"])]
        cells += [_span(own[f"ratio_to_{percent}"]) for percent in percents]
        cells += [", ".join(f"{100 * v:.1f}" for v in own[name]) for name in ("clean", "robust")]
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _span(ratios: pd.Series[float]) -> str:
    """Median, with lowest and highest; how many seeds never arrived."""
    text = f"{ratios.median():.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
    missing = int(ratios.isna().sum())
    return text if not missing else f"{text}, {missing} without"


def filled(page: str, frame: pd.DataFrame) -> str:
    """The page with its table."""
    return PLACE.sub(lambda match: match[1] + page_table(frame) + match[2], page)


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Accuracy on the screen over seconds of training; a line per training."""
    import matplotlib as mpl
    import seaborn as sns
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "robustdeq"}
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    with sns.axes_style("whitegrid"):
        axis = figure.subplots()
    sns.lineplot(frame, x="seconds", y="robust", hue="way", units="seed", estimator=None,
                 marker="o", markersize=4, ax=axis)  # fmt: skip
    axis.set(xlabel="seconds of training", ylabel="accuracy under AutoAttack (joint engine)")
    figure.savefig(path, format="svg", metadata={"Date": None})


def settings() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="10 epochs, one seed: indicative")
    parser.add_argument("--data", choices=sorted(GIVEN), default="digits")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ways", default="solve,warm,joint", help=", ".join(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=0, help="0: the row's own")
    parser.add_argument("--blocks", type=int, default=10, help="screens per training")
    parser.add_argument("--images", type=int, default=200, help="of the test split")
    given = parser.parse_args()
    given.ways = given.ways.split(",")
    if unknown := set(given.ways) - set(WAYS):
        parser.error(f"unknown ways {sorted(unknown)}; known: {', '.join(WAYS)}")
    if given.quick:
        given.seeds, given.epochs, given.blocks, given.images = 1, 10, 2, 32
    return given


def main() -> None:
    given = settings()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # Another schedule or device is another experiment, with a file of its own.
    parts = [given.data, given.device, given.epochs or "", given.blocks, given.images]
    ledger = Ledger(RESULTS / f"training-{'-'.join(str(p) for p in parts if p)}.jsonl")
    run(given, ledger)
    screens = curves(given, ledger)
    frame = table(given, screens)
    standard = not given.quick and (given.data, given.device) == ("digits", "cpu")
    name = "training" if standard else ledger.path.stem
    frame.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.4g")
    draw(screens, RESULTS / f"{name}.svg")
    if standard:
        held = pd.read_csv(RESULTS / f"{name}.csv")
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), held), encoding="utf-8")
    print(f"\n{name}{' (indicative)' if given.quick else ''}")
    print(frame.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
