"""How far plain attacks, AutoAttack and a battery are from what an attack that knows better finds.

    python benchmarks/planted_table.py [--battery adaptive] [--only REGEX] [--samples 200]

One line per planted defect of `tests/planted.py`: clean accuracy, the oracle's robust accuracy,
then PGD (40 steps), AutoAttack and the battery, with the flags of the last; in percent. In bold:
more than two points above the oracle.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

import robustdeq
from robustdeq.verdict import Verdict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

SLACK = 0.02
BATTERIES: dict[str, dict[str, Any]] = {"PGD-40": {"attacks": ["pgd"]}}


def evaluated(defect: Any, samples: int, settings: dict[str, Any]) -> Verdict:
    from planted import THREAT, images

    x, y = images(samples)
    return robustdeq.evaluate(defect.model(), x, y, threat=THREAT, **settings)


def percent(accuracy: float | None, truth: float) -> str:
    if accuracy is None:
        return "failed"
    text = f"{100 * accuracy:.1f}"
    return f"**{text}**" if accuracy > truth + SLACK else text


def line(defect: Any, samples: int, batteries: dict[str, dict[str, Any]]) -> str:
    from planted import images

    truth = defect.oracle(*images(samples))
    verdicts = [evaluated(defect, samples, settings) for settings in batteries.values()]
    cells = [
        defect.name,
        percent(verdicts[0].clean_acc, 1.0),
        percent(truth, truth),
        *[percent(verdict.robust_acc, truth) for verdict in verdicts],
        f"{verdicts[-1].seconds:.0f}",
        ", ".join(verdicts[-1].flags),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--battery", action="append", default=[])
    parser.add_argument("--only", default="")
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()
    from planted import DEFECTS

    torch.set_num_threads(1)
    batteries = BATTERIES | {
        {"standard": "AutoAttack"}.get(name, name): {"battery": name}
        for name in options.battery or ["standard", "adaptive"]
    }
    heads = ["Defect", "Clean", "Oracle", *batteries, "Seconds", "Flags"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for defect in DEFECTS:
        if re.search(options.only, defect.name):
            print(line(defect, options.samples, batteries), flush=True)


if __name__ == "__main__":
    main()
