"""A clock that jumps back and forth changes nothing: neither order nor duration depends on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from shipped_rows import EQUILIBRIUM

import robustdeq
from robustdeq.records import Record, Store

JUMPS = """
import random, time

_draw, _first = random.Random({seed}), time.time()


def _jumping():
    return max(1.0, _first + _draw.uniform(-1e9, 1e9))


time.time = _jumping
time.time_ns = lambda: int(1e9 * _jumping())
"""
SUITE = """
name = "clock"
threats = ["Linf:3/16"]
chunk = 5
datasets = [{ name = "digits", samples = 10 }]
attacks = [{ attack = "pgd", parameters = { steps = 3 } }]
"""
RUN = """
import sys, time
from pathlib import Path
from robustdeq.running.run import Options, run_suite
from robustdeq.suite import parse_suite

if __name__ == "__main__":
    suite = parse_suite(Path(sys.argv[1]).read_text(), "clock", None)
    run_suite(suite, Options(out=Path(sys.argv[2]), workers=2))
    told = [time.time() for _ in range(50)]
    print(told == sorted(told))
"""


def run(folder: Path, name: str, seed: int | None) -> dict[str, Record]:
    """A run in processes whose clocks jump, for a seed; its records by key."""
    place = folder / name
    place.mkdir()
    if seed is not None:
        # Every process of the run imports it: this one, the server that forks, and the workers.
        (place / "sitecustomize.py").write_text(JUMPS.format(seed=seed))
    (place / "suite.toml").write_text(SUITE + EQUILIBRIUM)
    (place / "run.py").write_text(RUN)
    command = [sys.executable, place / "run.py", place / "suite.toml", folder / "out" / name]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert (done.stdout.strip() == "True") == (seed is None), "does the clock jump?"
    store = Store(folder / "out" / name / "clock" / "records")
    return {path.stem: store.read(path.stem) for path in store.folder.glob("*.parquet")}


def test_a_jumping_clock_changes_no_record(tmp_path: Path) -> None:
    steady = run(tmp_path, "steady", None)
    assert len(steady) == 2 * 2 + 2
    jumping = run(tmp_path, "jumping", 0)
    assert set(jumping) == set(steady)
    for key, record in jumping.items():
        assert record.content_digest == steady[key].content_digest
        assert 0 <= record.meta.seconds < 300


def test_nothing_asks_the_clock_on_the_wall() -> None:
    core = Path(robustdeq.__file__).resolve().parent
    folders = [core, *(core.parent / name for name in ("attacks", "defenses"))]
    asked = re.compile(r"time\.time\b|time_ns\(|st_mtime|getmtime|datetime\.(now|utcnow)|utime\(")
    files = [path for folder in folders if folder.is_dir() for path in folder.rglob("*.py")]
    assert len(files) > 100
    assert [str(path) for path in files if asked.search(path.read_text(encoding="utf-8"))] == []
