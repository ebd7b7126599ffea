"""The Ray engine: the same records, whatever the number of workers and whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from faulty import WHOLE, assert_same_records, keys, records, run, suite, table, tree, trick

from robustdeq.errors import StorageError, UsageError
from robustdeq.running.cluster import Cluster
from robustdeq.running.run import Options, Tick, run_suite

ray = pytest.importorskip("ray", reason="needs the extra [ray]")
whole = pytest.mark.skipif(not WHOLE, reason="part of 'tox -e faults', each starts a cluster")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local")
    run(out, trick("nothing"))
    return out


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")


@contextmanager
def cluster_of(cpus: int) -> Iterator[None]:
    """A cluster of this process's own, larger than the machine where that is wanted."""
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=128 * 2**20,
        logging_level="error",
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


def go(
    out: Path, workers: int, tick: Callable[[Tick], None] = lambda tick: None, extra: str = ""
) -> None:
    small = Cluster(task_memory=0.25)
    options = Options(out=out, workers=workers, cluster=small)
    run_suite(suite(extra or trick("nothing")), options, tick)


def assert_equal(local: Path, out: Path) -> None:
    assert_same_records(local, out)
    pd.testing.assert_frame_equal(table(local), table(out))


def computing() -> list[int]:
    """Ray's workers that compute a stage at the moment."""
    found = []
    for pid in tree(os.getpid()):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::_compute"):
            found.append(pid)
    return found


@whole
def test_the_engine_starts_a_cluster_of_its_own(tmp_path: Path, local: Path) -> None:
    go(tmp_path, workers=2)
    assert not ray.is_initialized()
    assert_equal(local, tmp_path)


@pytest.mark.parametrize("workers", [1, 2, 4] if WHOLE else [2])
def test_any_number_of_workers_one_of_which_is_killed(
    workers: int, tmp_path: Path, local: Path
) -> None:
    killed: list[int] = []

    def tick(tick: Tick) -> None:
        if tick.done >= 4 and not killed:
            for pid in computing()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    with cluster_of(workers):
        go(tmp_path, workers, tick)
    assert killed, "no worker was computing when one was to be killed"
    assert_equal(local, tmp_path)


@whole
def test_a_node_that_dies_costs_nothing_but_time(tmp_path: Path, local: Path) -> None:
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [machines.add_node(num_cpus=1)]
    ray.init(address=machines.address, logging_level="error", log_to_driver=False)
    try:

        def tick(tick: Tick) -> None:
            if tick.done >= 4 and nodes:
                machines.remove_node(nodes.pop(), allow_graceful=False)

        go(tmp_path, 2, tick)
    finally:
        ray.shutdown()
        machines.shutdown()
    assert not nodes
    assert_equal(local, tmp_path)


@whole
def test_a_run_goes_on_with_another_engine(tmp_path: Path, local: Path) -> None:
    class EnoughError(Exception):
        pass

    def tick(tick: Tick) -> None:
        if tick.done >= 6:
            raise EnoughError

    with cluster_of(2):
        with pytest.raises(EnoughError):
            go(tmp_path, 2, tick)
        held = keys(tmp_path)
        assert 6 <= len(held) < len(keys(local))
        go(tmp_path, 1)
    assert {key: keys(tmp_path)[key] for key in held} == held
    assert_equal(local, tmp_path)


@whole
def test_a_plugin_that_dies_or_hangs_fails_its_cell_there_too(tmp_path: Path) -> None:
    with cluster_of(2):
        options = Options(out=tmp_path, workers=2, cluster=Cluster(task_memory=0.25), timeout=20.0)
        for how, words in (("exit", "exited with code 3"), ("hang", "longer than --timeout 20 s")):
            verdicts = run_suite(suite(trick(how)), options)
            assert all(words in verdict.note for verdict in verdicts)
    labels = [record.meta.label for record in records(tmp_path).values()]
    assert labels.count("square") == 4


def test_a_store_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    def tick(tick: Tick) -> None:
        folder = tmp_path / "faulty" / "records"
        if tick.done == 2 and folder.is_dir():
            folder.rename(tmp_path / "faulty" / "elsewhere")
            folder.write_text("a file where the folder was")

    with cluster_of(2), pytest.raises(StorageError, match="cannot be written"):
        go(tmp_path, 2, tick)


def test_a_cluster_without_room_or_without_being_there_is_refused(tmp_path: Path) -> None:
    with cluster_of(1), pytest.raises(UsageError, match="has room for one task"):
        run_suite(suite(), Options(out=tmp_path, cluster=Cluster(task_memory=10_000.0)))
    with cluster_of(1), pytest.raises(UsageError, match="has a GPU"):
        run_suite(suite(), Options(out=tmp_path, device="cuda", cluster=Cluster()))
    nobody = Cluster(address="127.0.0.1:9")
    with pytest.raises(UsageError, match=r"no Ray cluster 127.0.0.1:9 .*'ray start'"):
        run_suite(suite(), Options(out=tmp_path, cluster=nobody))
    with pytest.raises(UsageError, match="Ray client"):
        Cluster(address="ray://somewhere:10001")


@whole
def test_the_command_line_starts_it(tmp_path: Path) -> None:
    code = "from robustdeq.cli import main; main()"
    text = Path(__file__).parent / "small.toml"
    command = [sys.executable, "-P", "-c", code, "run", str(text), "--out", str(tmp_path)]
    options = ["--samples", "10", "--engine", "ray", "--workers", "1", "--task-memory", "0.25"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small" / "table.csv").exists()
