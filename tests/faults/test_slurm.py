"""The batch script of the documents, with Slurm's commands replaced by ones that run here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from faulty import WHOLE

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "docs" / "robustdeq.sbatch"
SUITE = Path(__file__).parent / "small.toml"
SHIMS = {
    "srun": 'while case "$1" in -w) shift 2;; --*) shift;; *) false;; esac; do :; done\nexec "$@"',
    "scontrol": "printf 'one\\ntwo\\n'",
    "hostname": "echo 127.0.0.1",
}
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the checkout"),
    pytest.mark.skipif(not WHOLE, reason="part of 'tox -e faults', starts a cluster"),
]
pytest.importorskip("ray", reason="needs the extra [ray]")


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes, both of which are this machine."""
    shims = tmp_path / "shims"
    shims.mkdir()
    for name, text in SHIMS.items():
        (shims / name).write_text(f"#!/bin/bash\n{text}\n")
        (shims / name).chmod(0o755)
    own = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{shims}:{own}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "[one-two]",
        "SLURM_CPUS_PER_TASK": "1",
        "SUITE": str(SUITE),
        "OUT": str(tmp_path / "out"),
        "RAY_worker_niceness": "0",
        "RAY_TMPDIR": "/tmp",  # names of sockets may not be long
    }


def start(job: dict[str, str]) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPT), "--task-memory", "0.25"]
    return subprocess.Popen(
        command,
        env=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float) -> str:
    try:
        text, _ = process.communicate(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return text


def test_a_job_that_is_ended_early_goes_on_in_the_next(job: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "small" / "records"
    process, deadline = start(job), time.monotonic() + 240
    while len(list(folder.glob("[!.]*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()  # the signal that the script asks Slurm for
    text = ended(process, 120)
    assert process.returncode == 143, text
    assert "what is finished is kept" in text
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = start(job)
    text = ended(again, 300)
    assert again.returncode == 0, text
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert (tmp_path / "out" / "small" / "index.html").exists()
