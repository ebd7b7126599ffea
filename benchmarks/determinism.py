"""What another batch size, number of threads or processor changes, written into docs/.

    python benchmarks/determinism.py
    python benchmarks/determinism.py --samples 20 --out /tmp/small.csv

Each way is a process of its own with the same models, images and seed: as the first; once more;
with forward passes of 7 rows; with 2 threads; and with the kernels of older processors,
which stand for another machine: torch's and its libraries' code paths are chosen by environment
variables. Every way is compared with the first: the logits on clean images and on the examples that
the first one found, and the outcome of an attack of its own. `logits` is the largest difference as
a share of the largest logit; `margin` is the largest margin (likewise) of a sample whose prediction
differs. The page says where its table goes: <!-- determinism --> ... <!-- end -->.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.interfaces import Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.registry import load
from robustdeq.statistics import wilson
from robustdeq.targets import Target
from robustdeq.threats import Threat

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "determinism.csv"
PAGE = ROOT / "docs" / "determinism.md"
PLACE = re.compile(r"(<!-- determinism -->\n).*?(<!-- end -->)", re.DOTALL)
ROWS = {
    "digits, feedforward": ("Madry2018Towards_feedforward", "digits", "Linf:3/16", 300),
    "digits, deq": ("Madry2018Towards_deq", "digits", "Linf:3/16", 300),
    "digits, lyadeq": ("Chu2023Learning", "digits", "Linf:3/16", 300),
    "mnist, deq": ("Madry2018Towards_deq", "mnist", "Linf:0.3", 50),
}
"""By name: the row's ID, its data set, its threat, and the most samples that it is measured on."""
TOLERANCE = 1e-5
"""Largest difference of a logit across machines, as a share of the largest logit."""
FIRST = "as the first"
Measured = dict[str, Any]
"""Arrays by name."""


@dataclass(frozen=True)
class Way:
    """How a process differs from the first."""

    name: str
    threads: int = 1
    batch_size: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
