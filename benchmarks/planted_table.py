"""How far plain attacks, AutoAttack and a battery are from what an attack that knows better finds.

    python benchmarks/planted_table.py [--battery adaptive] [--only REGEX] [--samples 200]

One line per planted defect of `tests/planted.py`: clean accuracy, the robust accuracy that the
oracle leaves, then PGD (40 steps), AutoAttack and the batteries, with seconds and flags of the
last; in percent. In bold: more than two points above the oracle.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import torch

import robustdeq
from robustdeq.verdict import Verdict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
planted: Any = importlib.import_module("planted")

SLACK = 0.02
PGD: dict[str, Any] = {"attacks": ["pgd"]}


def evaluated(defect: Any, samples: int, settings: dict[str, Any]) -> Verdict:
    x, y = planted.images(samples)
    return robustdeq.evaluate(defect.model(), x, y, threat=planted.THREAT, **settings)


def percent(accuracy: float | None, truth: float) -> str:
    if accuracy is None:
        return "failed"
    text = f"{100 * accuracy:.1f}"
    return f"**{text}**" if accuracy > truth + SLACK + 1e-9 else text


def names(flags: tuple[str, ...]) -> str:
    """The flags without their figures."""
    return ", ".join(dict.fromkeys(re.split("[=:]", flag)[0] for flag in flags))


def line(defect: Any, samples: int, batteries: dict[str, dict[str, Any]]) -> str:
    truth = defect.oracle(*planted.images(samples))
    verdicts = [evaluated(defect, samples, settings) for settings in batteries.values()]
    clean, last = verdicts[0].clean_acc, verdicts[-1]
    cells = [defect.name, percent(clean, 1.0), percent(truth, truth)]
    cells += [percent(verdict.robust_acc, truth) for verdict in verdicts]
    cells += [f"{last.seconds:.0f}", names(last.flags)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--battery", action="append", default=[])
    parser.add_argument("--only", default="")
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = options.battery or ["standard", "adaptive"]
    batteries = {"PGD-40": PGD} | {name: {"battery": name} for name in wanted}
    heads = ["Defect", "Clean", "Oracle", *batteries, "Seconds", "Flags"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for defect in planted.DEFECTS:
        if re.search(options.only, defect.name):
            print(line(defect, options.samples, batteries), flush=True)


if __name__ == "__main__":
    main()
