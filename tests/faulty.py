"""What the tests of faults share: a small suite, its run in a process, and what must be equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from shipped_rows import EQUILIBRIUM, PLAIN

from robustdeq.records import Record, Store
from robustdeq.running.run import Options, run_suite
from robustdeq.suite import Suite, parse_suite
from robustdeq.tables import COST_COLUMNS
from robustdeq.verdict import Verdict

WHOLE = os.environ.get("ROBUSTDEQ_FAULTS") == "whole"
"""Whether all of the faults are wanted, as by the tox environment `faults`, or what stands for them
in the default run."""
TRICKS = Path(__file__).parent / "faults" / "tricks.py"
HEAD = """
name = "faulty"
threats = ["Linf:1/8"]
chunk = 10
[[datasets]]
name = "digits"
samples = 20
"""
ATTACKS = """
[[attacks]]
attack = "pgd"
parameters = { steps = 3 }
[[attacks]]
attack = "square"
parameters = { queries = 20 }
"""
ROWS = ATTACKS + PLAIN + EQUILIBRIUM
COSTS = ["seconds", "forward_nfe", "backward_nfe"]
SCRIPT = """
import sys
from pathlib import Path
from robustdeq.running.run import Options, run_suite
from robustdeq.suite import parse_suite

if __name__ == "__main__":
    text = Path(sys.argv[2]).read_text()
    run_suite(parse_suite(text, "faulty", None), Options(out=Path(sys.argv[1]), workers=2))
    print("done")
"""


def trick(how: str, **parameters: Any) -> str:
    """The lines of a suite that put a trick before its attacks."""
    given = {"how": how, **parameters}
    shown = ", ".join(f"{name} = {json.dumps(value)}" for name, value in given.items())
    return f'[[attacks]]\nattack = "{TRICKS}:Trick"\nparameters = {{ {shown} }}\n'


def suite(extra: str = "") -> Suite:
    return parse_suite(HEAD + extra + ROWS, "faulty", None)


def run(out: Path, extra: str = "", **options: Any) -> dict[str, Verdict]:
    verdicts = run_suite(suite(extra), Options(out=out, **{"workers": 2, **options}))
    return {verdict.id: verdict for verdict in verdicts}


def start(out: Path, folder: Path, extra: str = "") -> subprocess.Popen[str]:
    """The same run in a process that can be killed."""
    script, text = folder / "script.py", folder / "suite.toml"
    script.write_text(SCRIPT)
    text.write_text(HEAD + extra + ROWS)
    return subprocess.Popen(
        [sys.executable, str(script), str(out), str(text)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def table(out: Path) -> pd.DataFrame:
    frame = pd.read_csv(out / "faulty" / "table.csv")
    return frame.drop(columns=list(COST_COLUMNS))


def keys(out: Path) -> dict[str, int]:
    """When each finished record was written."""
    folder = out / "faulty" / "records"
    return {p.stem: p.stat().st_mtime_ns for p in folder.glob("[!.]*.parquet")}


def records(out: Path) -> dict[str, Record]:
    store = Store(out / "faulty" / "records")
    held = {key: store.read(key) for key in keys(out)}
    return {key: record for key, record in held.items() if record is not None}


def assert_same_records(one: Path, other: Path) -> None:
    """Byte for byte, in the columns that are not times."""
    left, right = records(one), records(other)
    assert left.keys() == right.keys()
    for key, record in left.items():
        rows = right[key].rows
        pd.testing.assert_frame_equal(
            record.rows.drop(columns="seconds", errors="ignore"),
            rows.drop(columns="seconds", errors="ignore"),
            check_exact=True,
        )
        assert record.content_digest == right[key].content_digest