_OLD = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
WAYS = (
    Way(FIRST),
    Way("once more"),
    Way("forward passes of 7 rows", batch_size=7),
    Way("2 threads", threads=2),
    Way("kernels for AVX2", environment=_AVX2),
    Way("kernels for SSE", environment=_OLD),
)
HEAD = (
    "| Way | Models with equal logits | Logits differ by | Other predictions | Other steps "
    "| Models with equal examples | Other outcomes | Accuracy outside of its interval |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def measured(way: Way, samples: int, rows: Sequence[str], examples: Measured) -> Measured:
    """Of this process: logits, solver steps, examples and outcomes, per row."""
    torch.set_num_threads(way.threads)
    found: Measured = {}
    for row in rows:
        name, data, threat, most = ROWS[row]
        held = load_slice(data, "test", min(samples, most))
        x, y = torch.from_numpy(held.images) / 255, torch.from_numpy(held.labels)
        model = robustdeq.load_model(name, data).eval()
        target = Target(model, 10, batch_size=way.batch_size)
        rng = SampleRandom(0, "apgd", range(len(y)))
        own = load("attack", "apgd", {}).run(target, x, y, Threat.parse(threat), rng)
        own = own.x if isinstance(own, Candidates) else own
        there = torch.from_numpy(examples.get(f"{row}/x", own.numpy()))
        with torch.no_grad():
            outputs = [target(points) for points in (x, there)]
            right = [target(points).logits.argmax(1) == y for points in (x, own)]
        found[f"{row}/x"] = own.numpy()
        found[f"{row}/robust"] = (right[0] & right[1]).numpy()
        found[f"{row}/logits"] = torch.cat([o.logits for o in outputs]).numpy()
        steps = [sum(s.steps for s in o.solves) for o in outputs if o.solves]
        found[f"{row}/steps"] = np.concatenate([np.asarray(s) for s in steps] or [np.zeros(0)])
    return found


def in_a_process(way: Way, given: argparse.Namespace, examples: Path | None) -> Measured:
    """What `measured` gives under the way's environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.npz"
        command = [sys.executable, __file__, "--way", way.name, "--data", given.data]
        command += ["--samples", str(given.samples), "--out", str(out)]
        command += ["--examples", str(examples)] if examples else []
        subprocess.run(command, check=True, env={**os.environ, **way.environment})
        return dict(np.load(out))


def line(way: Way, row: str, first: Measured, other: Measured) -> dict[str, Any]:
    """One line of the table: a way against the first, on one row."""
    a, b = first[f"{row}/logits"], other[f"{row}/logits"]
    scale = float(np.abs(a).max())
    moved = a.argmax(1) != b.argmax(1)
    top = np.sort(a, axis=1)
    margins = (top[:, -1] - top[:, -2])[moved] / scale
    robust = [held[f"{row}/robust"] for held in (first, other)]
    interval = wilson(int(robust[0].sum()), len(robust[0]))
    return {
        "way": way.name, "row": row, "samples": len(robust[0]), "points": len(a),
        "logits_equal": bool((a == b).all()), "logits": float(np.abs(a - b).max()) / scale,
        "predictions": int(moved.sum()), "margin": float(margins.max(initial=0.0)),
        "steps": int((first[f"{row}/steps"] != other[f"{row}/steps"]).sum()),
        "examples_equal": bool(np.array_equal(first[f"{row}/x"], other[f"{row}/x"])),
        "outcomes": int((robust[0] != robust[1]).sum()),
        "first": float(robust[0].mean()), "robust": float(robust[1].mean()),
        "inside": bool(interval.low <= robust[1].mean() <= interval.high),
    }  # fmt: skip


def compared(given: argparse.Namespace) -> pd.DataFrame:
    """All ways against the first."""
    with tempfile.TemporaryDirectory() as folder:
        first = in_a_process(WAYS[0], given, None)
        examples = Path(folder) / "first.npz"
        np.savez(examples, **first)
        lines = []
        for way in (way for way in WAYS[1:] if re.search(given.ways, way.name)):
            other = in_a_process(way, given, examples)
            lines += [line(way, row, first, other) for row in _rows(given)]
    return pd.DataFrame(lines)


def _rows(given: argparse.Namespace) -> list[str]:
    return [row for row in ROWS if row.startswith(given.data)]


def table(frame: pd.DataFrame) -> str:
    """The Markdown table: a line per way, over all rows."""
    groups = frame.groupby("way", sort=False)
    return HEAD + "".join(f"| {' | '.join([str(name), *_cells(g)])} |\n" for name, g in groups)


def _cells(rows: pd.DataFrame) -> list[str]:
    largest = rows["logits"].max()
    return [
        f"{rows['logits_equal'].sum()} of {len(rows)}",
        "0" if largest == 0 else f"{largest:.0e}",
        f"{rows['predictions'].sum()} of {rows['points'].sum()}",
        str(rows["steps"].sum()),
        f"{rows['examples_equal'].sum()} of {len(rows)}",
        f"{rows['outcomes'].sum()} of {rows['samples'].sum()}",
        f"{(~rows['inside']).sum()} of {len(rows)}",
    ]


def filled(page: str, frame: pd.DataFrame) -> str:
    """The page with its table."""
    return PLACE.sub(lambda match: match[1] + table(frame) + match[2], page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--data", default="", help="only rows whose name begins so")
    parser.add_argument("--ways", default="", help="only ways in which this expression is found")
    parser.add_argument("--out", type=Path, help="write there; leave docs/ alone")
    parser.add_argument("--way", help="only measure, in this process; for the script itself")
    parser.add_argument("--examples", type=Path, help="what the first way found")
    given = parser.parse_args()
    if given.way:
        way = next(way for way in WAYS if way.name == given.way)
        held = dict(np.load(given.examples)) if given.examples else {}
        np.savez(given.out, **measured(way, given.samples, _rows(given), held))
        return
    frame = compared(given)
    print(frame.to_string(index=False, float_format="%.3g"))
    frame.to_csv(given.out or RESULTS, index=False, float_format="%.6g")
    if given.out is None:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(filled(page, pd.read_csv(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
