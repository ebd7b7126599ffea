"""Runs that are killed at random points, and interrupted: the same records in the end."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from faulty import WHOLE, assert_same_records, keys, run, start, table, tree

KILLS = 50 if WHOLE else 4
"""In all."""
PARTS = -(-KILLS // 10)
"""Tests that they are spread over, so that workers share them."""
SUITE = Path(__file__).parent / "small.toml"


def kill(process: subprocess.Popen[str], whole_tree: bool) -> None:
    for pid in tree(process.pid) if whole_tree else [process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing happens to, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    begun = time.monotonic()
    process = start(folder / "out", folder)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return folder / "out", time.monotonic() - begun


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc, to find processes")
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_random_points_the_records_are_the_same(
    part: int, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """Half of the kills take the driver alone, half its whole tree."""
    (whole, span), rng, round_ = undisturbed, random.Random(part), 0
    left = len(range(part, KILLS, PARTS))
    out = tmp_path / "0"
    held: dict[str, int] = {}
    while left:
        process = start(out, tmp_path)
        try:
            text, _ = process.communicate(timeout=rng.uniform(0.2, 1.0) * span)
        except subprocess.TimeoutExpired:
            kill(process, whole_tree=bool(left % 2))
            left -= 1
            time.sleep(0.5)  # what the driver's death has orphaned ends by itself
        else:
            assert process.returncode == 0, text
            assert_same_records(whole, out)
            round_ += 1
            out, held = tmp_path / str(round_), {}
            continue
        now = keys(out)
        assert {key: now.get(key) for key in held} == held, "computed again, or lost"
        held = now
    run(out)
    assert {key: keys(out)[key] for key in held} == held
    assert_same_records(whole, out)
    pd.testing.assert_frame_equal(table(whole), table(out))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(SUITE), "--out", str(out), "--workers", "2"]
    command = [sys.executable, "-P", "-c", "from robustdeq.cli import main; main()", *arguments]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folder, deadline = out / "small" / "records", time.monotonic() + 120
    while len(list(folder.glob("[!.]*.parquet"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "what is finished is kept" in error
    assert f"  {shlex.join(['robustdeq', *arguments])}\n" in error
    assert "Traceback" not in error
    assert not [path for path in folder.iterdir() if path.suffix != ".parquet"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert (out / "small" / "table.csv").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
