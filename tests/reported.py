"""Runs to report on: a tiny real one with its trainings, copies of it that say other things, and
reports made by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robustdeq.records import Store
from robustdeq.reporting.run import RunReport, read_index, write_index
from robustdeq.running.run import Options, run_suite
from robustdeq.statistics import wilson
from robustdeq.suite import AttackEntry, adjusted, find_suite
from robustdeq.verdict import Evidence, Verdict

SAMPLES = 6
HOSTILE = (
    "<script>alert(1)</script> \\input{/etc/passwd} $x^2$ 100% a_b #1 & {~} `code` | [x](y) *b*\n"
    "\\end{table}\x1b[31m\u202e \u4e2d\u00e9" + "A" * 10_000
)
_DONE: dict[str, Path] = {}


def tiny_run(factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `lyadeq` and two rows of `deq`, made once; tests copy it."""
    if "run" not in _DONE:
        suite = adjusted(
            find_suite("digits"), SAMPLES, None, "^(Chu2023|Standard_deq|Madry2018Towards_deq)"
        )
        attack = AttackEntry(attack="pgd", parameters={"steps": 3})
        suite = replace(suite, battery="", attacks=(attack,))
        out = factory.mktemp("out")
        run_suite(suite, Options(out=out, workers=1))
        _DONE["run"] = out / suite.name
    return _DONE["run"]


def copied(run: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run's folder whose `run.json` is changed."""
    shutil.copytree(run, target)
    data = read_index(target)
    change(data)
    write_index(target, data)
    return target


def with_about(name: str, value: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for row in data["rows"]:
            row["about"][name] = value

    return change


def unbreak(folder: Path, name: str) -> int:
    """Forge the first record in which a row's sample is broken; returns the sample's index."""
    data = read_index(folder)
    row = next(row for row in data["rows"] if row["case"]["id"] == name)
    store = Store(folder / "records")
    for key in (key for keys in row["records"].values() for key in keys):
        record = store.read(key)
        if record is not None and record.meta.kind == "attack":
            fallen = record.rows.index[~record.rows["adversarial_correct"].astype(bool)]
            record.rows.loc[fallen[0], "adversarial_correct"] = True
            store.write(record)
            return int(record.rows.loc[fallen[0], "index"])
    raise AssertionError("no sample of the row is broken")


def verdict(name: str, robust: Sequence[bool], **more: Any) -> Verdict:
    """A verdict on so many samples, each right without an attack."""
    n = len(robust)
    samples = pd.DataFrame({"index": range(n), "label": [k % 10 for k in range(n)]})
    samples["clean"] = True
    samples["robust"] = list(robust)
    samples["broken_by"] = pd.Series([None if r else "pgd" for r in robust], dtype=object)
    low, high = wilson(sum(robust), n)
    told: dict[str, Any] = {
        "defense": "deq",
        "dataset": "digits",
        "threat": "Linf:8/255",
        "clean_acc": 1.0,
        "autoattack_acc": sum(robust) / n,
        "robust_acc": sum(robust) / n,
        "robust_low": low,
        "robust_high": high,
        "forward_nfe": 1200,
        "backward_nfe": 300,
        "seconds": 2.0,
        "samples": samples,
    }
    return Verdict(id=name, n=n, **(told | more))


def report_of(
    *verdicts: Verdict,
    folder: str = "out/hand",
    about: dict[str, str] | None = None,
    trainings: dict[str, dict[str, str]] | None = None,
    cases: dict[str, dict[str, Any]] | None = None,
    **data: Any,
) -> RunReport:
    """A run with these rows; `trainings` and `cases` add to what it says of a row, by its ID."""
    named = ("id", "defense", "dataset", "threat", "n")
    held = [
        {name: getattr(v, name) for name in named} | {"digest": "d"} | (cases or {}).get(v.id, {})
        for v in verdicts
    ]
    entries = [{"id": v.id, "training": (trainings or {}).get(v.id)} for v in verdicts]
    suite = {"name": "hand", "datasets": [{"name": "digits"}], "defenses": entries}
    told = {
        "format": 1,
        "robustdeq": "0.1.0",
        "suite": suite,
        "seed": 0,
        "environment": {"torch": "2.9", "device": "cpu"},
        "machine": {"platform": "Linux-a"},
        "git": {"commit": "c" * 40, "dirty": False},
        "rows": [{"case": case, "about": about or {}} for case in held],
    }
    evidences = tuple(Evidence(case=case, chunks=1, expected={}) for case in held)
    return RunReport(Path(folder), told | data, evidences, tuple(verdicts))


def is_one_sentence(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
